"""Large batches with and without CowClip (arXiv 2204.06240): test AUC by batch size and by rule of scaling.

Synthetic clicks, Adam on everything. s is the batch size over the smallest one. The rules:

    unscaled   the rates of the smallest batch
    sqrt       all rates and the penalty on embeddings times sqrt(s)
    cowclip    the embeddings' rate as it is, their penalty times s, the dense rate times sqrt(s), gradients clipped
    unclipped  as cowclip, without the clipping

With clipping it counts the looked-up rows whose gradient reaches the limit, per step, in the first and the last epoch.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import tyro
from torch import Tensor

from benchmarks._lib.formatting import markdown
from benchmarks._lib.seed_statistics import mean
from torchrec_deepfm import console
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.synthetic.generate import generate
from torchrec_deepfm.distributed.process_group import process_group
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.optim.cowclip import CowClip
from torchrec_deepfm.training.trainer import train

Rule = Literal["unscaled", "sqrt", "unclipped", "cowclip"]


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Args:
        output: folder for data and runs; finished runs are not repeated.
        rows: training rows; a tenth as many for the test.
        batches: sizes of a batch, the smallest first.
        rules: rules of scaling.
        sparse_lr: Adam's rate of the tables at the smallest batch.
        dense_lr: the same of everything else.
        l2: penalty on whole tables at the smallest batch.
        epochs: passes over the rows.
        init_std: standard deviation of the latent vectors at the start.
        ratio: of CowClip.
        seed: of data and training.
    """

    output: Path
    rows: int = 5_000_000
    batches: tuple[int, ...] = (1024, 4096, 16_384, 65_536)
    rules: tuple[Rule, ...] = ("unscaled", "sqrt", "unclipped", "cowclip")
    sparse_lr: float = 0.01
    dense_lr: float = 1e-3
    l2: float = 1e-6
    epochs: int = 1
    init_std: float = 0.01
    ratio: float = 1.0
    seed: int = 0


class CountingCowClip(CowClip):
    """Counts the rows of replicated tables that are looked up and, of these, clipped."""

    shares: tuple[float, ...] = ()

    def clip_tables(self) -> None:
        """Clip, and record the share of the looked-up rows that was."""
        looked_up = sum(int((seen > 0).sum()) for seen in self._seen.values())
        self._clipped = 0
        super().clip_tables()
        type(self).shares += (self._clipped / max(looked_up, 1),)

    def _scale(self, seen: Tensor, norm: Tensor, gradient_norm: Tensor) -> Tensor:
        scale = super()._scale(seen, norm, gradient_norm)
        self._clipped += int(torch.count_nonzero(scale < 1.0))
        return scale


def settings(options: Options, batch: int, rule: Rule) -> TrainConfig:
    """Return the options of one training."""
    scale = batch / options.batches[0]
    config = TrainConfig(
        over_arch_layer_sizes=(128, 64), dropout=0.0, batch_size=batch, sparse_optimizer="adam",
        epochs=options.epochs, init_std=options.init_std, cowclip_ratio=options.ratio,
        sparse_lr=options.sparse_lr, dense_lr=options.dense_lr, embedding_l2=options.l2, linear_l2=options.l2,
        warmup=0.05, decay=0.95, decay_power=1.0, precision="medium", seed=options.seed,
    )  # fmt: skip
    if rule == "unscaled":
        return config
    root = math.sqrt(scale)
    rates, penalty = (options.sparse_lr * root, root) if rule == "sqrt" else (options.sparse_lr, scale)
    return replace(
        config,
        sparse_lr=rates,
        dense_lr=options.dense_lr * root,
        embedding_l2=options.l2 * penalty,
        linear_l2=options.l2 * penalty,
        clip_embedding="cowclip" if rule == "cowclip" else "none",
    )


def _data(options: Options) -> PreparedData:
    raw, folder = options.output / "raw", options.output / "data"
    if not (folder / "manifest.json").exists():
        if not raw.exists():
            generate(raw, rows=options.rows, seed=options.seed)
        prepare([raw / "day_0.tsv"], folder, test=[raw / "test.tsv"])
    return PreparedData.open(folder)


def main(options: Options) -> None:
    """Print a line per batch size and rule."""
    console.quiet()
    data, lines, small = _data(options), [], 0.0
    with process_group() as device:
        for batch in options.batches:
            for rule in options.rules:
                if batch == options.batches[0] and rule in ("sqrt", "unclipped"):
                    continue  # the same as unscaled
                config = settings(options, batch, rule)
                named = (options.sparse_lr, options.l2, options.init_std, options.ratio, options.epochs)
                folder = options.output / "_".join([rule, str(batch), *(f"{value:g}" for value in named)])
                CountingCowClip.shares = ()
                with mock.patch("torchrec_deepfm.training.optim.optimizers.CowClip", CountingCowClip):
                    summary = train(config, data, folder, device).summary
                auc = summary["test"]["auc"]
                small = small or auc
                line = [
                    f"{batch:,}", f"{options.epochs * (data.rows('train') // batch):,}", rule, f"{auc:.5f}",
                    f"{auc - small:+.5f}", f"{summary['test']['logloss']:.5f}",
                    _clipped(CountingCowClip.shares, options.epochs),
                ]  # fmt: skip
                print(*line, flush=True)
                lines.append(line)
    print(markdown(["batch", "steps", "rule", "test AUC", "less the first", "log loss", "rows clipped"], lines))


def _clipped(shares: tuple[float, ...], epochs: int) -> str:
    """Format the share of looked-up rows that were clipped, in the first and the last epoch."""
    steps = len(shares) // epochs
    return f"{mean(shares[:steps]):.2%} to {mean(shares[-steps:]):.2%}" if steps else ""


if __name__ == "__main__":
    main(tyro.cli(Options))
