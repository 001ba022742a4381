"""Update rules of table rows on Frappe, beside Adam over whole tables.

    python -m benchmarks.quality.search.row_rules --output row-rules

DeepFM with the settings of the recipe ``frappe-x1``, one process, no sharding; each rule is written in a few lines of
torch, so that rules which no kernel has can be tried, and two leads of others: label smoothing, and rows drawn anew for
each epoch (MEDA, arXiv 2305.19531). ``decay`` is what ``--embedding-weight-decay`` does; the other rules that also move
rows outside the batch (``whole``, ``shrink``) stand for a kernel that catches up on the missed steps of a row when it
is looked up, and for all rows before an evaluation. Validation split alone; the best epoch counts.

Shapes: N rows of all tables, R columns of a packed row [v (K) | w | padding], B samples, S fields.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from torchrec import EmbeddingBagCollection

from benchmarks._lib.formatting import markdown
from benchmarks._lib.seed_statistics import mean, with_deviation
from benchmarks.quality import datasets
from benchmarks.quality.workers.prepared_arrays import Arrays, Split, score
from torchrec_deepfm import DeepFM, embedding_tables
from torchrec_deepfm.model.fm import init_packed_rows_, packed_dim
from torchrec_deepfm.training.optim.ema import decay_at
from torchrec_deepfm.training.recipes import frappe_x1

_CONFIG: Final = frappe_x1()
_BETAS: Final = (0.9, 0.999)
_EPS: Final = 1e-8


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How rows move in a step.

    Attributes:
        kind: adam and adagrad with a second moment per number; rowwise_ with one per row (the mean of its squares).
        rate: learning rate.
        touched: penalty lambda/2 ||v||^2 per look-up, in the gradient.
        whole: penalty lambda/2 ||row||^2 of all rows at each step, in the gradient: all rows take the step.
        decay: share of itself that every row loses at each step.
        shrink: what every number of every v loses towards 0 at each step.
        row_steps: correct the bias of Adam's moments by the steps that had the row, instead of by all steps.
        smoothing: how far the labels that are learnt lie from 0 and 1 towards 1/2, as a share.
        restart: begin each epoch with new rows and moments; only the MLP goes on.
    """

    kind: Literal["adam", "rowwise_adam", "adagrad", "rowwise_adagrad"]
    rate: float
    touched: float = 0.0
    whole: float = 0.0
    decay: float = 0.0
    shrink: float = 0.0
    row_steps: bool = False
    smoothing: float = 0.0
    restart: bool = False


