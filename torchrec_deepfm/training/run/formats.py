"""The JSON files of a run and of a checkpoint as typed values; msgspec checks every type and range. No torch."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import read_bytes
from torchrec_deepfm.sharding.plan.io import parse_plan
from torchrec_deepfm.sharding.plan.plan import FORMAT_VERSION
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.monitoring.early_stopping import TrackerState

T = TypeVar("T")

JSON_LIMIT = 64 * 2**20  # bytes
# Steps between two records of the running loss. Reading the loss off a GPU waits for it, so not at each step.
RECORD_EVERY = 20

Count = Annotated[int, Meta(ge=0, le=2**62)]
Positive = Annotated[int, Meta(ge=1, le=2**62)]
Ranks = Annotated[int, Meta(ge=1, le=2**20)]
Seconds = Annotated[float, Meta(ge=0, le=1e18)]  # neither NaN nor infinite
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class RunFile(Struct, kw_only=True):
    """``config.json``, and the same part of a checkpoint's manifest."""

    format_version: Literal[1]
    config: dict[str, Any]
    num_embeddings: dict[str, Positive]
    numeric: list[str]
    widths: list[Positive] = []
    weighted: bool = False
    data_sha256: Digest | None = None
    encoder_sha256: Digest | None = None
    data: str = ""
    world_size: Ranks = 1
    versions: dict[str, str] = {}
    machine: dict[str, str] = {}

    def train_config(self) -> TrainConfig:
        """Return the options; a ``ValueError`` where one is unknown, or its value not allowed."""
        unknown = sorted(set(self.config) - {field.name for field in fields(TrainConfig)})
        if unknown:
            raise ValueError(f"config.{unknown[0]}: unknown option")
        try:
            return TrainConfig(**self.config)
        except UserError as error:
            raise ValueError(f"config: {error}") from error


class Evaluation(Struct, kw_only=True):
    """The metrics of a split."""

    rows: Positive
    logloss: float
    auc: float | None
    ne: float | None
    calibration: float | None
    best_reachable_auc: float | None = None
    lift: float | None = None


class Best(Struct, kw_only=True):
    """The best evaluation of a training."""

    metric: str
    value: float | None
    step: Count | None


class KeptWeights(Struct, kw_only=True):
    """Weights that a finished run keeps, and their figures; see ``weights.py``."""

    step: Count
    folder: Literal["checkpoint", "checkpoint_best", "checkpoint_last"] | None = None
    validation: Evaluation | None = None
    test: Evaluation | None = None


class RunWeights(Struct, kw_only=True):
    """The best and the last weights of a run, and which are its own; the best are None without a validation."""

    own: Literal["best", "last"]
    last: KeptWeights
    best: KeptWeights | None = None


class SummaryFile(Struct, kw_only=True):
    """``summary.json`` of a finished run."""

    samples_per_second: Seconds
    train_seconds: Seconds
    steps: Count
    epochs: Positive
    batch_size: Positive
    world_size: Ranks
    validation: Evaluation | None = None
    test: Evaluation | None = None
    best: Best | None = None
    restored_step: Count | None = None
    warnings: list[str] = []
    weights: RunWeights | None = None


class Bin(Struct, kw_only=True):
    """A point of a reliability curve."""

    low: float
    high: float
    rows: Count
    predicted: float
    observed: float


class CalibrationFile(Struct, kw_only=True):
    """``calibration.json``: the reliability curve of each split."""

    format_version: Literal[1] = 1
    splits: dict[str, list[Bin]] = {}


class SplitCurves(Struct, kw_only=True):
    """The curves of a split; see ``ScoreCurves``."""

    positives: Count
    negatives: Count
    average_precision: float | None
    thresholds: list[float]
    true_positives: list[Count]
    false_positives: list[Count]
    edges: Annotated[list[float], Meta(min_length=2)]
    histogram_positives: list[Count]
    histogram_negatives: list[Count]


class CurvesFile(Struct, kw_only=True):
    """``curves.json``: ROC, precision and recall, and histograms of each split."""

    format_version: Literal[1]
    splits: dict[str, SplitCurves]


class SplitSummary(Struct, kw_only=True):
    """A split in numbers; see ``data_summary``."""

    rows: Count
    positives: Count | None
    sampled: Count
    zero: dict[str, float]


class DataFile(Struct, kw_only=True):
    """``data.json``: the data of a run in numbers."""

    format_version: Literal[1]
    mode: str
    splits: dict[str, SplitSummary]


class FieldImportance(Struct, kw_only=True):
    """How much a field matters; see ``inference.explain.Importance``."""

    field: str
    contribution: float
    auc_loss: float | None


