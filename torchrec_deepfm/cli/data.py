"""Commands that make, prepare and check data: ``synthetic``, ``schema``, ``prepare``, ``verify``."""

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from torchrec_deepfm import console
from torchrec_deepfm.cli.data_ranks import data_ranks
from torchrec_deepfm.data.prepare.options import PrepareOptions


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
        """Write the click logs."""
        from torchrec_deepfm.data.synthetic.generate import generate

        made = generate(self.output, rows=self.rows, days=self.days, seed=self.seed, click_rate=self.click_rate)
        console.say(made.summary())


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turn raw click logs into the prepared folder that training reads.

    If it is stopped, the same command resumes.
    """

    ADDRESSES: ClassVar = ("output",)

    output: Path
    """Folder to write, or an address such as s3://bucket/prepared; must be empty or absent."""
    input: tuple[str, ...] = ()
    """Raw training files: Criteo's text (.gz and .zst too) one a day, or a folder of day_0, day_1, ...; or tables.
    Paths or addresses."""
    validation: tuple[str, ...] = ()
    """Raw validation files. Without these and --test, the input is split."""
    test: tuple[str, ...] = ()
    """Raw test files."""
    schema: str = "criteo-kaggle"
    """Which columns the files have: criteo-kaggle, criteo-terabyte; criteo-x1, criteo-x4, frappe-x1 (CSV files of
    reczoo's data sets, prepared as FuxiCTR does); or the TOML file of a table."""
    options: Annotated[PrepareOptions, tyro.conf.arg(name="")] = PrepareOptions()
    """What becomes of the rows."""

    def run(self) -> None:
        """Write the prepared folder."""
        cores = console.threads()
        os.environ["POLARS_MAX_THREADS"] = str(cores)  # read when polars is loaded
        from torchrec_deepfm.data.criteo_defaults import criteo_preset
        from torchrec_deepfm.data.dataset.prepared import MANIFEST
        from torchrec_deepfm.data.prepare.prepare import prepare
        from torchrec_deepfm.data.prepare.stored_output import stored_output
        from torchrec_deepfm.data.schema import load_schema
        from torchrec_deepfm.remote.places import PreparedOutput

        schema, options = load_schema(self.schema), replace(self.options, threads=cores)
        unset = criteo_preset(self.schema, hash=options.hash, held_out=bool(self.validation or self.test))
        options = replace(options, **{name: value for name, value in unset.items() if not getattr(options, name)})

        with data_ranks() as workers, stored_output(PreparedOutput(self.output, MANIFEST), workers) as output:
            prepare(
                self.input,
                output,
                validation=self.validation,
                test=self.test,
                schema=schema,
                options=options,
                workers=workers,
                report=console.say,
            )


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every byte of a prepared folder against its checksums."""

    folder: tyro.conf.Positional[Path]
    """Prepared folder."""

    def run(self) -> None:
        """Check every file of the folder."""
        from torchrec_deepfm.data.dataset.verify import verify

        files = verify(self.folder, console.say)
        console.say(f"{self.folder}: {files} files verified")


@dataclass(frozen=True, kw_only=True)
class InferSchema:
    """Write a first schema for a table of your own from its columns, to edit."""

    file: tyro.conf.Positional[str]
    """Parquet or CSV file, a folder of them, or an fsspec address."""
    label: str | None = None
    """Name of the 0/1 column, where it can't be guessed; or a comparison that makes one, such as "rating >= 4"."""
    output: Path | None = None
    """TOML file to write. Without it the schema is printed."""

    def run(self) -> None:
        """Print or write the schema."""
        from torchrec_deepfm.data.raw.infer_schema import infer_schema, write_inferred

        if self.output is None:
            console.say(infer_schema(self.file, label=self.label).rstrip("\n"))
        else:
            write_inferred(self.file, self.output, label=self.label)
            words = shlex.join(["--input", self.file, "--schema", str(self.output), "--output"])
            console.say(f"wrote {self.output}; read it, then: python -m torchrec_deepfm prepare {words} FOLDER")
