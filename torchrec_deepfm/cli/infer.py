"""Commands that use a trained model: ``predict``, ``explain``, ``export``, ``serve``."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from torchrec_deepfm import console
from torchrec_deepfm.cli.data_ranks import data_ranks
from torchrec_deepfm.errors import UserError, check_range
from torchrec_deepfm.inference.serve.limits import Limits
from torchrec_deepfm.units import format_bytes

if TYPE_CHECKING:
    from torchrec_deepfm.inference.load import Predictor, ShardedPredictor


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict the click probability of every row of some files; if it is stopped, the same command resumes."""

    ADDRESSES: ClassVar = ("output", "run_folder")

    input: tuple[str, ...]
    """Raw rows with or without labels: Criteo's text, CSV or Parquet; paths, folders or addresses such as s3://..."""
    output: Path
    """Parquet file to write, or its address: column probability, in the order of the rows."""
    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    """Run folder that train wrote."""
    package: Path | None = None
    """Folder that export wrote, instead of a run."""
    checkpoint: str | None = None
    """Of a run: best, last or a step. Default: the weights that its summary measures."""
    data: Path | None = None
    """Prepared folder of a run that keeps no encoder, as earlier versions trained it."""
    keep: tuple[str, ...] = ()
    """Columns of the input to carry along."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a row that does not fit, or give it a null."""
    shard_tables: Literal["auto", "always", "never"] = "auto"
    """Shard a run's tables over the ranks; auto: where copies for all ranks take more than half of a host's memory."""

    def run(self) -> None:
        """Write the predictions."""
        if self.shard_tables == "always" and "RANK" not in os.environ:
            raise UserError(
                "there is one rank",
                where="--shard-tables always",
                remedy="start several, such as torchx run ... -j 1x2",
            )
        if self.shard_tables == "always" and self.run_folder is None:
            raise UserError("a package's tables can't be sharded", where="--shard-tables always", remedy="give --run")
        run = None if self.run_folder is None else _fetched(self.run_folder)
        load = partial(_load, run, self.package, self.checkpoint, self.data)
        predictor: Predictor | ShardedPredictor | None = None if "RANK" in os.environ else load()
        with data_ranks() as ranks:
            if predictor is None:
                predictor = self._sharded(run) or load()
            from torchrec_deepfm.data.prepare.stored_output import stored_output
            from torchrec_deepfm.inference.predict import predict_files
            from torchrec_deepfm.remote.places import FileOutput

            with stored_output(FileOutput(self.output), ranks) as output:
                found = predict_files(
                    predictor,
                    self.input,
                    output,
                    keep=self.keep,
                    on_bad_row=self.on_bad_row,
                    ranks=ranks,
                    report=console.say if ranks.is_main else None,
                )
        if ranks.is_main:
            bad = f", {found.bad:,} bad ones without a probability" if found.bad else ""
            before = "is finished already: " if found.before else ""
            console.say(f"{output}: {before}{found.rows:,} rows{bad}")

    def _sharded(self, run: Path | None) -> "ShardedPredictor | None":
        """The run with sharded tables, if they are to be."""
        console.quiet()
        if run is None or self.package is not None or self.shard_tables == "never":
            return None
        os.environ["POLARS_MAX_THREADS"] = str(console.threads())
        from torchrec_deepfm.distributed.process_group import count, gather
        from torchrec_deepfm.inference.load import load_sharded
        from torchrec_deepfm.inference.sharded import fits_every_rank

        wanted = self.shard_tables == "always" or not all(gather(fits_every_rank(run)))
        return load_sharded(run, self.checkpoint, data=self.data) if wanted and count() > 1 else None


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Take predictions apart: bias, first order, pairs of fields, deep part; and which fields matter over many rows."""

    ADDRESSES: ClassVar = ("run_folder",)

    input: tuple[str, ...]
    """Raw rows, as for predict. With labels, the AUC lost when a field is shuffled is measured too."""
    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    """Run folder that train wrote."""
    package: Path | None = None
    """Folder that export wrote, instead of a run."""
    checkpoint: str | None = None
    """Of a run: best, last or a step. Default: the weights that its summary measures."""
    data: Path | None = None
    """Prepared folder of a run that keeps no encoder, as earlier versions trained it."""
    rows: int = 3
    """First rows to take apart."""
    importance_rows: int = 10_000
    """First rows to measure the importance of the fields over."""
    output: Path | None = None
    """Parquet file for the parts of the rows; NAME_fields.parquet beside it holds the fields."""
    page: Path | None = None
    """HTML file for both."""

    def run(self) -> None:
        """Run the command."""
        predictor = _load(self.run_folder, self.package, self.checkpoint, self.data)
        from torchrec_deepfm.inference.explain_files import explain_files

        found = explain_files(
            predictor, self.input, rows=self.rows, importance_rows=self.importance_rows, output=self.output,
            page=self.page,
        )  # fmt: skip
        console.say(found.text())
        written = found.write(self.output, self.page, f"What {predictor.path.name} predicts, and why")
        if written:
            console.say(f"wrote {', '.join(map(str, written))}")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained run as a package: a folder with the model in a form that runs elsewhere."""

    ADDRESSES: ClassVar = ("run_folder",)

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Run folder that train wrote."""
    output: Path
    """Folder of the package; must not exist, or be empty."""
    to: Literal["aoti", "onnx", "torch-export"]
    """onnx runs in onnxruntime without torch; torch-export in torch; aoti is compiled for this machine's CPU."""
    tables: Literal["fp32", "fp16", "int8", "int4"] = "fp32"
    """How the tables are stored. fp16, int8, int4 are refused if they lose more than 0.0001, 0.0005, 0.002 of AUC."""
    checkpoint: str | None = None
    """Weights to export: best, last or a step. Default: the run's own, which its summary measures."""
    data: Path | None = None
    """Prepared folder whose rows the package is compared on. Default: the data that the run was trained on."""
    layout: Literal["package", "triton"] = "package"
    """triton adds config.pbtxt and moves model.onnx to 1/, so that OUTPUT is a model of Triton's repository too."""

    def run(self) -> None:
        """Run the command."""
        console.import_quietly("torchrec")
        from torchrec_deepfm.inference.export.export import export

        done = export(
            _fetched(self.run_folder), self.output, to=self.to, tables=self.tables, checkpoint=self.checkpoint,
            data=self.data, layout=self.layout, say=console.say,
        )  # fmt: skip
        size = sum(path.stat().st_size for path in done.folder.rglob("*") if path.is_file())
        console.say(f"wrote {done.folder} ({format_bytes(size)}); {done.folder / 'README.md'} shows how to run it")


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a trained model over HTTP: /predict, /explain, /health, /metrics, and a page at / to try a row."""

    ADDRESSES: ClassVar = ("run_folder",)

    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    """Run folder that train wrote."""
    package: Path | None = None
    """Folder that export wrote, instead of a run; perhaps a link, which SIGHUP follows again."""
    checkpoint: str | None = None
    """Of a run: best, last or a step. Default: the weights that its summary measures."""
    host: str = "127.0.0.1"
    """Address to listen on; the default can't be reached from other machines."""
    port: int = 8000
    """Port; 0 takes a free one."""
    threads: int = 1
    """Threads per call of the model."""
    limits: Limits = Limits()  # noqa: RUF009 (frozen)
    """Limits of requests."""

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C."""
        path = _one_of(self.run_folder, self.package)
        check_range("threads", self.threads, 1)
        os.environ["POLARS_MAX_THREADS"] = "1"  # a batch is small
        console.import_quietly("torchrec")
        try:
            from torchrec_deepfm.inference.serve.model import ServedModel
            from torchrec_deepfm.inference.serve.server import serve
        except ImportError as error:
            if error.name is None or error.name.partition(".")[0] not in _SERVE_NEEDS:
                raise
            raise UserError(f"{error.name} is not installed", remedy="pip install 'torchrec_deepfm[serve]'") from error

        def read() -> ServedModel:
            return ServedModel(path, checkpoint=self.checkpoint, threads=self.threads)

        serve(read, host=self.host, port=self.port, limits=self.limits, say=console.say)


_SERVE_NEEDS = ("fastapi", "pydantic", "starlette", "uvicorn", "h11", "prometheus_client", "typing_extensions")


def _one_of(run: Path | None, package: Path | None) -> Path:
    """The folder that one of the two options names."""
    if (run is None) == (package is None):
        raise UserError("name one of the two", where="--run, --package")
    if package is not None and not (package / "package.json").exists():
        raise UserError(
            "not a package (no package.json)", where=f"--package {package}", remedy="name the folder that export wrote"
        )
    return package or _fetched(run or Path())


def _fetched(run: Path) -> Path:
    """The run, or a local copy if it is at an address."""
    from torchrec_deepfm.training.run.stored_output import fetch_run

    return fetch_run(run)


def _load(run: Path | None, package: Path | None, checkpoint: str | None, data: Path | None) -> "Predictor":
    path = _one_of(run, package)
    os.environ["POLARS_MAX_THREADS"] = str(console.threads())  # read when polars is loaded
    console.import_quietly("torchrec")
    from torchrec_deepfm.inference.load import load

    return load(path, checkpoint, data=data)
