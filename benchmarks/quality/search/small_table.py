"""Settings for tables of fewer than a million rows: the search behind the recipe ``small-table``.

    python -m benchmarks.quality.search.small_table --output small-table

Frappe, MovieLens 100K, three splits of the Criteo sample and three generated sets whose chances are products, judged by
validation splits alone. The search starts from ``START``. Each stage trains its candidates, changes to the best
settings so far, with the first seed. The best have the smallest mean gap: the AUC that is missing to the best candidate
of each set, averaged over the sets. The best of all and ``START`` are trained with the other seeds too.
"""

import gc
import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import tyro

from benchmarks._lib.formatting import markdown
from benchmarks._lib.seed_statistics import mean, with_deviation
from benchmarks.quality import datasets
from benchmarks.quality.workers import train_sklearn
from torchrec_deepfm import console
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.distributed.process_group import process_group
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.trainer import train

Settings = dict[str, Any]

_ADAM: Final = {"sparse_optimizer": "adam", "sparse_lr": 1e-3, "ema": 0.99}
# Four are not options. "steps": batches are the largest power of two from 64 to 2,048 with so many steps per epoch.
# "prior" and "linear_prior": the L2 of latent vectors and first-order weights is this over the training rows, as a
# Gaussian prior of one variance, 1 / prior, gives it for any number of rows. "idle_steps": patience is at least so many
# steps, up to 10 epochs, and epochs are at least four times the patience.
START: Final[Settings] = {
    "steps": 64, "over_arch_layer_sizes": (64, 32), "dropout": 0.2, "sparse_lr": 0.05, "epochs": 20, "patience": 2,
}  # fmt: skip
_STRENGTHS: Final = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of logistic regression
_WIDE: Final = {
    "over_arch_layer_sizes": (400, 400, 400), "dropout": 0.2, "batch_norm": False, "factor_dim": 10, "ema": 0.99,
    "embedding_l2": 0.0, "linear_l2": 0.0,
}  # fmt: skip
_ADAGRAD: Final = _WIDE | {"sparse_optimizer": "rowwise_adagrad", "sparse_lr": 0.05, "touched_embedding_l2": 0.05}
_PRIOR: Final = _WIDE | _ADAM | {"touched_embedding_l2": 0.0}
STAGES: Final[dict[str, list[Settings]]] = {
    "optimizer of the tables": [
        {"sparse_lr": 0.02},
        {"ema": 0.99},
        {"ema": 0.99, "touched_embedding_l2": 0.05},
        _ADAM,
        _ADAM | {"embedding_l2": 1e-3, "linear_l2": 1e-3},
        _ADAM | {"embedding_l2": 0.01, "linear_l2": 0.01},
        _ADAM | {"embedding_l2": 0.05, "linear_l2": 0.01},
    ],
    "MLP": [
        {"over_arch_layer_sizes": (400, 400, 400)},
        {"over_arch_layer_sizes": (400, 400, 400), "dropout": 0.5},
        {"over_arch_layer_sizes": (400, 400, 400), "batch_norm": True},
    ],
    "K": [{"factor_dim": 20}],
    "Adam with that MLP": [
        _ADAM | {"embedding_l2": 0.01, "linear_l2": 0.01, "touched_embedding_l2": 0.0},
    ],
    "prior": [
        _ADAGRAD,  # the recipe until 2026-11-29
        _ADAGRAD | {"sparse_lr": 0.02},
        _ADAGRAD | {"sparse_lr": 0.02, "touched_embedding_l2": 0.2},
        *(_PRIOR | {"prior": prior, "linear_prior": prior} for prior in (100, 250, 500, 1000)),
        *(_PRIOR | {"prior": prior, "linear_prior": 25} for prior in (100, 250, 500)),
        _PRIOR | {"prior": 250, "linear_prior": 25, "over_arch_layer_sizes": (64, 32)},
        *(_PRIOR | {"prior": prior, "linear_prior": 25, "steps": 256} for prior in (25, 250, 500)),
    ],
    "c": [
        _PRIOR | {"prior": prior, "linear_prior": 25, "steps": 256, "idle_steps": idle}
        for idle in (0, 600)
        for prior in (10, 25, 50, 100, 250)
    ],
}


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Args:
        output: folder for data and results; finished trainings are not repeated.
        shared: folder that contains frappe/ and criteo/; absent sets are left out.
        atomic: folder with the atomic files of MovieLens 100K; default: those of recbole, fetched with pip.
        seeds: seeds of the trainings.
        finalists: how many are trained with all of them.
        most_epochs: largest number of epochs.
        stages: names in ``STAGES``, to run after ``START``; default: all.
    """

    output: Path
    shared: Path = datasets.SHARED
    atomic: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    finalists: int = 3
    most_epochs: int = 40
    stages: tuple[str, ...] = ()


class Search:
    """Trainings on all sets; each is kept in ``results.json``."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self._options, self._device = options, device
        self._file = options.output / "results.json"
        self.kept: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}
        sample = [datasets.real("criteo-sample", options.output, options.shared, seed=seed) for seed in range(3)]
        found: dict[str, list[Path | None]] = {
            "Frappe": [datasets.real("frappe", options.output, options.shared)],
            "MovieLens": [datasets.movielens(options.output, options.atomic)],
            "Criteo sample": sample,
            "products": [datasets.products(options.output, seed=seed) for seed in range(3)],
        }
        self._folders = {name: [folder for folder in folders if folder] for name, folders in found.items()}
        self._folders = {name: folders for name, folders in self._folders.items() if folders}
        self.sets = {name: [PreparedData.open(folder) for folder in one] for name, one in self._folders.items()}

    def scores(self, settings: Settings, seed: int) -> dict[str, dict[str, float]]:
        """Validation AUC, log loss and seconds on each set, means over its splits."""
        found = {}
        for name, splits in self.sets.items():
            one = [self._train(f"{name} {split}", data, settings, seed) for split, data in enumerate(splits)]
            found[name] = {key: mean([figures[key] for figures in one]) for key in one[0]}
        return found

    def logistic_regression(self) -> dict[str, dict[str, float]]:
        """The same of scikit-learn's, the strength of its penalty chosen by validation AUC on each split."""
        found, file = {}, self._options.output / "logistic_regression.json"
        for name, folders in self._folders.items():
            one = []
            for folder in folders:
                train_sklearn.main(folder, file, {"C": _STRENGTHS, "max_iter": 1000}, 0)
                result = json.loads(file.read_text(encoding="utf-8"))
                one.append(result["validation"] | {"seconds": result["seconds"]})
            found[name] = {key: mean([figures[key] for figures in one]) for key in one[0]}
        return found

    def _train(self, name: str, data: PreparedData, settings: Settings, seed: int) -> dict[str, float]:
        key = json.dumps([name, settings, seed], sort_keys=True)
        if key not in self.kept:
            config = make_config(data.rows("train"), settings, seed)
            config = replace(config, epochs=min(config.epochs, self._options.most_epochs))
            folder = self._options.output / "run"
            shutil.rmtree(folder, ignore_errors=True)
            summary = train(config, data, folder, self._device, show=False, report=False).summary
            gc.collect()
            figures = summary["validation"]
            self.kept[key] = {
                "auc": figures["auc"], "logloss": figures["logloss"], "seconds": summary["train_seconds"],
            }  # fmt: skip
            self._file.write_text(json.dumps(self.kept, indent=1), encoding="utf-8")
        return dict(self.kept[key])


