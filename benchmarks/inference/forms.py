"""Every form of an exported run: size, latency, rate and parity, beside the run itself and TorchRec's quantized tables.

    python -m benchmarks.inference.forms --runs runs/frappe runs/synthetic

Each form is exported by ``export``, so its parity is that of the command, on the validation rows of the run's data.
Then one thread scores rows of that split: one, 256 and 8,192 at a time. Latencies are elapsed time, rates
are per second of the process's CPU time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
import tyro

from torchrec_deepfm import console

console.quiet()

from torchrec.inference.modules import quantize_embeddings  # noqa: E402

from torchrec_deepfm.data.dataset.prepared import PreparedData  # noqa: E402
from torchrec_deepfm.data.loader.loader import Loader  # noqa: E402
from torchrec_deepfm.errors import UserError  # noqa: E402
from torchrec_deepfm.inference.export.export import export  # noqa: E402
from torchrec_deepfm.inference.export.forms import PROBABILITY, open_model  # noqa: E402
from torchrec_deepfm.inference.export.graph import arrays_of  # noqa: E402
from torchrec_deepfm.inference.export.package import read_package  # noqa: E402
from torchrec_deepfm.inference.weights import load_model  # noqa: E402
from torchrec_deepfm.training.run import folder as run_folder  # noqa: E402
from torchrec_deepfm.units import format_bytes  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    runs: tuple[Path, ...]
    """Run folders whose prepared data still exist."""
    to: tuple[Literal["onnx", "aoti", "torch-export"], ...] = ("onnx", "aoti", "torch-export")
    """Forms."""
    tables: tuple[Literal["fp32", "fp16", "int8", "int4"], ...] = ("fp32", "fp16", "int8", "int4")
    """How tables are stored."""
    single: int = 2000
    """Calls with one row."""
    seconds: float = 2.0
    """Seconds per rate."""


def main(options: Options) -> None:
    """Print a table per run."""
    torch.set_num_threads(1)
    for run in options.runs:
        head = ("form", "tables", "tables take", "model file", "p50, 1 row", "p99, 1 row", "rows/s, 256",
                "rows/s, 8,192", "AUC loss", "largest difference")  # fmt: skip
        console.say(f"\n{run.name}\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
        _run(run, options)


def _run(run: Path, options: Options) -> None:
    data = PreparedData.open(Path(run_folder.read_config(run, "train again").data))
    batches = {size: list(islice(Loader(data, "validation", batch_size=size), 8)) for size in (256, 8192)}
    model = load_model(run)
    weights = [bag.weight for bag in model.sparse_arch.embedding_bag_collection.embedding_bags.values()]
    stored = sum(weight.nbytes for weight in weights)
    for dtype in (torch.float32, torch.qint8, torch.quint4x2):
        if dtype != torch.float32:
            model = load_model(run)
            quantize_embeddings(model, dtype, inplace=True)
            stored = sum(each.nbytes for each in model.state_dict().values() if each.dtype == torch.uint8)

        def eager(batch: object) -> None:
            with torch.inference_mode():
                torch.sigmoid(model(batch.dense_features, batch.sparse_features))  # noqa: B023

        one = list(Loader(data, "validation", batch_size=1)) if dtype == torch.float32 else []
        name = "fp32" if dtype == torch.float32 else f"TorchRec's {str(dtype).removeprefix('torch.q')}"
        measured = _measure(eager, {1: one, **batches} if one else batches, options)
        console.say(f"| eager | {name} | {format_bytes(stored)} | - | {measured} | - | - |")
    for form, tables in product(options.to, options.tables):
        with TemporaryDirectory() as folder:
            package = Path(folder, "package")
            try:
                done = export(run, package, to=form, tables=tables)
            except UserError as error:
                console.say(f"| {form} | {tables} | refused: {error} |")
                continue
            signature, call = read_package(package).signature, open_model(form, package, threads=1)
            inputs = {size: [arrays_of(batch, signature) for batch in some] for size, some in batches.items()}
            inputs[1] = [{name: _one(array, row) for name, array in inputs[256][0].items()} for row in range(256)]
            size = sum(path.stat().st_size for path in package.glob("model*"))
            loss = "-" if done.parity.auc_loss is None else f"{done.parity.auc_loss:+.6f}"
            measured = _measure(lambda arrays: call(arrays, PROBABILITY), inputs, options)  # noqa: B023
            console.say(f"| {form} | {tables} | {format_bytes(done.bytes_after)} | {format_bytes(size)} | {measured} | "
                        f"{loss} | {done.parity.difference:.2g} |")  # fmt: skip


def _one(array: np.ndarray, row: int) -> np.ndarray:
    """One row of an input; these runs have no lists."""
    return np.ascontiguousarray(array[row : row + 1])


def _measure(call: Callable[[object], object], inputs: dict[int, list], options: Options) -> str:
    """The cells of latency and rate."""
    cells = ["-", "-"]
    if 1 in inputs:
        some, times = inputs[1], []
        for i in range(options.single + 50):
            start = time.perf_counter()
            call(some[i % len(some)])
            times.append(time.perf_counter() - start)
        cells = [f"{np.quantile(times[50:], q) * 1e3:.2f} ms" for q in (0.5, 0.99)]
    for size in (256, 8192):
        call(inputs[size][0])
        start, rows, i = time.process_time(), 0, 0  # of this thread alone: other work does not count
        while time.process_time() - start < options.seconds:
            call(inputs[size][i % len(inputs[size])])
            rows, i = rows + size, i + 1
        cells.append(f"{rows / (time.process_time() - start):,.0f}")
    return " | ".join(cells)


if __name__ == "__main__":
    main(tyro.cli(Options))
