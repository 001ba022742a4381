"""The command line: one thin typed layer over the library.

Every command is a dataclass whose fields are its options; tyro parses it and writes the help. Each runs in one process
as it stands, and ``train`` and ``evaluate`` as a rank when torchrun or TorchX starts them.
"""

import dataclasses
import errno
import itertools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from torchrec_deepfm import console
from torchrec_deepfm.cli.experiment import CalibrateCommand, ExperimentCommand
from torchrec_deepfm.cli.parse_errors import one_line_errors
from torchrec_deepfm.cli.plan import PlanCommand
from torchrec_deepfm.distributed.stop_signals import Preempted
from torchrec_deepfm.errors import UserError, one_of, shown
from torchrec_deepfm.files import check_local
from torchrec_deepfm.launch import STARTED, exit_with
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.recipes import recipe
from torchrec_deepfm.units import parse_bytes

if TYPE_CHECKING:
    from torchrec_deepfm.data.dataset.prepared import PreparedData
    from torchrec_deepfm.training.recipes import DataSet

PROG = "python -m torchrec_deepfm"


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Write raw click logs in Criteo's format whose best reachable AUC is known."""

    output: Path
    """Folder to write; must be empty or absent."""
    rows: int = 1_200_000
    """Training rows over all days; validation and test get a tenth each on top."""
    days: int = 1
    """Training files."""
    seed: int = 0
    """Seed: the same one writes the same bytes."""
    click_rate: float = 0.25
    """Share of clicks: about 0.03 in Criteo Terabyte, 0.26 in Criteo Kaggle."""

    def run(self) -> None:
        """Run the command."""
        from torchrec_deepfm.data.synthetic.generate import generate

        made = generate(self.output, rows=self.rows, days=self.days, seed=self.seed, click_rate=self.click_rate)
        console.say(made.summary())


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turn raw click logs into the prepared folder that training reads.

    Stopped in any way, the same command goes on where it stood.
    """

    output: Path
    """Folder to write; must be empty or absent."""
    input: tuple[str, ...] = ()
    """Raw training files: Criteo's text (.gz and .zst too) one a day, or a folder of day_0, day_1, ...; or tables."""
    validation: tuple[str, ...] = ()
    """Raw validation files. Without these and --test, the input is split."""
    test: tuple[str, ...] = ()
    """Raw test files."""
    schema: str = "criteo-kaggle"
    """Which columns the files have: criteo-kaggle, criteo-terabyte; criteo-x1, criteo-x4, frappe-x1 (CSV files of
    reczoo's data sets, prepared as FuxiCTR does); or the TOML file of a table."""
    split: str | None = None
    """How to split the input: 8:1:1, 9:1 (no validation), last-day (halved: validation, test), or none. Default: 8:1:1;
    for criteo-terabyte last-day."""
    numeric: str | None = None
    """What becomes of numbers: log1p, log (as TorchRec's script), bucketize (extra categories), fuxictr (the same as
    FuxiCTR makes them), or none. Default: what the schema says; else log1p for Criteo, none for a table."""
    missing: Literal["value", "rare"] | None = None
    """A missing category is a value of its own, or has id 0 as rare ones do. Default: what the schema says; else
    value. With --hash it always has id 0."""
    min_count: int | None = None
    """Values seen less often in training share id 0; not with --hash. Default: 10; for criteo-x1 and frappe-x1 1."""
    hash: tyro.conf.FlagCreatePairsOff[bool] = False
    """Hash values to ids instead of keeping a vocabulary."""
    num_embeddings: tuple[int, ...] = ()
    """With --hash: ids per column, one number for all or one each. Default: 40 million; criteo-terabyte: MLPerf's."""
    vocabulary: Path | None = None
    """Prepared folder whose vocabulary is applied instead of counting one."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a bad row, or leave it out and list it in the manifest."""
    memory: str = "2GiB"
    """Memory to stay below, per process."""
    seed: int = 0
    """Seed of the split by row."""

    def run(self) -> None:
        """Run the command."""
        if self.hash and self.missing == "value":
            raise UserError("--missing value: hashing gives a missing category id 0; leave --hash or --missing out")
        cores = console.threads()
        os.environ["POLARS_MAX_THREADS"] = str(cores)  # read when polars is loaded
        from torchrec_deepfm.data.criteo_defaults import preset
        from torchrec_deepfm.data.prepare.prepare import prepare
        from torchrec_deepfm.data.prepare.workers import Workers
        from torchrec_deepfm.data.schema import load_schema

        chosen, schema = preset(self.schema), load_schema(self.schema)
        if self.missing is not None:
            schema = dataclasses.replace(schema, missing=self.missing)
        held_out = self.validation or self.test

        def run(workers: Workers) -> None:
            prepare(
                self.input,
                self.output,
                validation=self.validation,
                test=self.test,
                schema=schema,
                min_count=chosen.min_count if self.min_count is None and not self.hash else self.min_count,
                hash=self.hash,
                num_embeddings=self.num_embeddings or (chosen.num_embeddings if self.hash else None),
                vocabulary=self.vocabulary,
                numeric_transform=self.numeric,
                split=self.split if self.split is not None or held_out else chosen.split,
                seed=self.seed,
                on_bad_row=self.on_bad_row,
                memory=parse_bytes("--memory", self.memory),
                threads=cores,
                workers=workers,
                report=console.say,
            )

        if "RANK" not in os.environ:
            run(Workers())
            return
        console.quiet()
        from torchrec_deepfm.distributed import process_group as ranks

        # A rank may wait for another one as long as a day of Criteo Terabyte takes.
        with ranks.process_group(timeout=timedelta(days=30).total_seconds(), cpu=True):
            run(Workers(rank=ranks.rank(), count=ranks.count(), gather=ranks.gather))


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every byte of a prepared folder against its checksums."""

    folder: tyro.conf.Positional[Path]
    """Prepared folder."""

    def run(self) -> None:
        """Run the command."""
        from torchrec_deepfm.data.dataset.verify import verify

        files = verify(self.folder, console.say)
        console.say(f"{self.folder}: {files} files are what was written")


@dataclass(frozen=True, kw_only=True)
class SchemaCommand:
    """Write a first schema for a table of your own, to edit."""

    action: tyro.conf.Positional[Literal["infer"]]
    """infer: look at the table's columns."""
    file: tyro.conf.Positional[str]
    """Parquet or CSV file, a folder of them, or an fsspec address."""
    label: str | None = None
    """Name of the 0/1 column, where it can't be guessed."""
    output: Path | None = None
    """TOML file to write. Without it the schema is printed."""

    def run(self) -> None:
        """Run the command."""
        from torchrec_deepfm.data.raw.infer_schema import infer_schema, write_inferred

        if self.output is None:
            console.say(infer_schema(self.file, label=self.label).rstrip("\n"))
        else:
            write_inferred(self.file, self.output, label=self.label)
            console.say(f"wrote {self.output}; look through it, then: {PROG} prepare --schema {self.output}")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a sharded DeepFM, evaluate it, and write a run folder."""

    data: Path | None = None
    """Prepared folder. Without it a small synthetic set is made in data/synthetic, once."""
    output: Path | None = None
    """Run folder. Where it holds the same run, unfinished, the training goes on. Default: runs/<time>."""
    recipe: str | None = None
    """Named settings, which the command recipes lists, or FILE.py:FUNCTION of your own. Default: paper; without --data,
    synthetic."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest intact checkpoint in the run folder; never: refuse a folder that is not empty."""
    checkpoints: str | None = None
    """Folder, or URL such as s3://bucket/run, for the checkpoints. Default: in the run folder."""
    plan: Path | None = None
    """File of a plan that says where the tables go: of plan, or the plan.json of a run."""
    constraint: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """What the planner may do with a table: C1=row_wise, 't_C*=column_wise:min_partition=8', '>1e6=row_wise'."""
    timeout: int = 120
    """Seconds after which a rank without a sign of life has stalled, or a step that also takes 20 times the slowest so
    far. Start, evaluations and checkpoints have half an hour."""
    seeds: int = 1
    """Train with so many seeds, from --seed on, into folders seed_0, seed_1, ... of the run folder."""
    num_embeddings: tuple[int, ...] = ()
    """For a folder that another tool wrote: take ids modulo this, one number for all columns or one each."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    """Model and training options."""

    def __post_init__(self) -> None:
        """Check what the library does not check itself."""
        if self.timeout < 1:
            raise UserError(f"--timeout {self.timeout}: must be at least 1")
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds}: must be at least 1")

    def run(self) -> None:
        """Run the command."""
        console.quiet()
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
        from torchrec_deepfm.training.seeds import train_seeds
        from torchrec_deepfm.training.trainer import train

        how = partial(train_seeds, count=self.seeds) if self.seeds > 1 else train
        with ranks.process_group(longest_wait(self.timeout)) as device:
            if self.data is None:
                sample = Path("data") / "synthetic"
                folder = ranks.on_main(lambda: sample_data(sample, console.say).folder)
            else:
                folder = self.data
            data = _open(folder, self.num_embeddings)
            # The launcher's start, and not this rank's, which may be one of many restarts.
            started = os.environ.get(STARTED) or f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
            output = self.output or ranks.on_main(lambda: Path("runs") / started)
            result = how(
                self.config,
                data,
                output,
                device,
                resume=self.resume,
                checkpoints=self.checkpoints,
                plan=self.plan,
                constraints=tuple(itertools.chain.from_iterable(self.constraint)),
                timeout=self.timeout,
                say=console.say,
            )
            if ranks.is_main():
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
    """List the named recipes, or tell where the values of one come from and what a training with it takes."""

    name: tyro.conf.Positional[str | None] = None
    """A recipe, or FILE.py:FUNCTION of your own. Without it all are listed."""
    data: Path | None = None
    """Prepared folder to work memory and time out for. Default: the published data that the recipe is for."""
    ranks: int | None = None
    """Ranks to work it out for. Default: as many as the recipe is meant for."""
    samples_per_second: float | None = None
    """Speed of the training on all ranks together, to work the time out."""

    def run(self) -> None:
        """Run the command."""
        from torchrec_deepfm.training.recipe_text import recipe_text, recipes_table

        if self.name is None:
            for option in ("data", "ranks", "samples_per_second"):
                if getattr(self, option) is not None:
                    raise UserError(f"--{option.replace('_', '-')}: name the recipe too")
            console.say(recipes_table())
            return
        if self.ranks is not None and self.ranks < 1:
            raise UserError(f"--ranks {self.ranks}: must be at least 1")
        if self.samples_per_second is not None and not 0 < self.samples_per_second < math.inf:
            raise UserError(f"--samples-per-second {self.samples_per_second}: must be greater than 0, and finite")
        data = None if self.data is None else _data_set(self.data)
        console.say(recipe_text(self.name, data, ranks=self.ranks, samples_per_second=self.samples_per_second))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw the report of a run again, or that of one that goes on; train draws it at the end."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Run folder that train wrote."""

    def run(self) -> None:
        """Run the command."""
        console.quiet()
        from torchrec_deepfm.training.run.report import write_run_report

        console.say(f"wrote {write_run_report(self.run_folder)}")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate a trained run on a split of a prepared folder."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Run folder that train wrote."""
    data: Path
    """Prepared folder."""
    split: Literal["validation", "test"] = "test"
    """Split to evaluate."""
    num_embeddings: tuple[int, ...] = ()
    """For a folder that another tool wrote: as in train."""

    def run(self) -> None:
        """Run the command."""
        console.quiet()
        from torchrec_deepfm.distributed import process_group as ranks
        from torchrec_deepfm.training.trainer import evaluate_run

        with ranks.process_group() as device:
            values = evaluate_run(self.run_folder, _open(self.data, self.num_embeddings), self.split, device)
            if ranks.is_main():
                console.say(console.metrics_table({self.split: values}))


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check that torch, FBGEMM and TorchRec fit together, and say what to install where they do not."""

    def run(self) -> None:
        """Run the command."""
        from torchrec_deepfm.doctor import check

        report = check()
        console.say(str(report))
        sys.exit(report.exit_code)


Command = (
    Synthetic
    | Prepare
    | Verify
    | SchemaCommand
    | Recipes
    | Train
    | Report
    | Evaluate
    | PlanCommand
    | ExperimentCommand
    | CalibrateCommand
    | Doctor
)
COMMANDS: dict[str, type[Command]] = {
    "synthetic": Synthetic,
    "schema": SchemaCommand,
    "prepare": Prepare,
    "verify": Verify,
    "recipes": Recipes,
    "train": Train,
    "report": Report,
    "evaluate": Evaluate,
    "plan": PlanCommand,
    "experiment": ExperimentCommand,
    "calibrate": CalibrateCommand,
    "doctor": Doctor,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: the command and its options; those of the process by default.

    Raises:
        SystemExit: with code 2 and one line on standard error, where the input is wrong; with 143 or 130 where a
            training was stopped by SIGTERM or Ctrl-C and has saved its state.
    """
    try:
        parse(sys.argv[1:] if argv is None else argv).run()
    except UserError as error:
        exit_with(error)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG or error.filename is None:
            raise
        exit_with(UserError(f"{shown(str(error.filename))}: longer than a name may be here; take a shorter one"))
    except Preempted as request:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{request}\n")
        sys.exit(request.exit_code)


