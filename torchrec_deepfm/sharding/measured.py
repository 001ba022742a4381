"""What an experiment has measured, and the folder that holds it. No torch.

results.json    this, see ``Experiment``
plans/*.json    the plans, each with what was predicted of it
report.html     all of it as a page
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.agreement import Agreement, agreement
from torchrec_deepfm.sharding.hardware import Hardware
from torchrec_deepfm.sharding.plan import PlanFile
from torchrec_deepfm.sharding.plan_file import check_fits, load_plan
from torchrec_deepfm.sharding.table_list import Table

FORMAT = "torchrec_deepfm.experiment"
FORMAT_VERSION = 1
RESULTS = "results.json"
PLANS = "plans"
OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
IDS = ("zipf", "uniform")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RankMeasured:
    """What a plan took on one rank.

    Attributes:
        step_ms: milliseconds of a step, one number for each turn that the plan had.
        split_ms: milliseconds of each phase (``measure.PHASES``), the median over the steps that were split; they were
            other steps than those of ``step_ms``.
        traffic: for each kind of collective ``calls``, ``given_bytes`` and ``sent_bytes`` of one step.
        table_bytes: what the rank holds of tables and the state of their optimizer.
        peak_bytes: the most memory that the process needed beyond what it had before the model was built: resident
            memory on a CPU, allocated CUDA memory on a GPU; None where the system does not tell.
    """

    step_ms: tuple[float, ...]
    split_ms: Mapping[str, float]
    traffic: Mapping[str, Mapping[str, int]]
    table_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class PlanMeasured:
    """A plan, what was predicted of it, and what it took.

    Attributes:
        name: its name in the experiment.
        plan: the plan; its ``predicted`` is for the experiment's hardware description.
        ranks: rank 0 first.
    """

    name: str
    plan: PlanFile
    ranks: tuple[RankMeasured, ...]

    @property
    def turns_ms(self) -> list[float]:
        """Milliseconds of a step in each turn: of the slowest rank, for which all others wait."""
        return [max(turn) for turn in zip(*(rank.step_ms for rank in self.ranks), strict=True)]

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step: the median over the turns."""
        return median(self.turns_ms)

    @property
    def predicted_ms(self) -> float | None:
        """The critical path that was predicted, where it was."""
        return None if self.plan.predicted is None else self.plan.predicted.critical_path_ms


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all plans of an experiment have in common.

    Attributes:
        tables: each table's name, num_embeddings, embedding_dim, pooling_factor.
        ranks: how many there were.
        local_ranks: of them per host.
        batch_size: samples per rank.
        steps: steps in a turn.
        turns: turns of each plan.
        optimizer: of the tables.
        over_arch_layer_sizes: hidden layers of the dense part.
        ids: how they were drawn: ``zipf`` or ``uniform``.
        seed: of the ids.
        device: ``cpu`` or a GPU's name.
    """

    tables: tuple[Mapping[str, Any], ...]
    ranks: int
    local_ranks: int
    batch_size: int
    steps: int
    turns: int
    optimizer: str
    over_arch_layer_sizes: tuple[int, ...]
    ids: str
    seed: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment: plans that were predicted and measured.

    Attributes:
        settings: what they have in common.
        plans: in the order in which they were asked for.
        hardware: the description that the predictions are for, as its own JSON.
        left_out: plans that could not be made, with the reason.
        scaling: by number of ranks, the milliseconds predicted for the plan that the search finds there.
        made_at: when, UTC.
        made_with: versions of torch, torchrec and this package.
    """

    settings: Settings
    plans: tuple[PlanMeasured, ...]
    hardware: Mapping[str, Any]
    left_out: Mapping[str, str]
    scaling: Mapping[int, float]
    made_at: str
    made_with: Mapping[str, str]

    def agreement(self) -> Agreement | None:
        """How well the predictions order the plans; None where nothing was predicted."""
        told = [(one.name, one.predicted_ms, one.step_ms) for one in self.plans if one.predicted_ms is not None]
        if not told:
            return None
        names, predicted, measured = zip(*told, strict=True)
        return agreement(names, [value for value in predicted if value is not None], measured)

    def to_json(self) -> dict[str, Any]:
        """Return what ``results.json`` holds."""
        found = self.agreement()
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "made_at": self.made_at,
            "made_with": dict(self.made_with),
            "settings": asdict(self.settings),
            "hardware": dict(self.hardware),
            "agreement": None if found is None else found.to_json(),
            "plans": [
                {
                    "name": one.name,
                    "file": f"{PLANS}/{one.name}.json",
                    "predicted_ms": one.predicted_ms,
                    "step_ms": one.step_ms,
                    "ranks": [{"rank": number, **asdict(rank)} for number, rank in enumerate(one.ranks)],
                }
                for one in self.plans
            ],
            "left_out": dict(self.left_out),
            "scaling": [{"ranks": ranks, "predicted_ms": value} for ranks, value in self.scaling.items()],
        }