RULES: Final[dict[str, Rule]] = {
    "Adam, whole tables": Rule(kind="adam", rate=1e-3, whole=0.02),
    "Adam, whole tables, label smoothing": Rule(kind="adam", rate=1e-3, whole=0.02, smoothing=0.05),
    "Adam, whole tables, new rows in each epoch": Rule(kind="adam", rate=1e-3, whole=0.02, restart=True),
    "lazy Adam": Rule(kind="adam", rate=1e-3, touched=0.2),
    "lazy Adam, steps of each row": Rule(kind="adam", rate=1e-3, touched=0.2, row_steps=True),
    "lazy row-wise Adam": Rule(kind="rowwise_adam", rate=1e-3, touched=0.2),
    "lazy Adam, decay": Rule(kind="adam", rate=1e-3, touched=0.2, decay=1e-2),
    "lazy Adam, shrink": Rule(kind="adam", rate=1e-3, touched=0.2, shrink=3e-4),
    "row-wise Adagrad": Rule(kind="rowwise_adagrad", rate=0.02, touched=0.2),
    "row-wise Adagrad, penalty on whole tables": Rule(kind="rowwise_adagrad", rate=0.02, whole=0.02),
    "row-wise Adagrad, shrink": Rule(kind="rowwise_adagrad", rate=0.02, shrink=1e-3),
    "row-wise Adagrad, both": Rule(kind="rowwise_adagrad", rate=0.02, touched=0.2, decay=3e-3),
    "row-wise Adagrad, decay": Rule(kind="rowwise_adagrad", rate=0.02, decay=6e-3),
    "row-wise Adagrad, more decay": Rule(kind="rowwise_adagrad", rate=0.02, decay=1e-2),
    "row-wise Adagrad 0.05, decay": Rule(kind="rowwise_adagrad", rate=0.05, decay=3e-3),
    "row-wise Adagrad 0.05, more decay": Rule(kind="rowwise_adagrad", rate=0.05, decay=1e-2),
}


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Args:
        output: folder for data and results; finished trainings are not repeated.
        rules: names in ``RULES``; default: all.
        extra: more rules, each a JSON object of the fields of ``Rule``.
        seeds: seeds of the trainings.
        epochs: at most.
        shared: folder that contains frappe/.
    """

    output: Path
    rules: tuple[str, ...] = tuple(RULES)
    extra: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    epochs: int = _CONFIG.epochs
    shared: Path = datasets.SHARED


class RowOptimizer:
    """Steps of a rule on the rows of all tables [N, R]."""

    def __init__(self, table: Tensor, rule: Rule) -> None:
        self._table, self._rule, self._steps = table, rule, 0
        self._row_steps = torch.zeros(len(table), 1)
        self._first = torch.zeros_like(table)
        self._second = torch.zeros(len(table), 1) if rule.kind.startswith("rowwise") else torch.zeros_like(table)

    @torch.no_grad()
    def step(self, seen: Tensor, batch: int) -> None:
        """Move the rows by the table's gradient. ``seen``: [N], samples of the batch that look each row up."""
        rule, table, gradient = self._rule, self._table, self._table.grad
        assert gradient is not None
        vectors = table[:, : _CONFIG.factor_dim]
        gradient[:, : _CONFIG.factor_dim] += rule.touched * vectors * (seen / batch).unsqueeze(1)
        gradient += rule.whole * table
        moving = slice(None) if rule.whole else seen.nonzero().squeeze(1)
        self._steps += 1
        self._row_steps[moving] += 1
        g = gradient[moving]
        squares = g.square().mean(dim=1, keepdim=True) if rule.kind.startswith("rowwise") else g.square()
        if rule.kind.endswith("adagrad"):
            self._second[moving] += squares
            table[moving] -= rule.rate * g / (self._second[moving].sqrt() + _EPS)
        else:
            steps = self._row_steps[moving] if rule.row_steps else self._steps
            first = self._first[moving].lerp(g, 1 - _BETAS[0])
            second = self._second[moving].lerp(squares, 1 - _BETAS[1])
            self._first[moving], self._second[moving] = first, second
            root = (second / (1 - _BETAS[1] ** steps)).sqrt() + _EPS
            table[moving] -= rule.rate * first / (1 - _BETAS[0] ** steps) / root
        if rule.decay:
            table *= 1 - rule.decay
        if rule.shrink:
            vectors.copy_(vectors.sign() * (vectors.abs() - rule.shrink).clamp(min=0.0))


