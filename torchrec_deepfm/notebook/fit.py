"""``fit``: from a table in memory to a trained run, in this process, without a launcher."""

import gc
import html
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from torchrec_deepfm import console
from torchrec_deepfm.data.prepare.options import PrepareOptions
from torchrec_deepfm.data.raw.frames import as_arrow, frame_columns
from torchrec_deepfm.data.schema import Schema, parse_schema, read_schema, toml_text
from torchrec_deepfm.errors import UserError, did_you_mean
from torchrec_deepfm.launch.cpu_threads import choose_threads
from torchrec_deepfm.launch.huge_pages import use_huge_pages
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.recipes import recipe_for
from torchrec_deepfm.training.run.report import REPORT, write_run_report

if TYPE_CHECKING:
    from torchrec_deepfm.inference.explain import Explanation
    from torchrec_deepfm.inference.load import Predictor

_TRAIN: Final = {field.name for field in fields(TrainConfig)}
_PREPARE: Final = {field.name for field in fields(PrepareOptions)}

_NEVER: Final = 2**31
_MANY: Final = 1_000_000  # rows of tables whose memory is given back at once


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The report of a run; a notebook shows it.

    Attributes:
        path: the HTML file.
    """

    path: Path

    def _repr_html_(self) -> str:
        page = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:48rem;border:0"></iframe>'


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A trained model with its folder.

    Attributes:
        folder: the run's folder, as ``train`` writes it. Without ``output`` it is temporary and ends with this object.
        schema: the columns, as TOML.
        summary: the content of ``summary.json``.
    """

    folder: Path
    schema: str
    summary: Mapping[str, Any]
    _keeps: tuple[TemporaryDirectory[str], ...] = ()

    @property
    def metrics(self) -> dict[str, Mapping[str, Any]]:
        """AUC, log loss, normalised entropy and calibration of the validation and the test split."""
        return console.splits(self.summary)

    @cached_property
    def predictor(self) -> "Predictor":
        """The trained model, as ``load`` opens it."""
        from torchrec_deepfm.inference.load import load

        with _nothing_left_behind():
            return load(self.folder)

    def predict(self, frame: Any) -> NDArray[np.float32]:
        """Predict the click probabilities of rows, float32 [n]; see ``Predictor.predict``."""
        return self.predictor.predict(frame)

    def explain(self, frame: Any) -> "Explanation":
        """Take the logits of rows apart; see ``Predictor.explain``."""
        return self.predictor.explain(frame)

    def report(self) -> RunReport:
        """Return the report, which a notebook shows; ``path`` is its file."""
        path = self.folder / REPORT
        return RunReport(path=path if path.exists() else write_run_report(self.folder))

    def __repr__(self) -> str:
        """Return folder and metrics."""
        return f"Run in {self.folder}\n{console.metrics_table(self.metrics)}"


def fit(
    frame: Any,
    label: str = "label",
    *,
    weight: str | None = None,
    validation: Any = None,
    test: Any = None,
    schema: Schema | Path | str | None = None,
    recipe: TrainConfig | str | None = None,
    output: Path | str | None = None,
    show: bool = True,
    **options: Any,
) -> TrainedRun:
    """Train a DeepFM on rows in memory, in this process.

    The columns are looked at as by ``schema infer``, the rows are prepared in a temporary folder and trained on as by
    ``train``. No process group, environment variable, warning filter or signal handler is left behind. Ctrl-C, or a
    notebook's stop button, raises ``KeyboardInterrupt``; with ``output``, the state is saved first.

    Args:
        frame: n rows: a pandas or polars DataFrame, an Arrow table, or a list of dicts.
        label: the column of labels, or a comparison such as ``rating >= 4``; not with ``schema``.
        weight: the column with the weight of each row in loss and metrics; not with ``schema``.
        validation: rows to evaluate on; without these and ``test``, a tenth of ``frame`` each, at random.
        test: rows of the final test.
        schema: the columns, or a TOML file with them; inferred by default.
        recipe: options of the training, or the name of a recipe; by default ``small-table`` below a million training
            rows and ids, else ``paper``.
        output: a new folder for the run; temporary by default.
        show: print the schema, the progress and the metrics.
        **options: fields of ``TrainConfig``, such as ``epochs=3``, and of ``PrepareOptions``, such as ``min_count=2``.

    Returns:
        The run.

    Raises:
        UserError: rows or options are wrong, or this process is one of several ranks.

    Example:
        >>> rows = [{"user": f"u{i % 7}", "item": f"i{i % 5}", "click": int(i % 7 + i % 5 > 5)} for i in range(4000)]
        >>> run = fit(rows, "click", show=False, epochs=2)
        >>> run.metrics["test"]["auc"] > 0.9, run.predict(rows[:2]).shape
        (True, (2,))
    """
    prepare_options, train_options = _sorted_options(options)
    if "RANK" in os.environ:
        raise UserError(
            "trains in one process, and this is one of several ranks", where="fit", remedy="use the command train there"
        )
    with ExitStack() as stack:
        stack.enter_context(_nothing_left_behind())
        say: Callable[[str], None] = console.say if show else lambda line: None
        work = Path(stack.enter_context(TemporaryDirectory(prefix="torchrec_deepfm-")))
        given = {"train": frame, "validation": validation, "test": test}
        tables = {name: _table(name, rows) for name, rows in given.items() if rows is not None}
        columns, text = _schema(schema, label, weight, tables["train"])
        say(text)
        from torchrec_deepfm.data.prepare.prepare import prepare

        data = prepare(
            tables["train"],
            work / "prepared",
            validation=tables.get("validation", ()),
            test=tables.get("test", ()),
            schema=columns,
            report=lambda line: say(line.replace(f"{work}{os.sep}", "")),
            **prepare_options,
        )
        config = _config(recipe, data, train_options)
        if output is None and "checkpoint_every" not in options:  # nobody resumes it
            config = replace(config, checkpoint_every=_NEVER)
        keeps = [] if output is not None else [TemporaryDirectory(prefix="torchrec_deepfm-run-")]
        folder = Path(output) if output is not None else Path(keeps[0].name) / "run"
        summary = _train(config, data, folder, say, show=show, report=output is not None)
        say(console.training_summary(summary, folder))
    return TrainedRun(folder=folder, schema=text, summary=summary, _keeps=tuple(keeps))


