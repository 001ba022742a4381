"""What an experiment has measured, and the folder that holds it. Loads no torch.

results.json    this, see ``Experiment``
plans/*.json    the plans, each with its prediction
report.html     all of it as a page
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from torchrec_deepfm.errors import UserError, shown
from torchrec_deepfm.experiment.ranking import Agreement, agreement
from torchrec_deepfm.files import read_text
from torchrec_deepfm.sharding.inputs.hardware import Hardware
from torchrec_deepfm.sharding.inputs.sharding_types import FusedOptimizer
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.plan.io import load_plan
from torchrec_deepfm.sharding.plan.plan import Count, Milliseconds, PlanFile
from torchrec_deepfm.sharding.plan.validate import check_fits
from torchrec_deepfm.strict_json import as_type, parse_json

RESULTS = "results.json"
PLANS = "plans"
_FORMAT: Final = "torchrec_deepfm.experiment"
_VERSION: Final = 1
_MAX_BYTES: Final = 256 * 2**20
_REMEDY: Final = "run the experiment again"

Ids = Literal["zipf", "uniform"]
StepMilliseconds = Annotated[float, Meta(gt=0, le=1e300)]
Positive = Annotated[int, Meta(ge=1, lt=2**31)]


@dataclass(frozen=True, kw_only=True)
class CollectiveBytes:
    """All collectives of one kind in a step, on one rank: the bytes that it put in, and those that left it."""

    calls: Count = 0
    given_bytes: Count = 0
    sent_bytes: Count = 0


@dataclass(frozen=True, kw_only=True)
class RankMeasured:
    """What a plan took on one rank.

    ``step_ms`` has a number per turn, ``split_ms`` the median of each phase (``step_timer.PHASES``) over the steps that
    were split, which are others. ``traffic`` has the collectives of one step by kind. ``peak_bytes`` is above what the
    process had before the model was built: resident memory on a CPU, allocated CUDA memory on a GPU; None where the
    system does not report it.
    """

    rank: Count
    step_ms: Annotated[tuple[StepMilliseconds, ...], Meta(min_length=1)]
    split_ms: Mapping[str, Milliseconds]
    traffic: Mapping[str, CollectiveBytes]
    table_bytes: Count
    peak_bytes: Count | None


@dataclass(frozen=True, kw_only=True)
class PlanMeasured:
    """A plan, its prediction for the experiment's hardware description, and what it took on each rank."""

    name: str
    plan: PlanFile
    ranks: tuple[RankMeasured, ...]

    @property
    def turns_ms(self) -> list[float]:
        """Milliseconds per step in each turn: of the slowest rank, for which all others wait."""
        return [max(turn) for turn in zip(*(rank.step_ms for rank in self.ranks), strict=True)]

    @property
    def step_ms(self) -> float:
        """Milliseconds per step: the median over the turns."""
        return median(self.turns_ms)

    def within_noise_of(self, other: "PlanMeasured") -> bool:
        """Whether the ranges of both plans' turns overlap, so that their order may be noise."""
        mine, theirs = self.turns_ms, other.turns_ms
        return min(mine) <= max(theirs) and min(theirs) <= max(mine)

    @property
    def predicted_ms(self) -> float | None:
        """The predicted critical path, if there is a prediction."""
        return None if self.plan.predicted is None else self.plan.predicted.critical_path_ms


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all plans of an experiment have in common; ``steps`` are those of a turn."""

    tables: tuple[Table, ...]
    ranks: Positive
    local_ranks: Positive
    batch_size: Positive
    steps: Positive
    turns: Positive
    optimizer: FusedOptimizer
    over_arch_layer_sizes: tuple[Positive, ...]
    ids: Ids
    seed: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment: plans that were predicted and measured, in the order in which they were asked for.

    ``left_out`` has plans that could not be made, with the reason; ``scaling``, by number of ranks, the milliseconds
    predicted for the plan that the search finds there.
    """

    settings: Settings
    plans: tuple[PlanMeasured, ...]
    hardware: Hardware
    left_out: Mapping[str, str]
    scaling: Mapping[int, float]
    made_at: str
    made_with: Mapping[str, str]

    def agreement(self) -> Agreement | None:
        """How well the predictions order the plans; None where nothing was predicted."""
        pairs = self.predicted_and_measured()
        if not pairs:
            return None
        names = [one.name for one in self.plans if one.predicted_ms is not None]
        return agreement(names, *zip(*pairs, strict=True))

    def predicted_and_measured(self) -> list[tuple[float, float]]:
        """Milliseconds per step of each plan that has a prediction."""
        return [(one.predicted_ms, one.step_ms) for one in self.plans if one.predicted_ms is not None]

    def mean_error(self) -> float:
        """Mean of |predicted - measured| / measured over the plans that have a prediction."""
        pairs = self.predicted_and_measured()
        return sum(abs(predicted / measured - 1.0) for predicted, measured in pairs) / len(pairs)

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``results.json``."""
        found = self.agreement()
        return {
            "format": _FORMAT,
            "format_version": _VERSION,
            "made_at": self.made_at,
            "made_with": dict(self.made_with),
            "settings": asdict(self.settings),
            "hardware": self.hardware.to_json(),
            "agreement": None if found is None else asdict(found),
            "plans": [
                {
                    "name": one.name,
                    "file": f"{PLANS}/{one.name}.json",
                    "predicted_ms": one.predicted_ms,
                    "step_ms": one.step_ms,
                    "ranks": [asdict(rank) for rank in one.ranks],
                }
                for one in self.plans
            ],
            "left_out": dict(self.left_out),
            "scaling": [{"ranks": ranks, "predicted_ms": value} for ranks, value in self.scaling.items()],
        }


@dataclass(frozen=True, kw_only=True)
class _PlanEntry:
    name: str
    ranks: tuple[RankMeasured, ...]
    file: str
    predicted_ms: Milliseconds | None
    step_ms: StepMilliseconds

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", ".", ".."):
            raise ValueError(f"{self.name!r} is not a valid name of a plan")


@dataclass(frozen=True, kw_only=True)
class _Scaling:
    ranks: Positive
    predicted_ms: Milliseconds


@dataclass(frozen=True, kw_only=True)
class _Results:
    """``results.json`` as it is in the file; the agreement is worked out again from the rest."""

    format: str
    format_version: int
    made_at: str
    made_with: Mapping[str, str]
    settings: Settings
    hardware: Hardware
    agreement: Any
    plans: Annotated[tuple[_PlanEntry, ...], Meta(min_length=1)]
    left_out: Mapping[str, str]
    scaling: tuple[_Scaling, ...]


def read_experiment(folder: Path) -> Experiment:
    """Read the folder of an experiment, or its ``results.json``."""
    path = folder if folder.name == RESULTS else folder / RESULTS
    text = read_text(path, most=_MAX_BYTES, what=RESULTS, instead="name a folder that experiment wrote")
    raw = parse_json(text, where=str(path), remedy=_REMEDY)
    if not isinstance(raw, dict) or raw.get("format") != _FORMAT:
        raise UserError("not the results of an experiment", where=path, remedy="name a folder that experiment wrote")
    if raw.get("format_version") != _VERSION:
        raise UserError(
            f"format version {shown(raw.get('format_version'))}, but this version of torchrec_deepfm reads {_VERSION}",
            where=path,
            remedy=_REMEDY,
        )
    found = as_type(raw, _Results, where=str(path), remedy=_REMEDY)
    ranks, turns = found.settings.ranks, found.settings.turns
    plans = []
    for entry in found.plans:
        plan = load_plan(path.parent / PLANS / f"{entry.name}.json")
        check_fits(plan, found.settings.tables, ranks, where=f"{path}: plan {entry.name}")
        if [one.rank for one in entry.ranks] != list(range(ranks)):
            raise UserError(
                f"plan {entry.name} has {len(entry.ranks)} ranks, not {ranks} in order", where=path, remedy=_REMEDY
            )
        if wrong := next((one for one in entry.ranks if len(one.step_ms) != turns), None):
            raise UserError(
                f"plan {entry.name} has {len(wrong.step_ms)} turns, not {turns}", where=path, remedy=_REMEDY
            )
        plans.append(PlanMeasured(name=entry.name, plan=plan, ranks=entry.ranks))
    return Experiment(
        settings=found.settings,
        plans=tuple(plans),
        hardware=found.hardware,
        left_out=found.left_out,
        scaling={one.ranks: one.predicted_ms for one in found.scaling},
        made_at=found.made_at,
        made_with=found.made_with,
    )