class ImportanceFile(Struct, kw_only=True):
    """``importance.json``: the fields of a run, most important first, and the rows that they were measured on."""

    format_version: Literal[1]
    split: str
    rows: Positive
    fields: list[FieldImportance]


class SavedFile(Struct, kw_only=True):
    """``saved.json``: where the newest checkpoint of a run was saved."""

    format_version: Literal[1]
    checkpoints: str
    step: Count | None


class TrainingPosition(Struct, kw_only=True, forbid_unknown_fields=True):
    """How far a training has come.

    Attributes:
        step: optimizer steps done.
        epoch: the current epoch, from 0; the number of epochs at the end.
        row: rows of the current epoch that all ranks together have seen.
        samples: samples seen by all ranks since the start.
        dropped: rows left out at the ends of epochs, as they were less than a global batch; None in a checkpoint of a
            version that did not count them.
        seconds: spent on training, without evaluations.
        evaluated: False if the evaluation that is due after this step has not been done.
    """

    step: Count = 0
    epoch: Count = 0
    row: Count = 0
    samples: Count = 0
    dropped: Count | None = None
    seconds: Seconds = 0.0
    evaluated: bool = True


class Manifest(RunFile, kw_only=True):
    """The content of ``checkpoint.json`` about a training, without the list of files.

    Attributes:
        step: of the checkpoint.
        point: how far the training has come.
        position: of the loader.
        tracker: of the best evaluation.
        columns: the first columns of the shards of each table.
        random: bytes of each rank's random state.
        losses: steps since the last record.
    """

    step: Count
    world_size: Ranks
    point: TrainingPosition
    position: dict[str, int | bool]
    tracker: TrackerState
    columns: dict[str, Annotated[list[Count], Meta(min_length=1)]]
    random: Annotated[int, Meta(ge=0, le=2**20)]
    losses: Annotated[int, Meta(ge=0, le=RECORD_EVERY)]
    plan: dict[str, Any]
    schema_sha256: Digest

    def __post_init__(self) -> None:
        """Check that both records of the place in the data agree."""
        for name in ("epoch", "row"):
            if self.position.get(name) != getattr(self.point, name):
                raise ValueError(f"point.{name} contradicts position.{name}")

    def check(self, config: TrainConfig, *, rows: int, widths: Mapping[str, int]) -> None:
        """Compare the values with each other and with the training that resumes from them.

        Raises ``ValueError``: two values contradict each other; the message names one of them.
        """
        point = self.point
        done = point.epoch * rows + point.row
        for name, wrong in {
            "point.step": point.step != self.step,
            "point.epoch": point.epoch > config.epochs or point.epoch > point.step,
            "point.row": point.row >= rows or (point.epoch == config.epochs and point.row > 0),
            "point.samples": not point.step <= point.samples <= done or (point.samples > 0 and not point.step),
            "point.dropped": point.dropped is not None and point.samples + point.dropped != done,
            "losses": self.losses > point.step,
            "columns": self.columns.keys() != widths.keys(),
        }.items():
            if wrong:
                raise ValueError(f"{name} contradicts the other values")
        for table, begins in self.columns.items():
            if begins[0] or begins != sorted(set(begins)) or begins[-1] >= widths[table]:
                raise ValueError(f"columns.{table}: {begins} are not the first columns of shards")
        self.tracker.check(config, point.step)
        if self.plan.get("format_version") == FORMAT_VERSION:
            try:
                plan = parse_plan(self.plan, "plan")
            except UserError as error:
                raise ValueError(str(error)) from error
            if plan.world_size != self.world_size:
                raise ValueError("plan.world_size contradicts the other values")


def convert(value: Any, kind: type[T]) -> T:
    """Check a JSON value against a type.

    ``value``: what ``json.loads`` returned. Raises ``ValueError``: a value has another type or is out of its range; the
    message names it.

    Example:
        >>> convert({"step": 3, "seconds": None}, TrainingPosition)
        Traceback (most recent call last):
        ValueError: seconds: expected `float`, got `null`
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        place = where.rstrip("`").lstrip(".")
        raise ValueError(f"{place}: {what[0].lower()}{what[1:]}" if place else what[0].lower() + what[1:]) from error


def read_json(path: Path, kind: type[T]) -> tuple[dict[str, Any], T]:
    """Read a JSON file of a run.

    Returns the raw content and the typed one. Raises ``OSError``: it can't be read, or is not a regular file. Raises
    ``ValueError``: it is not JSON of this type; the message names the value.
    """
    try:
        value = json.loads(read_bytes(path, most=JSON_LIMIT).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value, convert(value, kind)
