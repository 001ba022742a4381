"""What a training run can be told, and the named recipes. Standard library only.

A recipe is a function that returns a ``TrainConfig``; its docstring says where its values come from. The command line
takes one by name (``--recipe paper``) and any field of it as an option on top (``--dropout 0.2``). Your own recipe is
``dataclasses.replace(paper(), dropout=0.2)``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torchrec_deepfm.errors import UserError

Activation = Literal["relu", "tanh", "sigmoid", "gelu", "silu"]
SparseOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd"]
Precision = Literal["float32", "medium", "bf16"]
Metric = Literal["auc", "logloss"]
_CHOICES = {
    "activation": get_args(Activation),
    "sparse_optimizer": get_args(SparseOptimizer),
    "precision": get_args(Precision),
    "metric": get_args(Metric),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Model and training options. The defaults are the paper's where the paper has one.

    Raises:
        UserError: a value is out of its range; the message names the option.
    """

    factor_dim: int = 10
    """K, the width of the latent vectors."""
    over_arch_layer_sizes: tuple[int, ...] = (400, 400, 400)
    """Hidden layers of the MLP."""
    activation: Activation = "relu"
    """Activation of the MLP."""
    dropout: float = 0.5
    """Probability of dropping a hidden unit of the MLP, in [0, 1)."""
    batch_norm: bool = False
    """Whether the hidden layers of the MLP are batch-normalised."""
    terms: tuple[Literal["linear", "fm", "deep"], ...] = ("linear", "fm", "deep")
    """Terms of the logit: "linear" alone is LR, "linear fm" FM, "deep" the DNN, all three DeepFM."""
    init_std: float = 0.01
    """Standard deviation of the latent vectors at the start."""

    epochs: int = 1
    """Passes over the training split."""
    batch_size: int = 2048
    """Samples per step and rank."""
    sparse_optimizer: SparseOptimizer = "rowwise_adagrad"
    """Optimizer of the tables, fused into the backward pass."""
    sparse_lr: float = 0.02
    """Learning rate of the tables."""
    dense_lr: float = 1e-3
    """Learning rate of everything else, and of data_parallel tables: Adam."""
    data_parallel_rows: int = 0
    """Tables of at most so many rows are replicated on every rank and trained by Adam."""
    warmup: float = 0.0
    """Share of the steps during which the learning rates rise linearly from zero."""
    decay: float = 0.0
    """Share of the steps, the last ones, during which the learning rates fall to zero."""
    decay_power: float = 2.0
    """Power of the polynomial by which they fall."""
    precision: Precision = "float32"
    """float32; float32 with bfloat16 matrix products inside (medium); or bfloat16 autocast of the MLP."""
    eval_every: int = 0
    """Steps between evaluations on the validation split; 0: after each epoch."""
    seed: int = 0
    """Seed of the initial weights, the dropout and the order of the samples."""

    checkpoint_every: int = 0
    """Steps between checkpoints; 0: after each epoch."""
    keep_last: int = 2
    """Checkpoints to keep, besides the one of the best evaluation."""
    metric: Metric = "auc"
    """Metric of the validation split that says which evaluation is the best: auc or logloss."""
    patience: int = 0
    """Evaluations in a row without a better one after which to stop and go back to the best; 0: never."""
    lr_patience: int = 0
    """Evaluations in a row without a better one after which the learning rates drop; 0: never."""
    lr_factor: float = 0.1
    """What the learning rates are multiplied by then, in (0, 1)."""

    def __post_init__(self) -> None:
        """Check the ranges that the model does not check itself."""
        for option in ("epochs", "batch_size", "factor_dim", "keep_last"):
            if getattr(self, option) < 1:
                raise UserError(f"--{option.replace('_', '-')} {getattr(self, option)}: must be at least 1")
        for option in ("sparse_lr", "dense_lr", "decay_power", "init_std"):
            if not 0.0 < getattr(self, option) < math.inf:
                raise UserError(
                    f"--{option.replace('_', '-')} {getattr(self, option)}: must be greater than 0, and finite"
                )
        for option in ("eval_every", "data_parallel_rows", "seed", "checkpoint_every", "patience", "lr_patience"):
            if getattr(self, option) < 0:
                raise UserError(f"--{option.replace('_', '-')} {getattr(self, option)}: must not be negative")
        for option, choices in _CHOICES.items():  # the command line has checked them, a file by hand has not
            if getattr(self, option) not in choices:
                name = option.replace("_", "-")
                raise UserError(f"--{name} {getattr(self, option)}: choose one of {', '.join(choices)}")
        if not 0.0 < self.lr_factor < 1.0:
            raise UserError(f"--lr-factor {self.lr_factor}: what the rates drop by lies between 0 and 1")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"--dropout {self.dropout}: the probability of dropping a unit lies in [0, 1)")
        if min(self.warmup, self.decay) < 0.0 or not self.warmup + self.decay <= 1.0:
            raise UserError(
                f"--warmup {self.warmup} --decay {self.decay}: these are shares of the training, together at most 1"
            )


def paper() -> TrainConfig:
    """The paper's Criteo settings: K = 10, 400-400-400, ReLU, dropout 0.5 (arXiv 1703.04247, section 3.1), Adam 1e-3.

    The paper names Adam for the model and no batch size, rate or number of epochs. Here Adam trains the dense part and
    row-wise Adagrad the tables, since fused kernels on CPU have no Adam; 2 x 2048 a step.
    """
    return TrainConfig()


def smoke() -> TrainConfig:
    """A few seconds on anything: a small MLP, small batches, one epoch. It checks an installation, not quality."""
    return TrainConfig(over_arch_layer_sizes=(32, 32), dropout=0.0, batch_size=256)


def synthetic() -> TrainConfig:
    """What ``make train`` runs: the synthetic set, whose best reachable AUC is known, learnt within a few minutes.

    Found by experiment on that set (docs/results.md). Criteo-like data want a wider MLP; start from ``paper`` there.
    """
    return TrainConfig(
        over_arch_layer_sizes=(128, 64),
        dropout=0.0,
        epochs=3,
        batch_size=1024,
        sparse_lr=0.05,
        dense_lr=3e-3,
        warmup=0.05,
        decay=0.95,
        decay_power=1.0,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {"paper": paper, "smoke": smoke, "synthetic": synthetic}


def recipe(name: str) -> TrainConfig:
    """Look up a named recipe.

    Args:
        name: one of ``RECIPES``.

    Returns:
        Its configuration.

    Raises:
        UserError: there is no such recipe.

    Example:
        >>> recipe("paper").over_arch_layer_sizes
        (400, 400, 400)
    """
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: there is no such recipe; choose one of {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()
