"""The data sets of the quality benchmarks, prepared by our own commands. No benchmark itself.

Frappe and the Criteo sample may not be passed on: they are read where they lie (``--shared``), and what is made of them
lies in the output folder. The synthetic set is made anew.
"""

import shutil
from pathlib import Path

from benchmarks._lib import commands

SHARED = commands.ROOT.parent / "shared" / "data"
NAMES = ("frappe", "synthetic", "criteo-sample")


def prepared(name: str, output: Path, shared: Path, *, rows: int, seed: int, frappe_test: Path | None) -> Path | None:
    """Prepare a data set, unless that is done.

    Args:
        name: One of ``NAMES``.
        output: The benchmark's folder.
        shared: Where ``frappe/`` and ``criteo/`` lie.
        rows: Training rows of the synthetic set.
        seed: Its seed.
        frappe_test: Frappe's test split, where somebody has it.

    Returns:
        The prepared folder; None where the data are not there.
    """
    folder = output / "data" / (f"synthetic-{rows}-{seed}" if name == "synthetic" else name)
    if name == "frappe" and frappe_test:
        folder = folder.with_name("frappe-with-test")
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    if name == "synthetic":
        raw = folder.with_suffix(".raw")
        shutil.rmtree(raw, ignore_errors=True)
        commands.torchrec_deepfm("synthetic", "--output", raw, "--rows", rows, "--seed", seed)
        held_out = ("--validation", raw / "validation.tsv", "--test", raw / "test.tsv")
        commands.torchrec_deepfm("prepare", "--input", raw / "day_0.tsv", *held_out, "--output", folder)
        shutil.rmtree(raw)
        return folder
    if name == "criteo-sample":
        file = shared / "criteo" / "dac_sample_12000.tsv"
        if not file.exists():
            return None
        commands.torchrec_deepfm("prepare", "--input", file, "--split", "8:1:1", "--output", folder)
        return folder
    files = [shared / "frappe" / f"{split}.parquet" for split in ("train", "validation")]
    if not all(file.exists() for file in files):
        return None
    held_out = ("--validation", files[1], *(("--test", frappe_test) if frappe_test else ()))
    commands.torchrec_deepfm("prepare", "--schema", "frappe-x1", "--input", files[0], *held_out, "--output", folder)
    return folder
