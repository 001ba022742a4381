"""The options of ``prepare`` and their ranges."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import tyro

from torchrec_deepfm.errors import UserError, one_of
from torchrec_deepfm.units import parse_bytes

MIN_MEMORY: Final = 1 << 30
MIN_COUNT: Final = 10

Split = Literal["8:1:1", "9:1", "last-day", "none"]
Missing = Literal["value", "rare"]
OnBadRow = Literal["error", "skip"]


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What ``prepare`` makes of the files. None and () stand for the default of the schema, see each option.

    Raises:
        UserError: a value is out of its range, or two do not go together; the message names the option.
    """

    split: Split | None = None
    """How to split the input where no files are given for validation and test: 8:1:1, 9:1 (no validation), last-day
    (halved: validation, test), or none. Default: 8:1:1; for criteo-terabyte last-day."""
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
                raise UserError(f"--{name.replace('_', '-')} {value}: choose {one_of(get_args(choices), value)}")
        if self.min_count is not None and self.min_count < 1:
            raise UserError(f"--min-count {self.min_count}: must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads {self.threads}: must be at least 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: must not be negative")
        if self.memory_bytes < MIN_MEMORY:
            raise UserError(f"--memory {self.memory}: too little; give 1GiB or more")
        if self.hash and self.vocabulary is not None:
            raise UserError("--vocabulary: hashing has none; leave --hash or --vocabulary out")
        if self.hash and self.min_count is not None:
            raise UserError("--min-count: hashing counts nothing; leave --hash or --min-count out")
        if self.hash and self.missing == "value":
            raise UserError("--missing value: hashing gives a missing category id 0; leave --hash or --missing out")
        if self.num_embeddings and not self.hash:
            raise UserError("--num-embeddings: a vocabulary has as many ids as it counts; add --hash, or leave it out")

    @property
    def memory_bytes(self) -> int:
        """``memory`` in bytes."""
        return parse_bytes("--memory", self.memory)