def make_config(rows: int, settings: Settings, seed: int) -> TrainConfig:
    """Return the options of one training on so many rows."""
    changes, batch = dict(settings), 64
    steps, idle_steps = changes.pop("steps"), changes.pop("idle_steps", 0)
    for option, prior in (("embedding_l2", "prior"), ("linear_l2", "linear_prior")):
        if prior in changes:
            changes[option] = changes.pop(prior) / rows
    while batch < 2048 and 2 * batch * steps <= rows:
        batch *= 2
    if idle_steps:
        changes["patience"] = min(max(math.ceil(idle_steps * batch / rows), changes["patience"]), 10)
        changes["epochs"] = max(4 * changes["patience"], changes["epochs"])
    return TrainConfig(batch_size=batch, precision="medium", checkpoint_every=2**31, seed=seed, **changes)


def mean_gaps(scores: list[dict[str, dict[str, float]]]) -> list[float]:
    """Return for each candidate the AUC that is missing to the best of each set, averaged over the sets."""
    best = {name: max(one[name]["auc"] for one in scores) for name in scores[0]}
    return [mean([best[name] - one[name]["auc"] for name in best]) for one in scores]


def main(options: Options) -> None:
    """Print a line per training, the table of the stages and that of the finalists."""
    console.quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    with process_group() as device:
        search = Search(options, device)
        tried, scores, stages = [START], [search.scores(START, options.seeds[0])], ["start"]
        for stage in options.stages or STAGES:
            best = _best(tried, scores)[0]
            for candidate in STAGES[stage]:
                tried.append(tried[best] | candidate)
                stages.append(f"{stage}: {_text(candidate)}, on top of {best}")
                scores.append(search.scores(tried[-1], options.seeds[0]))
                print(len(tried) - 1, stages[-1], *(f"{one['auc']:.5f}" for one in scores[-1].values()), flush=True)
        lines = [
            [number, stage, *(f"{one['auc']:.4f}, {one['logloss']:.4f}" for one in score.values()), f"{gap:.4f}",
             f"{sum(one['seconds'] for one in score.values()):.0f}"]
            for number, (stage, score, gap) in enumerate(zip(stages, scores, mean_gaps(scores), strict=True))
        ]  # fmt: skip
        peer = search.logistic_regression()
        lines.append(
            ["", "logistic regression", *(f"{one['auc']:.4f}, {one['logloss']:.4f}" for one in peer.values()), "", ""]
        )
        print(markdown(["", "settings", *search.sets, "mean gap", "s"], lines), flush=True)
        lines = []
        for number in [*_best(tried, scores)[: options.finalists], 0]:
            all_seeds = [search.scores(tried[number], seed) for seed in options.seeds]
            aucs = [[one[name]["auc"] for one in all_seeds] for name in search.sets]
            losses = [mean([one[name]["logloss"] for one in all_seeds]) for name in search.sets]
            cells = [f"{with_deviation(auc)}, {loss:.4f}" for auc, loss in zip(aucs, losses, strict=True)]
            lines.append([number, *cells, f"{mean([mean(auc) for auc in aucs]):.5f}"])
            print(*lines[-1], flush=True)
        print(markdown(["", *search.sets, "mean AUC"], lines))


def _best(tried: list[Settings], scores: list[dict[str, dict[str, float]]]) -> list[int]:
    """Numbers of the candidates, the best first."""
    gaps = mean_gaps(scores)
    return sorted(range(len(tried)), key=lambda number: gaps[number])


def _text(changes: Settings) -> str:
    return ", ".join(f"{key} {value}" for key, value in changes.items())


if __name__ == "__main__":
    main(tyro.cli(Options))
