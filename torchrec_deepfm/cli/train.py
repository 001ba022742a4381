"""Commands that train and show runs: ``train``, ``recipes``, ``report``, ``runs``, ``evaluate``."""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from torchrec_deepfm import console
from torchrec_deepfm.cli.options import Unset, given
from torchrec_deepfm.errors import UserError, check_range, flag
from torchrec_deepfm.evaluation.options import EvaluateOptions
from torchrec_deepfm.launch.launcher import STARTED
from torchrec_deepfm.training.config import (
    CheckpointConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizationConfig,
    PlannerConfig,
    RegularizationConfig,
    RunOptions,
    TrainConfig,
)
from torchrec_deepfm.training.recipes import recipe, recipe_for

if TYPE_CHECKING:
    from torchrec_deepfm.data.dataset.prepared import PreparedData
    from torchrec_deepfm.training.recipes import DataSet
    from torchrec_deepfm.training.trainer import Result


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a sharded DeepFM, evaluate it, and write a run folder.

    The defaults below are those of the recipe paper. Other recipes have their own, such as small-table, the default
    where the data are small. An option that is given overrides any recipe.
    """

    ADDRESSES: ClassVar = ("data", "output")

    data: Path | None = None
    """Prepared folder, or its address. Without it a small synthetic set is made in data/synthetic, once."""
    output: Path | None = None
    """Run folder, or an address such as s3://bucket/run. An unfinished run of the same options and data resumes.
    Default: runs/<time>."""
    recipe: str | None = None
    """Named settings, which the command recipes lists, or FILE.py:FUNCTION of your own. Default: small-table below a
    million training rows and ids, else paper; without --data, synthetic."""
    seeds: int = 1
    """Train with so many seeds, from --seed on, into folders seed_0, seed_1, ... of the run folder."""
    max_ne: float = 1.0
    """Largest final normalised entropy of a split; above it the exit code is 3. A constant prediction has 1."""
    num_embeddings: tuple[int, ...] = ()
    """For a folder that another tool wrote: take ids modulo this, one number for all columns or one each."""
    model: Annotated[Any, Unset(ModelConfig)]
    optimization: Annotated[Any, Unset(OptimizationConfig)]
    regularization: Annotated[Any, Unset(RegularizationConfig)]
    evaluation: Annotated[Any, Unset(EvaluationConfig)]
    checkpoint: Annotated[Any, Unset(CheckpointConfig)]
    planner: Annotated[Any, Unset(PlannerConfig)]
    options: Annotated[RunOptions, tyro.conf.arg(name="run")] = RunOptions()

    def __post_init__(self) -> None:
        """Check what the library does not check itself, and that the options fit the recipe."""
        assert self.config
        check_range("seeds", self.seeds, 1)
        if not self.max_ne > 0:
            raise UserError("must be greater than 0", where=f"--max-ne {self.max_ne}")

    @cached_property
    def config(self) -> TrainConfig:
        """The recipe's values, overridden by the options that are given; without a recipe the paper's."""
        return replace(recipe(self.recipe or ("synthetic" if self.data is None else "paper")), **self._given)

    def _config_for(self, data: "PreparedData", ranks: int, output: Path) -> TrainConfig:
        """The same for these data, on which small-table and the default depend.

        A run in ``output`` keeps what it began with: the optimizer of sharded tables, also where this start doesn't say
        where they go; and earlier versions took the paper's options without a recipe.
        """
        from torchrec_deepfm.training.run.same_run import holds_run_of

        if self.recipe not in (None, "small-table") or (self.recipe is None and self.data is None):
            return self.config
        rows, validation = data.rows("train"), bool(data.rows("validation"))
        ids, multi_hot = sum(data.num_embeddings.values()), bool(data.schema.multi_hot)
        config, sharded = (
            recipe_for(
                self.recipe, self._given, rows=rows, ids=ids, validation=validation, ranks=ranks, multi_hot=multi_hot,
                fused=fused,
            )
            for fused in (self._wants_fused(), True)
        )  # fmt: skip
        if holds_run_of(output, sharded):
            config = sharded
        if self.recipe is None and (config == self.config or holds_run_of(output, self.config)):
            return self.config
        small = f"small-table: {rows:,} training rows in batches of {config.batch_size} per rank"
        default = f"No --recipe given, the data are small: {small}; --recipe paper takes the paper's options"
        console.say(default if self.recipe is None else small)
        return config

    def _wants_fused(self) -> bool:
        """Whether constraints or a plan place tables as Adam can't have them: cut by columns, or out of memory."""
        from torchrec_deepfm.sharding.inputs.sharding_types import COLUMN_TYPES, CUDA_KERNELS
        from torchrec_deepfm.sharding.plan.io import load_plan

        plan = load_plan(self.options.plan).tables if self.options.plan is not None else ()
        words = [*self.options.rules, *(f"{table.sharding_type} {table.compute_kernel}" for table in plan)]
        return any(fused in word for word in words for fused in (*COLUMN_TYPES, *CUDA_KERNELS))

    @property
    def _given(self) -> dict[str, Any]:
        groups = (self.model, self.optimization, self.regularization, self.evaluation, self.checkpoint, self.planner)
        return {name: value for group in groups for name, value in given(group).items()}

    def run(self) -> None:
        """Train, or resume, and print the result."""
        console.import_quietly("torchrec")
        from torchrec_deepfm.distributed.health import LostPeer

        try:
            self._train()
        except LostPeer as error:
            sys.stderr.write(f"{error}\n")
            sys.exit(1)

    def _train(self) -> None:
        from torchrec_deepfm.data.synthetic.demo import sample_data
        from torchrec_deepfm.distributed import process_group as ranks
        from torchrec_deepfm.distributed.health import longest_wait
        from torchrec_deepfm.evaluation.field_importance import write_importance_if_small
        from torchrec_deepfm.training.monitoring.quality import refuse_worse
        from torchrec_deepfm.training.run.stored_output import is_remote, run_output
        from torchrec_deepfm.training.run.tracking.tracker import job_tracker, track
        from torchrec_deepfm.training.seeds import train_seeds
        from torchrec_deepfm.training.trainer import train

        how: Callable[..., Result] = partial(train_seeds, count=self.seeds) if self.seeds > 1 else train
        with ranks.process_group(longest_wait(self.options.timeout)) as device:
            ranks.on_main(lambda: job_tracker() is not None)  # refuses one that cannot be opened
            if self.data is None:
                sample = Path("data") / "synthetic"
                folder = ranks.on_main(lambda: sample_data(sample, console.say).folder)
            else:
                folder = self.data
            data = _open(folder, self.num_embeddings)
            # The launcher's start, and not this rank's, which may be one of many restarts.
            started = os.environ.get(STARTED) or f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
            output = self.output or ranks.on_main(lambda: Path("runs") / started)
            if self.seeds > 1 and is_remote(output):
                raise UserError(
                    f"several runs can't share the address {output}",
                    where=f"--seeds {self.seeds}",
                    remedy="start one each",
                )
            with run_output(output) as stored:
                config = ranks.on_main(lambda: self._config_for(data, ranks.count(), stored.local))
                options = self.options
                if stored.address is not None:
                    how = partial(how, publish=stored.publish)
                    options = replace(options, checkpoints=options.checkpoints or f"{stored.address}/checkpoints")
                result = how(
                    config, data, stored.local, device, options, say=console.say, measure=write_importance_if_small
                )
                if ranks.is_main():
                    self._show(result)
                ranks.on_main(lambda: track(job_tracker(), result.folder, config, result.summary))
            ranks.on_main(lambda: refuse_worse(result.summary, str(result.folder), self.max_ne))

    def _show(self, result: "Result") -> None:
        if result.before:
            console.say(f"{result.folder}: this training is finished, there is nothing left to do")
        if self.seeds > 1:
            console.say(console.seeds_summary(result.summary, result.folder))
        elif result.before:
            console.say(console.metrics_table(console.splits(result.summary)))
        else:
            console.say(console.training_summary(result.summary, result.folder))


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the named recipes, or print the sources of one and the memory and time that it needs."""

    name: tyro.conf.Positional[str | None] = None
    """A recipe, or FILE.py:FUNCTION of your own. Without it all are listed."""
    data: Path | None = None
    """Prepared folder to work memory and time out for. Default: the published data that the recipe is for."""
    ranks: int | None = None
    """Ranks to work it out for. Default: as many as the recipe is meant for."""
    samples_per_second: float | None = None
    """Speed of the training on all ranks together, to work the time out."""

    def run(self) -> None:
        """Print the recipes, or one of them."""
        from torchrec_deepfm.training.recipe_text import recipe_text, recipes_table

        if self.name is None:
            for option in ("data", "ranks", "samples_per_second"):
                if getattr(self, option) is not None:
                    raise UserError("name the recipe too", where=flag(option))
            console.say(recipes_table())
            return
        check_range("ranks", self.ranks, 1)
        if self.samples_per_second is not None and not 0 < self.samples_per_second < math.inf:
            raise UserError(
                "must be greater than 0, and finite", where=f"--samples-per-second {self.samples_per_second}"
            )
        data = None if self.data is None else _data_set(self.data)
        console.say(recipe_text(self.name, data, ranks=self.ranks, samples_per_second=self.samples_per_second))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw the report of a run again, finished or not, or compare runs; train draws a run's own at the end."""

    ADDRESSES: ClassVar = ("runs", "run_folder", "data")

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders that train wrote; several are compared with the first."""
    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    """Run folder that train wrote, instead of its name alone."""
    output: Path | None = None
    """HTML file of a comparison. Default: compare_<second run>.html in the folder of the first."""
    importance: bool = False
    """Measure again which fields matter to the run, on at most 8,192 rows."""
    data: Path | None = None
    """Prepared folder to measure that on. Default: the one that the run was trained on."""

    def __post_init__(self) -> None:
        """Check what is drawn."""
        if (self.run_folder is None) == (not self.runs):
            raise UserError("name one run folder, with or without --run, or several to compare", where="report")

    def run(self) -> None:
        """Draw the report."""
        console.quiet()
        measure = self.importance or self.data is not None
        if len(self.runs) > 1:
            if measure:
                raise UserError(
                    "these are for the report of one run", where="--importance, --data", remedy="leave them out"
                )
            _compare(self.runs, self.output)
            return
        if self.output is not None:
            raise UserError("a comparison of several runs is written there", where="--output", remedy="name two runs")
        from torchrec_deepfm.remote.places import store_back
        from torchrec_deepfm.training.run.run_files import IMPORTANCE
        from torchrec_deepfm.training.run.stored_output import fetch_run

        folder = fetch_run(self.run_folder or self.runs[0])
        if measure:
            self._measure(folder)
        from torchrec_deepfm.training.run.report import write_run_report

        written = [write_run_report(folder), *([folder / IMPORTANCE] if measure else [])]
        for path in written:
            store_back(path)
        console.say(f"wrote {written[0]}")

    def _measure(self, folder: Path) -> None:
        from torchrec_deepfm.data.dataset.prepared import PreparedData
        from torchrec_deepfm.evaluation.field_importance import write_importance
        from torchrec_deepfm.evaluation.prepared_rows import PreparedRows
        from torchrec_deepfm.training.run import folder as run_folder

        described = run_folder.read_config(folder, "train again")
        data = PreparedData.open(self.data or described.data)
        PreparedRows(data, "train").check(run_folder.read(folder), folder)
        write_importance(folder, data)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the runs in a folder: status, AUC, speed. See also runs compare."""

    ADDRESSES: ClassVar = ("folder",)

    folder: tyro.conf.Positional[Path] = Path("runs")
    """Folder that holds run folders, or its address."""
    json: bool = False
    """Print a JSON list instead of a table."""

    def run(self) -> None:
        """Print a line per run."""
        from torchrec_deepfm.training.run.run_list import list_runs, text
        from torchrec_deepfm.training.run.stored_output import fetch_records, is_remote

        lines = list_runs(fetch_records(self.folder))
        if is_remote(self.folder):  # whether it is running is known on its host only
            lines = [replace(one, status="unfinished") if one.status == "stopped" else one for one in lines]
        if self.json:
            console.say(json.dumps([asdict(one) for one in lines], default=str, indent=2))
        else:
            console.say(text(lines))


