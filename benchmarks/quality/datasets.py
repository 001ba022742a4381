"""The data sets of the quality benchmarks, prepared by the command line.

Frappe and the Criteo sample may not be redistributed: they are read in place (``--shared``), and the prepared folders
stay in the output folder. The synthetic set is generated.
"""

import shutil
from pathlib import Path

from benchmarks._lib import commands

SHARED = commands.ROOT.parent / "shared" / "data"


def synthetic(output: Path, rows: int, seed: int = 0) -> Path:
    """Generate and prepare a synthetic set, unless the folder exists.

    Args:
        output: The benchmark's folder.
        rows: Training rows.
        seed: Seed of the set.

    Returns:
        The prepared folder.
    """
    folder = output / "data" / f"synthetic-{rows}-{seed}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        raw = folder.with_suffix(".raw")
        shutil.rmtree(raw, ignore_errors=True)
        commands.torchrec_deepfm("synthetic", "--output", raw, "--rows", rows, "--seed", seed)
        held_out = ("--validation", raw / "validation.tsv", "--test", raw / "test.tsv")
        commands.torchrec_deepfm("prepare", "--input", raw / "day_0.tsv", *held_out, "--output", folder)
        shutil.rmtree(raw)
    return folder


def real(name: str, output: Path, shared: Path, frappe_test: Path | None = None) -> Path | None:
    """Prepare Frappe or the Criteo sample, unless the folder exists.

    Args:
        name: "frappe" or "criteo-sample".
        output: The benchmark's folder.
        shared: Folder that contains ``frappe/`` and ``criteo/``.
        frappe_test: Frappe's test split.

    Returns:
        The prepared folder; None if the data are missing.
    """
    folder = output / "data" / ("frappe-with-test" if name == "frappe" and frappe_test else name)
    if folder.exists():
        return folder
    if name == "frappe":
        files = [shared / "frappe" / f"{split}.parquet" for split in ("train", "validation")]
        options = ["--schema", "frappe-x1", "--validation", files[1], *(("--test", frappe_test) if frappe_test else ())]
    else:
        files = [shared / "criteo" / "dac_sample_12000.tsv"]
        options = ["--split", "8:1:1"]
    if not all(file.exists() for file in files):
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    commands.torchrec_deepfm("prepare", "--input", files[0], *options, "--output", folder)
    return folder
