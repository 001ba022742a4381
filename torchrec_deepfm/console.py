"""The output of the commands: lines and summaries, without known warnings of the libraries."""

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrec_deepfm.launch.processes import import_frozen, local_world_size
from torchrec_deepfm.remote.names import named

# Known and harmless warnings, by message; all others are shown.
_WARNINGS = (
    r"Please use DTensor instead and we are deprecating ShardedTensor",  # TorchRec's state_dict holds the latter
    r"`broadcast_buffers` is deprecated",  # TorchRec passes it to DistributedDataParallel
    r"[\s\S]*Failed to import: fbgemm_gpu",  # operators that the CPU build of FBGEMM leaves out
    r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",  # row-wise sharding calls them
    # Of data_parallel tables on CPU; tests/training/optim/test_optimizers.py proves their gradients right.
    r"fbgemm::dense_embedding_codegen_lookup_function: an autograd kernel was not registered",
    # Of load_model, which needs no process group.
    r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single",
    r"[\s\S]*fbgemm_gpu.split_table_batched_embeddings_ops is now DEPRECATED",  # TorchRec imports it
)
_LOGGED: dict[str, str | tuple[str, ...]] = {
    "root": "Sharding spec not found for",  # data_parallel tables have none
    "torchrec.distributed.utils": (
        "Sharding Type is data_parallel, caching params will be ignored",
        "Compute Kernel is dense, caching params will be ignored",  # a line per table that Adam trains sharded
    ),
    # Of table_row_wise and grid_shard: the size of a host, and the process groups in and between hosts.
    "torchrec.distributed.comm": ("TORCHREC_RESOLVED_POD_SIZE not set", "[Connection] "),
    "torch.fx._symbolic_trace": "is_fx_tracing will return true for both",  # TorchRec calls it while it pipelines
    # Raised again, and reported, where the batch is used.
    "torchrec.distributed.train_pipeline.utils": "DataLoadingThread: Non-retriable exception in data loading: UserE",
    # Of the report's figures: at the first start, or if the home folder is not writable.
    "matplotlib": ("mkdir -p failed for path", "Matplotlib created a temporary cache directory"),
    "matplotlib.font_manager": "Matplotlib is building the font cache",
}


def say(line: str) -> None:
    """Print a line to standard output and flush it, also into a pipe."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(f"{named(line)}\n".encode(encoding, "backslashreplace").decode(encoding))  # such as odd file names
    sys.stdout.flush()


def threads() -> int:
    """Return how many CPU cores this process may use: its share, if there are several ranks on the host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // local_world_size(), 1)


def quiet() -> None:
    """Silence the known, harmless warnings of torch, FBGEMM and TorchRec. Call it before they are imported."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGED:
        logging.getLogger(name).addFilter(_is_news)


def import_quietly(library: str) -> None:
    """Import a large library without its known warnings, and fast; see ``quiet`` and ``import_frozen``."""
    quiet()
    import_frozen(library)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOGGED[record.name])


def metrics_table(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the metrics of some splits.

    ``splits``: metrics by split, as in ``summary.json``. Returns lines: a header, one per split, and one more per split
    whose best reachable AUC is known.
    """
    columns = ("auc", "logloss", "ne", "calibration", "rows")
    lines = [f"{'':<12}" + "".join(f"{column:>13}" for column in columns)]
    for split, metrics in splits.items():
        shown = [_number(metrics[column]) for column in columns]
        lines.append(f"{split:<12}" + "".join(f"{text:>13}" for text in shown))
    for split, metrics in splits.items():
        if "lift" in metrics:
            lines.append(
                f"best reachable {split} AUC {metrics['best_reachable_auc']:.5f}: "
                f"{metrics['lift']:.1%} of the best possible lift"
            )
    return "\n".join(lines)


def training_summary(summary: Mapping[str, Any], folder: Path) -> str:
    """Format ``summary.json``: what was trained, its metrics, the files written, and warnings."""
    head = (
        f"trained {summary['epochs']} epoch(s), {summary['steps']} steps of {summary['world_size']} x "
        f"{summary['batch_size']} samples, in {summary['train_seconds']:.1f} s "
        f"({summary['samples_per_second']:,.0f} samples/s)"
    )
    table = metrics_table(splits(summary))
    table += _other_weights(summary.get("weights"))
    files = ", ".join(sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir()))
    return "\n".join([head, table, f"wrote {folder}{os.sep}: {files}", *_warnings(summary)])


def _other_weights(weights: Mapping[str, Any] | None) -> str:
    """A line about the weights that are kept beside the run's own; empty where there are none."""
    if weights is None or weights.get("best") in (None, weights["last"]):
        return ""
    own, other = weights["own"], {"best": "last", "last": "best"}[weights["own"]]
    figures = ", ".join(f"{split} AUC {_number(one['auc'])}" for split, one in splits(weights[other]).items())
    return (
        f"\nthese are the {own} weights, of step {weights[own]['step']}; the {other} ones, of step "
        f"{weights[other]['step']}, are in {weights[other]['folder']}{os.sep}: {figures}"
    )


def seeds_summary(summary: Mapping[str, Any], folder: Path) -> str:
    """Format the result of ``train_seeds``: the means, and below each its standard deviation."""
    columns = ("auc", "logloss", "ne", "calibration", "rows")
    lines = [f"{len(summary['seeds'])} seeds".ljust(12) + "".join(f"{column:>13}" for column in columns)]
    for split, means in splits(summary).items():
        std = summary["std"][split]
        lines.append(f"{split:<12}" + "".join(f"{_number(means[column]):>13}" for column in columns))
        shown = ("-" if std.get(column) is None else f"{std[column]:.5f}" for column in columns[:-1])
        lines.append(f"{'  +-':<12}" + "".join(f"{text:>13}" for text in shown))
    return "\n".join(
        [*lines, f"wrote {folder / 'summary.json'}; the runs are in {folder}{os.sep}seed_*", *_warnings(summary)]
    )


def splits(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Take the metrics by split out of the content of ``summary.json``."""
    return {split: summary[split] for split in ("validation", "test") if split in summary}


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    return [f"warning: {line}" for line in summary.get("warnings", ())]


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5f}"