def read_experiment(folder: Path) -> Experiment:
    """Read the folder of an experiment.

    Args:
        folder: the folder, or its ``results.json``.

    Returns:
        What is in it.

    Raises:
        UserError: there is no such folder, it holds no experiment, or one that is damaged.
    """
    path = folder if folder.name == RESULTS else folder / RESULTS
    folder = path.parent
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: there is no {RESULTS}; name a folder that experiment wrote") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); name a folder that experiment wrote") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); run the experiment again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path}: these are no results of an experiment; name a folder that experiment wrote")
    if raw.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {raw.get('format_version')!r}, this version of torchrec_deepfm reads "
            f"{FORMAT_VERSION}; run the experiment again"
        )
    return _whole(path, lambda: _experiment(raw, path))


def _whole(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path}: damaged ({error} is missing); run the experiment again") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: damaged ({error}); run the experiment again") from error


def _experiment(raw: Mapping[str, Any], path: Path) -> Experiment:
    json.dumps(raw, ensure_ascii=False).encode()  # half of a surrogate pair can't be printed, nor written to a report
    settings, tables = _settings(raw["settings"])
    plans = tuple(_plan_measured(one, path.parent) for one in raw["plans"])
    for one in plans:
        if len(one.ranks) != settings.ranks or one.plan.world_size != settings.ranks:
            raise ValueError(f"plan {one.name} has {len(one.ranks)} ranks, the experiment {settings.ranks}")
        for rank in one.ranks:
            if len(rank.step_ms) != settings.turns:
                raise ValueError(f"plan {one.name} has {len(rank.step_ms)} turns, the experiment {settings.turns}")
        check_fits(one.plan, tables, settings.ranks, where=f"{path}: plan {one.name}")
    if not plans:
        raise ValueError("it holds no plan")
    try:
        Hardware.from_json(raw["hardware"])
    except UserError as error:
        raise ValueError(f"hardware: {error}") from error
    return Experiment(
        settings=settings,
        plans=plans,
        hardware=dict(raw["hardware"]),
        left_out={str(name): str(why) for name, why in raw["left_out"].items()},
        scaling={int(one["ranks"]): _number(one["predicted_ms"], "scaling") for one in raw["scaling"]},
        made_at=str(raw["made_at"]),
        made_with={str(name): str(version) for name, version in raw["made_with"].items()},
    )


def _settings(raw: Mapping[str, Any]) -> tuple[Settings, tuple[Table, ...]]:
    given = dict(raw)
    for name in ("tables", "over_arch_layer_sizes"):
        if not isinstance(given[name], list):
            raise ValueError(f"settings.{name} is {given[name]!r}, no list")
        given[name] = tuple(given[name])
    settings = Settings(**given)
    counts = {name: getattr(settings, name) for name in ("ranks", "local_ranks", "batch_size", "steps", "turns")}
    counts |= {f"over_arch_layer_sizes[{i}]": size for i, size in enumerate(settings.over_arch_layer_sizes)}
    for name, count in counts.items():
        if type(count) is not int or not 1 <= count < 2**31:
            raise ValueError(f"settings.{name} is {count!r}, no whole number from 1 to {2**31 - 1}")
    if type(settings.seed) is not int:
        raise ValueError(f"settings.seed is {settings.seed!r}, no whole number")
    for name, choices in (("optimizer", OPTIMIZERS), ("ids", IDS), ("device", None)):
        text = getattr(settings, name)
        if not isinstance(text, str) or (choices is not None and text not in choices):
            raise ValueError(f"settings.{name} is {text!r}, {f'none of {choices}' if choices else 'no text'}")
    try:
        return settings, tuple(Table(**one) for one in settings.tables)
    except UserError as error:
        raise ValueError(f"settings.tables: {error}") from error


def _plan_measured(raw: Mapping[str, Any], folder: Path) -> PlanMeasured:
    name = raw["name"]
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is no name of a plan")
    return PlanMeasured(
        name=name,
        plan=load_plan(folder / PLANS / f"{name}.json"),
        ranks=tuple(_rank(one, name) for one in raw["ranks"]),
    )


def _rank(raw: Mapping[str, Any], name: str) -> RankMeasured:
    turns = tuple(_number(value, f"step_ms of {name}", above=0.0) for value in raw["step_ms"])
    if not turns:
        raise ValueError(f"step_ms of {name} is empty")
    return RankMeasured(
        step_ms=turns,
        split_ms={phase: _number(value, f"{phase} of {name}") for phase, value in raw["split_ms"].items()},
        traffic={kind: {key: int(count) for key, count in one.items()} for kind, one in raw["traffic"].items()},
        table_bytes=int(raw["table_bytes"]),
        peak_bytes=None if raw["peak_bytes"] is None else int(raw["peak_bytes"]),
    )


def _number(value: Any, what: str, above: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value < math.inf and value > above):
        raise ValueError(f"{what} is {value!r}, no time")
    return float(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
