"""Rows per second of ``prepare`` on a table of many small Parquet files, against one file with the same rows.

python -m benchmarks.data.many_files
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks._lib.commands import torchrec_deepfm


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    files: int = 1500
    """Small files."""
    rows: int = 500
    """Rows per file."""
    repeats: int = 2
    """Runs of each kind, by turns; the fastest counts."""


def main(options: Options) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, rows = np.random.default_rng(0), options.files * options.rows
    numeric, categorical = [f"n{i}" for i in range(13)], [f"c{i}" for i in range(26)]
    table = pa.table(
        {"label": rng.integers(0, 2, rows)}
        | {name: rng.random(rows).astype(np.float32) for name in numeric}
        | {name: rng.integers(0, 100_000, rows) for name in categorical}
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "schema.toml").write_text(f'label = "label"\nnumeric = {numeric}\ncategorical = {categorical}\n')
        (folder / "many").mkdir()
        pq.write_table(table, folder / "one.parquet")
        for i in range(options.files):
            pq.write_table(table.slice(i * options.rows, options.rows), folder / "many" / f"part-{i:06}.parquet")
        seconds: dict[str, list[float]] = {"one.parquet": [], "many": []}
        for source in [*seconds] * options.repeats:
            output = folder / "out"
            shutil.rmtree(output, ignore_errors=True)
            started = time.perf_counter()
            words = ("--input", folder / source, "--schema", folder / "schema.toml", "--output", output)
            torchrec_deepfm("prepare", *words)
            seconds[source].append(time.perf_counter() - started)
            print(f"{source}: {seconds[source][-1]:.1f} s, {len(list(output.iterdir()))} files written")
    one, many = (min(each) for each in seconds.values())
    print(f"{rows:,} rows: {rows / one:,.0f} rows/s in one file, {rows / many:,.0f} in many: {one / many:.0%}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
