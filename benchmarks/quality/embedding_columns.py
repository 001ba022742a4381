"""A list of numbers as one field by a linear map, or as a field per number: validation AUC, weights and seconds.

A planted truth: the click rate of a user and an item follows from ``<A e_item, b_user> + <c, e_item>``, where e is the
item's embedding and only it is known of the item. A fifth of the items have no row in training.

Shape letters: n rows, E width of the embeddings, T rank of A.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor

from benchmarks._lib.formatting import markdown
from benchmarks._lib.seed_statistics import with_deviation
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


@dataclass(frozen=True)
class Rows:
    """n users, embeddings [n, E] and labels."""

    users: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    labels: NDArray[np.float32]


def generate(rows: int, width: int, seed: int) -> tuple[Rows, Rows]:
    """Draw training and validation rows."""
    random = np.random.default_rng(seed)
    items = random.normal(size=(_ITEMS, width))
    items /= np.linalg.norm(items, axis=1, keepdims=True)  # as those of text models
    maps, users = random.normal(size=(_RANK, width)), random.normal(size=(_USERS, _RANK))
    first = random.normal(size=width)

    def draw(count: int, last_item: int) -> Rows:
        user, item = random.integers(0, _USERS, count), random.integers(0, last_item, count)
        logits = ((items[item] @ maps.T) * users[user]).sum(axis=1) + items[item] @ first - 1.0
        labels = random.random(count) < 1 / (1 + np.exp(-logits))
        return Rows(user, items[item].astype(np.float32), labels.astype(np.float32))

    return draw(rows, _ITEMS * 4 // 5), draw(rows // 4, _ITEMS)


def train(train_rows: Rows, validation: Rows, *, one_field: bool, scaled: bool, seed: int, epochs: int) -> list[float]:
    """Train a DeepFM; return the best validation AUC, the weights outside of the table, and seconds per epoch."""
    torch.manual_seed(seed)
    width = train_rows.embeddings.shape[1]
    mean, std = (train_rows.embeddings.mean(0), train_rows.embeddings.std(0)) if scaled else (0.0, 1.0)
    tables = EmbeddingBagCollection(tables=embedding_tables({"user": _USERS}, factor_dim=10))
    widths = (width,) if one_field else ()
    model = DeepFM(tables, width, (64, 64), 10, dense_widths=widths, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs = [(torch.from_numpy((rows.embeddings - mean) / std), rows) for rows in (train_rows, validation)]

    def logits(dense: torch.Tensor, users: NDArray[np.int64]) -> torch.Tensor:
        ids = KeyedJaggedTensor.from_lengths_sync(
            ["user"], torch.from_numpy(users), torch.ones(len(users), dtype=torch.int32)
        )
        found: torch.Tensor = model(dense, ids).squeeze(1)
        return found

    aucs, start = [], time.perf_counter()
    for _ in range(epochs):
        model.train()
        dense, rows = inputs[0]
        for chosen in torch.randperm(len(dense)).split(256):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits(dense[chosen], rows.users[chosen.numpy()]), torch.from_numpy(rows.labels[chosen.numpy()])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            dense, rows = inputs[1]
            aucs.append(float(roc_auc_score(rows.labels, logits(dense, rows.users).numpy())))
    dense_weights = sum(one.numel() for name, one in model.named_parameters() if "embedding_bags" not in name)
    return [max(aucs), float(dense_weights), (time.perf_counter() - start) / epochs]


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