def parse(argv: Sequence[str]) -> Command:
    """Parse a command line.

    Args:
        argv: the command and its options.

    Returns:
        The command, ready to run.

    Raises:
        UserError: there is no such command; or an option is unknown, missing or has a bad value, such as an address
            where only a local path works.
        SystemExit: after ``--help``.
    """
    name, *options = argv or [""]
    if name in ("-h", "--help"):
        tyro.extras.subcommand_cli_from_dict(
            dict(COMMANDS),
            prog=PROG,
            description="DeepFM on TorchRec: make data, prepare, train, evaluate.",
            args=[name],
        )
    if name not in COMMANDS:
        raise UserError(f"{f'{name}: unknown' if name else 'no'} command; choose {one_of(COMMANDS, name)}")
    default: Command | None = None
    if name == "train":
        # The named recipe is the default of the options, and so the help shows its values.
        named = _value_of("--recipe", options)
        default = Train(config=recipe(named or ("paper" if _value_of("--data", options) else "synthetic")))
    with one_line_errors(f"{PROG} {name}"):
        command = tyro.cli(
            COMMANDS[name], args=options, prog=f"{PROG} {name}", default=default, config=(tyro.conf.OmitArgPrefixes,)
        )
    assert isinstance(command, Command)
    for option in dataclasses.fields(command):  # an option that takes addresses too is text, and not a Path
        value = getattr(command, option.name)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path):
                check_local(path)
    return command


def _data_set(folder: Path) -> "DataSet":
    from torchrec_deepfm.data.dataset.prepared import PreparedData
    from torchrec_deepfm.training.recipes import DataSet

    data = PreparedData.open(folder)
    return DataSet(
        prepare="",
        folder=str(folder),
        train_rows=data.rows("train"),
        table_rows=sum(data.num_embeddings.values()),
        numeric=len(data.schema.numeric),
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
    if data.blocks is None and data.foreign is None and ranks.is_main():
        console.say(
            f"{folder}: an earlier version prepared it, without checksums of rows, so that damaged arrays would train; "
            f"{PROG} verify {folder} compares every byte"
        )
    return data


def _value_of(option: str, options: Sequence[str]) -> str | None:
    for word, following in itertools.zip_longest(options, options[1:], fillvalue=""):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None
