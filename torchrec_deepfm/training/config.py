"""The options of a training; ``recipes.py`` has named sets of them."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from torchrec_deepfm.errors import UserError, check_range, flag
from torchrec_deepfm.sharding.inputs.sharding_types import Qcomms, SparseOptimizer

Activation = Literal["relu", "tanh", "sigmoid", "gelu", "silu"]
Precision = Literal["float32", "medium", "bf16"]
CompileDense = Literal["off", "default", "reduce-overhead"]
Metric = Literal["auc", "logloss", "auc-logloss"]
ClipEmbedding = Literal["none", "cowclip"]
_CHOICES = {
    "activation": get_args(Activation),
    "sparse_optimizer": get_args(SparseOptimizer),
    "precision": get_args(Precision),
    "metric": get_args(Metric),
    "clip_embedding": get_args(ClipEmbedding),
}
_PENALTIES = (
    "embedding_l2",
    "linear_l2",
    "touched_embedding_l2",
    "touched_linear_l2",
    "embedding_weight_decay",
    "over_arch_l2",
    "clip_norm",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained."""

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


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """How it is trained."""

    epochs: int = 1
    """Passes over the training split."""
    batch_size: int = 2048
    """Samples per step and rank. A GPU is faster with 8192 or more: launching the kernels takes longer than 2048 do."""
    sparse_optimizer: SparseOptimizer = "rowwise_adagrad"
    """Optimizer of the tables, fused into the backward pass; adam is not: it steps on all rows, seen or not, of tables
    that every rank has, or of this rank's shards where --constraint or --plan shards them by whole rows."""
    sparse_lr: float = 0.02
    """Learning rate of the tables."""
    dense_lr: float = 1e-3
    """Learning rate of everything else, and of data_parallel tables: Adam."""
    warmup: float = 0.0
    """Share of the steps during which the learning rates rise linearly from zero."""
    decay: float = 0.0
    """Share of the steps, the last ones, during which the learning rates fall to zero."""
    decay_power: float = 2.0
    """Power of the polynomial by which they fall."""
    clip_norm: float = 0.0
    """Largest norm of the gradient of everything that is not fused, all together; 0: no limit."""
    clip_embedding: ClipEmbedding = "none"
    """cowclip (arXiv 2204.06240), for large batches: the gradient of a row's latent vector v is at most as long as
    n max(ratio ||v||, bound), where n samples of the batch look the row up."""
    cowclip_ratio: float = 1.0
    """The ratio of cowclip."""
    cowclip_bound: float = 1e-5
    """The bound of cowclip."""
    precision: Precision = "float32"
    """float32; float32 with bfloat16 matrix products inside (medium); or bfloat16 autocast of the MLP."""
    seed: int = 0
    """Seed of the initial weights, the dropout and the order of the samples."""


@dataclass(frozen=True, kw_only=True)
class RegularizationConfig:
    """Penalties, and the moving average of the weights."""

    embedding_l2: float = 0.0
    """L2 penalty of the latent vectors, whole tables at each step: lambda/2 ||v||^2. Wants --sparse-optimizer adam."""
    linear_l2: float = 0.0
    """The same of the first-order weights w."""
    touched_embedding_l2: float = 0.0
    """L2 penalty of the latent vectors that a batch looks up, per sample, whatever optimizer trains the tables."""
    touched_linear_l2: float = 0.0
    """The same of the first-order weights."""
    embedding_weight_decay: float = 0.0
    """Decoupled weight decay of whole tables, whatever optimizer trains them: each step ends with all rows times
    1 - rate * lambda. A pass over the tables at each step."""
    over_arch_l2: float = 0.0
    """L2 penalty of the MLP's weights, not of its biases and batch normalisation."""
    ema: float = 0.0
    """Decay of the moving average of the weights, with which to evaluate and to end, in [0, 1); 0: none."""
    ema_every: int = 1
    """Steps between two updates of the moving average, fewer than the 1 / (1 - d) over which it averages."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When to evaluate, and what follows from it."""

    eval_every: int = 0
    """Steps between evaluations on the validation split; 0: after each epoch."""
    metric: Metric = "auc"
    """Metric of the validation split that says which evaluation is the best; auc-logloss is their difference."""
    patience: int = 0
    """Evaluations in a row without a better one after which to stop and go back to the best; 0: never."""
    lr_patience: int = 0
    """Evaluations in a row without a better one after which the learning rates drop; 0: never."""
    lr_factor: float = 0.1
    """What the learning rates are multiplied by then, in (0, 1)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and how much to keep."""

    checkpoint_every: int = 0
    """Steps between checkpoints; 0: after each epoch."""
    keep_last: int = 2
    """Checkpoints to keep, besides the one of the best evaluation."""


@dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """What limits where the tables go, and how their rows travel."""

    data_parallel_rows: int = 0
    """Tables of at most so many rows are replicated on every rank and trained by Adam."""
    qcomms: tuple[Qcomms, ...] = ("fp32",)
    """How pooled rows and their gradients travel between GPUs: one precision for both, or one each."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    PlannerConfig, CheckpointConfig, EvaluationConfig, RegularizationConfig, OptimizationConfig, ModelConfig
):
    """Model and training options. The defaults are the paper's where the paper has one.

    Raises:
        UserError: a value has another type or is out of its range; the message names the option.
    """

    def __post_init__(self) -> None:
        """Check the types, and the ranges that the model does not check itself."""
        for option, hint in _hints().items():  # values of files and recipes are unchecked
            object.__setattr__(self, option, _coerce(option, getattr(self, option), hint))
        for option in ("epochs", "batch_size", "factor_dim", "keep_last", "ema_every"):
            check_range(option, getattr(self, option), 1)
        for option in ("sparse_lr", "dense_lr", "decay_power", "init_std", "cowclip_ratio", "cowclip_bound"):
            if not 0.0 < getattr(self, option) < math.inf:
                raise UserError("must be greater than 0, and finite", where=f"{flag(option)} {getattr(self, option)}")
        for option in ("eval_every", "data_parallel_rows", "seed", "checkpoint_every", "patience", "lr_patience"):
            if getattr(self, option) < 0:
                raise UserError("must not be negative", where=f"{flag(option)} {getattr(self, option)}")
        for option in _PENALTIES:
            if not 0.0 <= getattr(self, option) < math.inf:
                raise UserError(
                    "must be 0 (off) or greater, and finite", where=f"{flag(option)} {getattr(self, option)}"
                )
        for option, choices in _CHOICES.items():
            if getattr(self, option) not in choices:
                raise UserError(f"choose one of {', '.join(choices)}", where=f"{flag(option)} {getattr(self, option)}")
        if self.embedding_weight_decay * max(self.sparse_lr, self.dense_lr) >= 1.0:
            raise UserError(
                "times the rate it must be below 1",
                where=f"--embedding-weight-decay {self.embedding_weight_decay}",
                remedy="take less, such as 0.1",
            )
        if not 0.0 <= self.ema < 1.0:
            raise UserError(
                "the decay of a moving average lies in [0, 1), such as 0.99",
                where=f"--ema {self.ema}",
                remedy="0 for none",
            )
        self._check_ema_every()
        if len(self.qcomms) not in (1, 2) or not set(self.qcomms) <= set(get_args(Qcomms)):
            raise UserError(
                f"one of {', '.join(get_args(Qcomms))} for pooled rows and gradients, or one for each",
                where=f"--qcomms {' '.join(map(str, self.qcomms))}",
            )
        if not 0.0 < self.lr_factor < 1.0:
            raise UserError("the factor of the rates must lie between 0 and 1", where=f"--lr-factor {self.lr_factor}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError("the probability of dropping a unit lies in [0, 1)", where=f"--dropout {self.dropout}")
        if min(self.warmup, self.decay) < 0.0 or not self.warmup + self.decay <= 1.0:
            raise UserError(
                "these are shares of the training, together at most 1",
                where=f"--warmup {self.warmup} --decay {self.decay}",
            )

    def _check_ema_every(self) -> None:
        every, what = self.ema_every, f"--ema-every {self.ema_every}"
        if every > 1 and not self.ema:
            raise UserError(
                "needs a moving average", where=what, remedy="add --ema, such as 0.99, or leave the option out"
            )
        if every > 1 and every * (1.0 - self.ema) >= 1.0 - 1e-9:  # 10 * (1 - 0.9) is a little less than 1
            raise UserError(
                f"the average of --ema {self.ema} reaches back {1.0 / (1.0 - self.ema):.4g} steps",
                where=what,
                remedy="take fewer between two updates",
            )
        if every > self.eval_every > 0:
            raise UserError(
                f"--eval-every {self.eval_every} would evaluate before the first update",
                where=what,
                remedy="take at most as many",
            )

    @property
    def qcomms_both(self) -> tuple[Qcomms, Qcomms]:
        """Precision of pooled rows, and of their gradients."""
        return self.qcomms[0], self.qcomms[-1]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How one start of a training runs. None of it is part of the model, so it may change from one start to the next.

    Raises:
        UserError: a value is out of its range; the message names the option.
    """

    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the newest intact checkpoint in the run folder; never: refuse a folder that is not empty."""
    checkpoints: str | None = None
    """Folder, or URL such as s3://bucket/run, for the checkpoints. Default: in the run folder."""
    plan: Path | None = None
    """File of a plan that says where the tables go: of the command plan, or the plan.json of a run."""
    hardware: str | None = None
    """What the ranks run on: a preset, or a TOML file such as calibrate writes. The balanced planner then places the
    tables where it predicts faster steps than TorchRec's planner. Default: the GPU's preset; none on CPUs."""
    constraints: Annotated[
        tuple[str | tuple[str, ...], ...],
        tyro.conf.arg(name="constraint", metavar="RULE [RULE ...]"),
        tyro.conf.UseAppendAction,
    ] = ()
    """What the planner may do with a table: C1=row_wise, 't_C*=column_wise:min_partition=8', '>1e6=row_wise'."""
    compile_dense: CompileDense = "off"
    """Compile everything after the look-ups (torch.compile), which is slower on a CPU; reduce-overhead: into CUDA
    graphs. Sums are rounded in another order then, so resume with the same choice."""
    timeout: int = 120
    """Seconds after which a rank without a sign of life has stalled, or a step that also takes 20 times the slowest so
    far. Start, evaluations and checkpoints have half an hour."""
    profile: int = 0
    """Steps to profile after the first ten: a trace for Perfetto and a table of operators, in the folder profile."""
    stop_before_limit: int = 0
    """Seconds before the time limit of a slurm job at which to save and stop (exit code 143); 0: never."""
    watch: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Show the curves in MLflow and Weights & Biases too, as their own environment variables say."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.resume not in ("auto", "never"):
            raise UserError("choose auto or never", where=f"--resume {self.resume}")
        if self.compile_dense not in get_args(CompileDense):
            raise UserError(
                f"choose one of {', '.join(get_args(CompileDense))}", where=f"--compile-dense {self.compile_dense}"
            )
        check_range("timeout", self.timeout, 1)
        check_range("profile", self.profile, 0)
        check_range("stop_before_limit", self.stop_before_limit, 0)

    @property
    def rules(self) -> tuple[str, ...]:
        """All constraints, of every ``--constraint``."""
        return tuple(rule for one in self.constraints for rule in ((one,) if isinstance(one, str) else one))


@functools.cache
def _hints() -> Mapping[str, Any]:
    return get_type_hints(TrainConfig)


def _coerce(option: str, value: Any, hint: Any) -> Any:
    """Convert an option's value to its type: a list to a tuple, numpy's numbers to Python's."""
    try:
        if hint is int and isinstance(value, Integral) and not isinstance(value, bool):
            return int(value)
        if hint is float and isinstance(value, Real) and not isinstance(value, bool):
            return float(value)
        wanted: Any = bool if hint is bool else str if get_origin(hint) is Literal else None
        if wanted is not None and isinstance(value, wanted):
            return value
        if get_origin(hint) is tuple and isinstance(value, list | tuple):
            return tuple(_coerce(option, one, get_args(hint)[0]) for one in value)
    except OverflowError:  # an integer too large for a float
        pass
    shown = " ".join(repr(value).split())  # the repr of an array has several lines
    raise UserError(f"must be {_describe_type(hint)}", where=f"{flag(option)} {shown:.60}")


def _describe_type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return "a tuple of " + ("names: " + ", ".join(get_args(inner)) if inner is not int else "whole numbers")
    return {int: "a whole number", float: "a number", bool: "True or False"}[hint]