@dataclass(frozen=True, kw_only=True)
class CompareRuns:
    """Write a page with the options that differ between runs, their figures and curves."""

    ADDRESSES: ClassVar = ("runs",)

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Two or more run folders; the others are compared with the first."""
    output: Path | None = None
    """HTML file to write. Default: compare_<second run>.html in the folder of the first."""

    def run(self) -> None:
        """Write the page."""
        if len(self.runs) < 2:
            raise UserError("name at least two run folders", where="runs compare")
        _compare(self.runs, self.output)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate a trained run, or compare two, on labelled rows."""

    ADDRESSES: ClassVar = ("run_folder", "data")

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Run folder that train wrote, or its address."""
    data: Path | None = None
    """Prepared folder, or its address."""
    input: tuple[str, ...] = ()
    """Raw files with labels, instead of a prepared folder: as for predict."""
    num_embeddings: tuple[int, ...] = ()
    """For a folder that another tool wrote: as in train."""
    options: Annotated[EvaluateOptions, tyro.conf.arg(name="")] = EvaluateOptions()
    """What to evaluate."""

    def __post_init__(self) -> None:
        """Check what is evaluated."""
        if (self.data is None) == (not self.input):
            raise UserError("give one of the two, a prepared folder or raw files", where="--data, --input")
        if self.input and self.options.split is not None:
            raise UserError(
                "raw files have no splits", where=f"--split {self.options.split}", remedy="leave it out, or give --data"
            )

    def run(self) -> None:
        """Print the metrics of the run's final weights."""
        console.import_quietly("torchrec")
        from torchrec_deepfm.distributed import process_group as ranks
        from torchrec_deepfm.evaluation.evaluate import evaluate_run
        from torchrec_deepfm.evaluation.text import evaluation_text
        from torchrec_deepfm.remote.places import store_back
        from torchrec_deepfm.training.run.stored_output import fetch_run

        with ranks.process_group() as device:
            data = self.input if self.data is None else _open(self.data, self.num_embeddings)
            result = evaluate_run(fetch_run(self.run_folder), data, device, self.options)
            ranks.on_main(lambda: store_back(Path(result["file"])))
            if ranks.is_main():
                console.say(evaluation_text(result))


