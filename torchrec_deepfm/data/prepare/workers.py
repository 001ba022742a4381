"""The processes that share a ``prepare``: their shares of the work, and where they wait for each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torchrec_deepfm.errors import UserError

T = TypeVar("T")


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True, kw_only=True)
class Workers:
    """One of the processes that work on the same output, in one folder that all of them see.

    ``rank``: 0 to ``count`` - 1. ``gather``: a collective; returns the values of all processes, by rank.
    """

    rank: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = _alone

    @property
    def is_main(self) -> bool:
        """Whether this process does the work that is done once."""
        return self.rank == 0

    def mine(self, work: Sequence[T], weights: Sequence[float]) -> list[T]:
        """Choose this process's share; every process computes the same shares.

        The heaviest first, each to the process with the least.

        Returns this process's part, in the order of ``work``.

        Example:
            >>> Workers(rank=1, count=2).mine("abc", [1.0, 5.0, 3.0])
            ['a', 'c']
        """
        loads = [0.0] * self.count
        owners = {}
        for place in sorted(range(len(work)), key=lambda place: -weights[place]):
            owner = loads.index(min(loads))
            owners[place] = owner
            loads[owner] += weights[place]
        return [work[place] for place in range(len(work)) if owners[place] == self.rank]

    def on_first(self, work: Callable[[], T]) -> T:
        """Do something on the first rank; return its result, or raise its ``UserError``, on all; a collective."""
        outcome: T | UserError | None = None
        if self.is_main:
            try:
                outcome = work()
            except UserError as error:
                outcome = error
        agreed = self.gather(outcome)[0]
        if isinstance(agreed, UserError):
            raise agreed
        return agreed  # type: ignore[no-any-return]