def train(arrays: Arrays, rule: Rule, seed: int, epochs: int) -> dict[str, float]:
    """Return the best validation AUC with its log loss and epoch."""
    torch.manual_seed(seed)
    config = _CONFIG
    offsets = np.cumsum([0, *arrays.num_embeddings.values()])
    table = torch.empty(int(offsets[-1]), packed_dim(config.factor_dim))
    init_packed_rows_(table, config.factor_dim, std=config.init_std)
    table.requires_grad_()
    described = embedding_tables(arrays.num_embeddings, config.factor_dim)
    model = DeepFM(
        EmbeddingBagCollection(tables=described, device=torch.device("meta")), 0, config.over_arch_layer_sizes,
        config.factor_dim, dropout=config.dropout, batch_norm=config.batch_norm,
    )  # fmt: skip
    rest = {name: weight for name, weight in model.state_dict(keep_vars=True).items() if not weight.is_meta}
    adam = torch.optim.Adam([one for one in rest.values() if one.requires_grad], lr=config.dense_lr)
    rows = RowOptimizer(table, rule)
    floats = [table, *(one for one in rest.values() if one.is_floating_point())]
    average = [one.detach().clone() for one in floats]
    ids = {name: torch.from_numpy(split.sparse + offsets[:-1]) for name, split in arrays.splits.items()}  # [n, S]
    labels = torch.from_numpy(arrays.splits["train"].labels).float().lerp(torch.tensor(0.5), rule.smoothing)
    best, since, steps = {"auc": 0.0, "logloss": 0.0, "epoch": 0.0}, 0, 0
    for epoch in range(epochs):
        model.train()
        if rule.restart and epoch:
            with torch.no_grad():
                init_packed_rows_(table, config.factor_dim, std=config.init_std)
            rows = RowOptimizer(table, rule)
            average[0].copy_(table)
        order = torch.randperm(len(labels))
        for start in range(0, len(order) - config.batch_size + 1, config.batch_size):
            chosen = order[start : start + config.batch_size]
            looked_up = ids["train"][chosen]
            logits = _logits(model, table, looked_up)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[chosen])
            table.grad = None
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            rows.step(torch.bincount(looked_up.flatten(), minlength=len(table)).float(), len(chosen))
            steps += 1
            with torch.no_grad():
                torch._foreach_lerp_(average, [one.detach() for one in floats], 1 - decay_at(steps, config.ema))
        figures = _evaluate(model, floats, average, ids["validation"], arrays.splits["validation"])
        since += 1
        if figures["auc"] > best["auc"]:
            best, since = figures | {"epoch": epoch + 1}, 0
        if since >= config.patience:
            break
    return best


def _logits(model: DeepFM, table: Tensor, ids: Tensor) -> Tensor:
    rows = torch.nn.functional.embedding(ids, table)[:, :, : model.factor_dim + 1]
    return model.combine(torch.zeros(len(ids), 0), rows).squeeze(1)


@torch.no_grad()
def _evaluate(
    model: DeepFM, floats: list[Tensor], average: list[Tensor], ids: Tensor, split: Split
) -> dict[str, float]:
    """Score the moving average on held-out rows."""
    kept = copy.deepcopy([one.detach() for one in floats])
    for one, other in zip(floats, average, strict=True):
        one.detach().copy_(other)
    model.eval()
    found = torch.cat([_logits(model, floats[0], part).sigmoid() for part in ids.split(8192)])
    for one, other in zip(floats, kept, strict=True):
        one.detach().copy_(other)
    return score(split.labels, found.numpy())


def main(options: Options) -> None:
    """Print a line per training and a table."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    options.output.mkdir(parents=True, exist_ok=True)
    folder = datasets.real("frappe", options.output, options.shared)
    if folder is None:
        raise SystemExit(f"Frappe is not in {options.shared}")
    arrays, file = Arrays.read(folder), options.output / "results.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    rules = [RULES[name] for name in options.rules] + [Rule(**json.loads(text)) for text in options.extra]
    lines = []
    for rule in rules:
        for seed in options.seeds:
            key = f"{rule}, seed {seed}, {options.epochs} epochs"
            if key not in kept:
                kept[key] = train(arrays, rule, seed, options.epochs)
                file.write_text(json.dumps(kept, indent=1), encoding="utf-8")
            print(key, kept[key], flush=True)
        found = [kept[f"{rule}, seed {seed}, {options.epochs} epochs"] for seed in options.seeds]
        figures = [f"{value:g}" for value in (rule.rate, rule.touched, rule.whole, rule.decay, rule.shrink)]
        epochs = "; ".join(f"{one['epoch']:.0f}" for one in found)
        lines.append(
            [rule.kind + (", steps of each row" if rule.row_steps else ""), *figures,
             with_deviation([one["auc"] for one in found], 5), f"{mean([one['logloss'] for one in found]):.4f}", epochs]
        )  # fmt: skip
    head = ["rule", "rate", "touched", "whole", "decay", "shrink", "validation AUC", "logloss", "best epoch"]
    print(markdown(head, lines))


if __name__ == "__main__":
    main(tyro.cli(Options))
