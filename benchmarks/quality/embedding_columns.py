"""A list of numbers as one field by a linear map, or as a field per number: validation AUC, weights and seconds.

A planted truth: the click rate of a user and an item follows from ``<A e_item, b_user> + <c, e_item>``, where e is the
item's embedding and only it is known of the item. A fifth of the items have no row in training.

Shape letters: n rows, E width of the embeddings, T rank of A.
"""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import tyro
from torchrec import EmbeddingBagCollection

from benchmarks._lib.formatting import markdown
from benchmarks._lib.seed_statistics import with_deviation
from benchmarks.quality.plain_training import PlainRows, best_auc
from torchrec_deepfm import DeepFM, embedding_tables

_ITEMS, _USERS, _RANK = 2000, 500, 4


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Args:
        rows: training rows; a quarter as many for validation.
        widths: E.
        seeds: of data and training.
        epochs: at most; the best one by validation AUC counts.
    """

    rows: int = 40_000
    widths: tuple[int, ...] = (16, 64)
    seeds: int = 3
    epochs: int = 12


def generate(rows: int, width: int, seed: int) -> tuple[PlainRows, PlainRows]:
    """Draw training and validation rows."""
    random = np.random.default_rng(seed)
    items = random.normal(size=(_ITEMS, width))
    items /= np.linalg.norm(items, axis=1, keepdims=True)  # as those of text models
    maps, users = random.normal(size=(_RANK, width)), random.normal(size=(_USERS, _RANK))
    first = random.normal(size=width)

    def draw(count: int, last_item: int) -> PlainRows:
        user, item = random.integers(0, _USERS, count), random.integers(0, last_item, count)
        logits = ((items[item] @ maps.T) * users[user]).sum(axis=1) + items[item] @ first - 1.0
        labels = random.random(count) < 1 / (1 + np.exp(-logits))
        return PlainRows(items[item].astype(np.float32), user[:, None], labels.astype(np.float32))

    return draw(rows, _ITEMS * 4 // 5), draw(rows // 4, _ITEMS)


def train(
    train_rows: PlainRows, validation: PlainRows, *, one_field: bool, scaled: bool, seed: int, epochs: int
) -> list[float]:
    """Train a DeepFM; return the best validation AUC, the weights outside of the table, and seconds per epoch."""
    torch.manual_seed(seed)
    width = train_rows.dense.shape[1]
    mean, std = (train_rows.dense.mean(0), train_rows.dense.std(0)) if scaled else (0.0, 1.0)
    tables = EmbeddingBagCollection(tables=embedding_tables({"user": _USERS}, factor_dim=10))
    model = DeepFM(tables, width, (64, 64), 10, dense_widths=(width,) if one_field else (), dropout=0.0)
    inputs = [replace(rows, dense=(rows.dense - mean) / std) for rows in (train_rows, validation)]
    start = time.perf_counter()
    auc = best_auc(model, *inputs, epochs=epochs)
    dense_weights = sum(one.numel() for name, one in model.named_parameters() if "embedding_bags" not in name)
    return [auc, float(dense_weights), (time.perf_counter() - start) / epochs]


def main(options: Options) -> None:
    """Print a line per width, scale and kind of field."""
    torch.set_num_threads(1)
    lines = []
    for width in options.widths:
        for scaled in (False, True):
            for one_field in (True, False):
                found = []
                for seed in range(options.seeds):
                    rows = generate(options.rows, width, seed)
                    found.append(train(*rows, one_field=one_field, scaled=scaled, seed=seed, epochs=options.epochs))
                auc, weights, seconds = zip(*found, strict=True)
                kind = "one, linear map" if one_field else f"{width}, one per number"
                scale = "standard" if scaled else "none"
                lines.append(
                    [str(width), scale, kind, with_deviation(auc), f"{weights[0]:,.0f}", f"{min(seconds):.1f}"]
                )
    print(markdown(["width", "transform", "fields", "validation AUC", "dense weights", "s per epoch"], lines))


if __name__ == "__main__":
    main(tyro.cli(Options))
