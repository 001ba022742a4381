"""Commands that make, prepare and check data: ``synthetic``, ``schema``, ``prepare``, ``verify``."""

import dataclasses
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import tyro

from torchrec_deepfm import console
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.units import parse_bytes


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

    If it is stopped, the same command resumes.
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
            console.say(
                f"wrote {self.output}; look through it, then: python -m torchrec_deepfm prepare --schema {self.output}"
            )
