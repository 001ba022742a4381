"""The options of ``prepare`` and their ranges."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import tyro

from torchrec_deepfm.errors import UserError, check_range, flag, one_of
from torchrec_deepfm.units import parse_bytes

MIN_MEMORY: Final = 1 << 30
MIN_COUNT: Final = 10

Split = Literal["8:1:1", "9:1", "last-day", "time", "leave-last-out", "column", "none"]
# Splits that follow from values of the rows, and the option that each needs.
SPLITS_BY_ROW: Final = {"time": "time", "leave-last-out": "user", "column": "split_column"}
_SPAN: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
Missing = Literal["value", "rare"]
OnBadRow = Literal["error", "skip"]


@dataclass(frozen=True, kw_only=True)
class SplitBy:
    """The columns that rows are split by.

    Raises:
        UserError: a value is out of its range; the message names the option.
    """

    time: str | None = None
    """Column with the time of a row: for --split time (the first 8 tenths train, then one each) and leave-last-out.
    With other splits, held-out rows that are earlier than training rows are counted."""
    gap: str = "0"
    """With --split time: rows within this time after the end of a split are left out, such as 1d, 12h or 30m; a plain
    number where the time is one."""
    user: str | None = None
    """Column with the user, for --split leave-last-out: the last rows of each user are for test, those before them
    for validation."""
    leave: int = 1
    """With leave-last-out: rows of each user to leave out for test, and as many for validation."""
    split_column: str | None = None
    """Column for --split column: train, validation or test in each row."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range("leave", self.leave, 1)
        if re.fullmatch(r"(\d+\.?\d*)\s*([smhdw]?)", self.gap) is None:
            raise UserError(
                "not a time", where=f"--gap {self.gap}", remedy="give a number with s, m, h, d or w, such as 1d"
            )

    @property
    def gap_amount(self) -> tuple[float, bool]:
        """The gap: seconds and True where it has a unit, else a number and False."""
        unit = self.gap[-1:] if self.gap[-1:] in _SPAN else ""
        number = float(self.gap.removesuffix(unit).strip())
        return (number * _SPAN[unit], True) if unit else (number, False)

    @property
    def columns(self) -> dict[str, str]:
        """The columns to read, by role."""
        named = {"time": self.time, "user": self.user, "split_column": self.split_column}
        return {role: name for role, name in named.items() if name is not None}


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What ``prepare`` makes of the files. None and () stand for the default of the schema, see each option.

    Raises:
        UserError: a value is out of its range, or two do not go together; the message names the option.
    """

    split: Split | None = None
    """How to split the input where no files are given for validation and test: by random 8:1:1 or 9:1 (no
    validation), last-day (halved: validation, test), time, leave-last-out (of each user), column (which names the
    split), or none. Default: 8:1:1; for criteo-terabyte last-day."""
    split_by: Annotated[SplitBy, tyro.conf.arg(name="")] = SplitBy()
    """The columns that rows are split by."""
    numeric_transform: Annotated[str | None, tyro.conf.arg(name="numeric")] = None
    """What becomes of numbers: log1p, signed_log1p, log (as TorchRec's script), bucketize (extra categories),
    fuxictr (the same as FuxiCTR makes them), or none. Default: what the schema says; else log1p for Criteo, none
    for a table."""
    missing: Missing | None = None
    """A missing category is a value of its own, or has id 0 as rare ones do. With --hash it always has
    id 0. Default: what the schema says; else value."""
    min_count: int | None = None
    """Values seen less often in training share id 0; not with --hash. Default: 10; for criteo-x1 and frappe-x1 1."""
    hash: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Hash values to ids instead of keeping a vocabulary."""
    num_embeddings: tuple[int, ...] = ()
    """With --hash: ids per column, one number for all or one each. Default: 40 million; criteo-terabyte: MLPerf's."""
    vocabulary: Path | None = None
    """Prepared folder whose vocabulary is applied instead of counting one."""
    negative_rate: float = 1.0
    """Share of the negative training rows to keep, in (0, 1]. Probabilities are corrected: train takes care of it."""
    on_bad_row: OnBadRow = "error"
    """Stop at a bad row, or leave it out and list it in the manifest."""
    memory: str = "2GiB"
    """Memory to stay below, per process."""
    seed: int = 0
    """Seed of the split by row."""
    threads: Annotated[int | None, tyro.conf.Suppress] = None
    """CPU threads. Default: all; the command line takes those that this process may use."""

    def __post_init__(self) -> None:
        """Check the ranges, and which options go together."""
        sizes: Any = self.num_embeddings
        object.__setattr__(self, "num_embeddings", (sizes,) if isinstance(sizes, int) else tuple(sizes))
        for name, choices in (("split", Split), ("missing", Missing), ("on_bad_row", OnBadRow)):
            value = getattr(self, name)
            if value is not None and value not in get_args(choices):
                raise UserError(f"choose {one_of(get_args(choices), value)}", where=f"{flag(name)} {value}")
        for split, role in SPLITS_BY_ROW.items():
            if self.split == split and role not in self.split_by.columns:
                raise UserError(f"give the column, {flag(role)} NAME", where=f"--split {split}")
            if self.split != split and role in self.split_by.columns and role != "time":
                raise UserError(f"only valid with --split {split}", where=flag(role), remedy="leave it out")
        if self.split != "time" and self.split_by.gap_amount[0]:
            raise UserError("only valid with --split time", where="--gap", remedy="leave it out")
        check_range("min_count", self.min_count, 1)
        if not 0.0 < self.negative_rate <= 1.0:
            raise UserError("must be greater than 0, and at most 1", where=f"--negative-rate {self.negative_rate}")
        check_range("threads", self.threads, 1)
        if self.seed < 0:
            raise UserError("must not be negative", where=f"--seed {self.seed}")
        if self.memory_bytes < MIN_MEMORY:
            raise UserError("too little", where=f"--memory {self.memory}", remedy="give 1GiB or more")
        if self.hash and self.vocabulary is not None:
            raise UserError("hashing has none", where="--vocabulary", remedy="leave --hash or --vocabulary out")
        if self.hash and self.min_count is not None:
            raise UserError("hashing counts nothing", where="--min-count", remedy="leave --hash or --min-count out")
        if self.hash and self.missing == "value":
            raise UserError(
                "hashing gives a missing category id 0", where="--missing value", remedy="leave --hash or --missing out"
            )
        if self.num_embeddings and not self.hash:
            raise UserError(
                "a vocabulary has as many ids as it counts",
                where="--num-embeddings",
                remedy="add --hash, or leave it out",
            )

    @property
    def memory_bytes(self) -> int:
        """``memory`` in bytes."""
        return parse_bytes("--memory", self.memory)
