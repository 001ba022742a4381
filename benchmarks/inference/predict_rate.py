"""Rows per second of ``predict`` on Criteo text, beside the model's bare forward on ready tensors at batch 8,192.

    python -m benchmarks.inference.predict_rate

A synthetic log, prepared, trained for one epoch (39 fields, factor_dim 15, MLP 400-400-400), predicted; then the same
rows, encoded before the clock starts, through the model alone. The fastest repetition counts.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from torchrec_deepfm import console

console.quiet()

from torchrec_deepfm.cli.main import main as command  # noqa: E402
from torchrec_deepfm.inference.load import load  # noqa: E402
from torchrec_deepfm.inference.predict import open_sources, predict_files  # noqa: E402
from torchrec_deepfm.inference.scorer import ModelScorer  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    rows: int = 300_000
    """Rows to train on and to predict."""
    repeats: int = 3
    """Repetitions."""


def main(options: Options) -> None:
    """Print the two rates and where the time goes."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        raw, prepared, run = folder / "raw", folder / "prepared", folder / "run"
        command(["synthetic", "--output", str(raw), "--rows", str(options.rows)])
        text = str(raw / "day_0.tsv")
        command(["prepare", "--input", text, "--output", str(prepared), "--split", "none", "--min-count", "3"])
        command(["train", "--data", str(prepared), "--output", str(run), "--recipe", "synthetic", "--epochs", "1",
                 "--factor-dim", "15", "--over-arch-layer-sizes", "400", "400", "400"])  # fmt: skip
        predictor = load(run)
        assert isinstance(predictor.score, ModelScorer)
        whole, read, encode, forward = [], [], [], []
        for i in range(options.repeats):
            start = time.perf_counter()
            predict_files(predictor, [text], folder / f"{i}.parquet")
            whole.append(time.perf_counter() - start)
            start = time.perf_counter()
            [source] = open_sources(predictor.encoder, [text])
            pieces = list(source.pieces(start=0, line=0, skip_bad=False))
            read.append(time.perf_counter() - start)
            start = time.perf_counter()
            rows = [predictor.encoder.encode_piece(piece.frame) for piece in pieces]
            encode.append(time.perf_counter() - start)
            batches = [batch for one in rows for batch in predictor.score.batches(one)]
            start = time.perf_counter()
            with predictor.score.computing():
                for _, _, dense, sparse in batches:
                    predictor.score.model(dense, sparse)
            forward.append(time.perf_counter() - start)
    for what, seconds in (("predict", whole), ("forward alone", forward), ("read", read), ("encode", encode)):
        console.say(f"{what:<14}{options.rows / min(seconds):>12,.0f} rows/s {min(seconds):>8.2f} s")
    console.say(f"predict reaches {min(forward) / min(whole):.2f} of the rate of forward alone")


if __name__ == "__main__":
    main(tyro.cli(Options))