def _sorted_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of ``prepare`` and of the training; the seed is of both."""
    for name in options:
        if name not in _PREPARE | _TRAIN:
            raise UserError(f"unknown option {name!r}{did_you_mean(name, sorted(_PREPARE | _TRAIN))}", where="fit")
    return (
        {name: value for name, value in options.items() if name in _PREPARE},
        {name: value for name, value in options.items() if name in _TRAIN},
    )


def _table(name: str, frame: Any) -> pa.Table:
    table = as_arrow(frame, frame_columns(frame))
    if not len(table):
        raise UserError(f"the {name} rows are empty", where="fit", remedy="give rows with data")
    return table


def _schema(schema: Schema | Path | str | None, label: str, weight: str | None, train: pa.Table) -> tuple[Schema, str]:
    if isinstance(schema, Schema):
        return schema, repr(schema)
    if schema is not None:
        return read_schema(schema), Path(schema).read_text(encoding="utf-8")
    if weight is not None and weight not in train.column_names:
        raise UserError(f"no column {weight!r} of weights{did_you_mean(weight, train.column_names)}", where="fit")
    features = train if weight is None else train.drop_columns([weight])
    text = ("" if weight is None else f"weight = {toml_text(weight)}\n") + inferred(features, label)
    return parse_schema(text, Path("schema")), text


def inferred(rows: pa.Table, label: str, *, keep: bool = False) -> str:
    """Guess the schema of rows in memory, as TOML; see ``infer_schema``."""
    from torchrec_deepfm.data.raw.chunk_files import ChunkTable
    from torchrec_deepfm.data.raw.infer_schema import infer_schema

    text = infer_schema(ChunkTable.of_rows("train rows", rows), label=label, keep=keep)
    return text.replace('"train rows"', "the frame")


def _config(recipe: TrainConfig | str | None, data: Any, options: Mapping[str, Any]) -> TrainConfig:
    if isinstance(recipe, TrainConfig):
        return replace(recipe, **options)
    rows, ids = data.rows("train"), sum(data.num_embeddings.values())
    validation, multi_hot = bool(data.rows("validation")), bool(data.schema.multi_hot)
    return recipe_for(recipe, options, rows=rows, ids=ids, validation=validation, multi_hot=multi_hot)


def _train(
    config: TrainConfig, data: Any, folder: Path, say: Callable[[str], None], *, show: bool, report: bool
) -> dict[str, Any]:
    import torch.distributed as dist

    from torchrec_deepfm.distributed.process_group import process_group
    from torchrec_deepfm.distributed.stop_signals import Preempted
    from torchrec_deepfm.evaluation.field_importance import write_importance_if_small
    from torchrec_deepfm.training.config import RunOptions
    from torchrec_deepfm.training.trainer import train

    if dist.is_initialized():
        raise UserError(
            "this process has a process group already", where="fit", remedy="destroy it, or use train inside it"
        )
    try:
        with process_group() as device:
            options = RunOptions(resume="never")
            measure = write_importance_if_small
            result = train(config, data, folder, device, options, say=say, measure=measure, show=show, report=report)
    except Preempted as request:
        if request.signum == signal.SIGINT:
            raise KeyboardInterrupt(str(request)) from request
        raise SystemExit(request.exit_code) from request
    finally:
        if sum(data.num_embeddings.values()) > _MANY:
            gc.collect()  # the sharded model holds itself in cycles
    return result.summary


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """Undo what a training changes in its process: environment, warnings, random state."""
    before, hook = dict(os.environ), sys.excepthook  # each process group wraps the hook once more
    loaded = "torch" in sys.modules
    try:
        with warnings.catch_warnings():
            if not loaded:
                choose_threads()  # this and the next are read once, when torch is loaded
                use_huge_pages()
            console.quiet()
            import torch

            state = torch.random.get_rng_state()
            try:
                yield
            finally:
                torch.random.set_rng_state(state)
    finally:
        sys.excepthook = hook
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