def _compare(runs: tuple[Path, ...], output: Path | None) -> None:
    from torchrec_deepfm.remote.places import store_back
    from torchrec_deepfm.training.run.comparison import write_comparison
    from torchrec_deepfm.training.run.stored_output import fetch_run

    written = write_comparison([fetch_run(one) for one in runs], output)
    store_back(written)
    console.say(f"wrote {written}")


def _data_set(folder: Path) -> "DataSet":
    from torchrec_deepfm.data.dataset.prepared import PreparedData
    from torchrec_deepfm.training.recipes import DataSet

    data = PreparedData.open(folder)
    return DataSet(
        prepare="",
        folder=str(folder),
        train_rows=data.rows("train"),
        table_rows=sum(data.num_embeddings.values()),
        numeric=len(data.schema.dense_names),
        fields=len(data.schema.numeric) + len(data.schema.categorical),
    )


def _open(folder: Path, num_embeddings: tuple[int, ...]) -> "PreparedData":
    from torchrec_deepfm.data.dataset.prepared import PreparedData
    from torchrec_deepfm.distributed import process_group as ranks

    if len(num_embeddings) > 1:
        sizes: int | tuple[int, ...] | None = num_embeddings
    else:
        sizes = num_embeddings[0] if num_embeddings else None
    # A folder of another tool may have to be read through to find its largest ids: once, and not by every rank.
    ranks.on_main(lambda: PreparedData.open(folder, num_embeddings=sizes) and None)
    data = PreparedData.open(folder, num_embeddings=sizes)
    if data.blocks is None and data.external is None and ranks.is_main():
        console.say(
            f"{folder}: an earlier version prepared it, without checksums of rows, so that damaged arrays would train; "
            f"python -m torchrec_deepfm verify {folder} compares every byte"
        )
    return data
