"""Where the FM term pays: LR, FM, DNN and DeepFM on tables whose pairs are known, over rows and sizes of the tables.

The truth is a factorization machine of rank 3 over four fields plus first orders, so its pairs are what an FM can learn
and an MLP has to find. Rows per pair of values fall with the number of values: the sparse end is where data are few.

Shape letters: n rows, F fields.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torchrec import EmbeddingBagCollection

from benchmarks._lib.formatting import markdown
from benchmarks._lib.seed_statistics import compare_paired, deviation, mean, with_deviation
from benchmarks.quality.plain_training import PlainRows, best_auc
from torchrec_deepfm import DeepFM, embedding_tables
from torchrec_deepfm.model.deepfm import Term
from torchrec_deepfm.report.page import BLUE, GREEN, GREY, ORANGE, PURPLE, Picture

_FIELDS, _RANK = 4, 3
_MODELS: dict[str, tuple[Term, ...]] = {
    "LR": ("linear",),
    "FM": ("linear", "fm"),
    "DNN": ("deep",),
    "DeepFM": ("linear", "fm", "deep"),
}


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Args:
        rows: training rows of each table; 8,000 more for validation.
        values: values of each of the four fields.
        layers: widths of the MLP.
        seeds: of data and training.
        epochs: at most; the best one by validation AUC counts.
        learning_rate: of Adam.
        init_std: standard deviation of the embeddings at the start.
        picture: an SVG file to draw.
    """

    rows: tuple[int, ...] = (2_000, 8_000, 32_000)
    values: tuple[int, ...] = (30, 300)
    layers: tuple[int, ...] = (64, 64)
    seeds: int = 3
    epochs: int = 15
    learning_rate: float = 3e-3
    init_std: float = 0.05
    picture: Path | None = None


def generate(rows: int, values: int, seed: int) -> tuple[PlainRows, PlainRows, float]:
    """Draw training and validation rows; return them and the AUC of the truth on the latter."""
    random = np.random.default_rng((seed, values))
    factors = random.normal(0, 0.75, (_FIELDS, values, _RANK))
    first = random.normal(0, 0.3, (_FIELDS, values))
    ids = random.integers(0, values, (rows + 8_000, _FIELDS))
    chosen = np.stack([factors[field, ids[:, field]] for field in range(_FIELDS)], axis=1)
    pairs = 0.5 * (chosen.sum(1) ** 2 - (chosen**2).sum(1)).sum(1)
    logits = pairs + sum(first[field, ids[:, field]] for field in range(_FIELDS)) - 0.5
    labels = (random.random(len(logits)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    dense = np.zeros((len(ids), 0), np.float32)
    parts = [PlainRows(dense[part], ids[part], labels[part]) for part in (slice(rows), slice(rows, None))]
    return parts[0], parts[1], float(roc_auc_score(labels[rows:], logits[rows:]))


def main(options: Options) -> None:
    """Print a line per table, with the gain of DeepFM over the plain DNN."""
    torch.set_num_threads(1)
    lines = []
    drawn: dict[tuple[int, int], Mapping[str, Sequence[float]]] = {}
    for values in options.values:
        sizes = {f"f{field}": values for field in range(_FIELDS)}
        for rows in options.rows:
            aucs: dict[str, list[float]] = {name: [] for name in _MODELS}
            known = []
            for seed in range(options.seeds):
                train, validation, best = generate(rows, values, seed)
                known.append(best)
                for name, terms in _MODELS.items():
                    torch.manual_seed(seed)
                    tables = embedding_tables(sizes, factor_dim=8, init_std=options.init_std)
                    collection = EmbeddingBagCollection(tables=tables)
                    model = DeepFM(collection, 0, options.layers, 8, terms=terms, dropout=0.0)
                    found = best_auc(model, train, validation, epochs=options.epochs, lr=options.learning_rate)
                    aucs[name].append(found)
            drawn[values, rows] = aucs | {"truth": known}
            gain = compare_paired(aucs["DeepFM"], aucs["DNN"], digits=4)
            cells = [with_deviation(found) for found in aucs.values()]
            lines.append([values, f"{rows:,}", f"{rows / values**2:.2g}", *cells, with_deviation(known), gain])
    head = ["values per field", "rows", "rows per pair", *_MODELS, "truth", "DeepFM against DNN"]
    print(markdown(head, lines))
    if options.picture is not None:
        draw(drawn, options.picture)


def draw(aucs: Mapping[tuple[int, int], Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw validation AUC over rows, a panel for each number of values per field, in colours for light and dark.

    ``aucs``: those of all seeds by model, by (values per field, rows).
    """
    sizes = sorted({values for values, _ in aucs})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    styles = {
        "truth": (GREY, "--"),
        "DeepFM": (BLUE, "-"),
        "FM": (GREEN, "-"),
        "DNN": (ORANGE, "-"),
        "LR": (PURPLE, "-"),
    }
    for axis, values in zip(panels, sizes, strict=True):
        rows = sorted(count for size, count in aucs if size == values)
        for name, (colour, line) in styles.items():
            found = [aucs[values, count][name] for count in rows]
            errors = [deviation(one) for one in found]
            axis.errorbar(
                rows,
                [mean(one) for one in found],
                errors,
                color=colour,
                linestyle=line,
                label=name,
                capsize=2,
                marker=".",
            )
        axis.set_xscale("log")
        ticks = [f"{count:,}\n{count / values**2:.2g} per pair" for count in rows]
        axis.set_xticks(rows, ticks)
        axis.minorticks_off()
        axis.set_title(f"{values} values per field")
        axis.set_xlabel("training rows")
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation AUC")
    panels[-1].legend(frameon=False, loc="center left")
    picture = Picture(figure, alt="validation AUC over training rows").address
    path.write_bytes(base64.b64decode(picture.partition(",")[2]))


if __name__ == "__main__":
    main(tyro.cli(Options))
