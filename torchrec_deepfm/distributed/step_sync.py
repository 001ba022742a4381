"""What all ranks have to know at the same step: that one was asked to stop, or has met a loss that is no number."""

from datetime import timedelta

import torch
import torch.distributed as dist

_NEVER = 2**62


class Control:
    """One small exchange per step, which nobody waits for: its result is read at the next one.

    So all ranks learn of a request at the same step, one step after the first of them knew.

    Args:
        timeout: seconds that ranks wait for each other.
    """

    def __init__(self, timeout: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._waiting: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, signum: int, bad_step: int | None) -> tuple[int, int | None]:
        """Tell the others, and hear what had been told at the last exchange; a collective.

        Args:
            signum: the signal that asks this rank to stop, or 0.
            bad_step: the first step whose loss was no number on this rank, if there is one.

        Returns:
            The same of all ranks together, as it was at the exchange before this one.
        """
        heard = self._hear()
        message = torch.tensor([signum, -(_NEVER if bad_step is None else bad_step)])
        work = dist.all_reduce(message, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._waiting = work, message
        return heard

    def now(self, signum: int, bad_step: int | None) -> tuple[int, int | None]:
        """Tell the others and hear at once; a collective.

        Args:
            signum: as for ``exchange``.
            bad_step: as for ``exchange``.

        Returns:
            The same of all ranks together.
        """
        signum_before, bad_before = self.exchange(signum, bad_step)
        signum, bad_step = self._hear()
        return max(signum, signum_before), bad_before if bad_step is None else bad_step

    def _hear(self) -> tuple[int, int | None]:
        if self._waiting is None:
            return 0, None
        (work, message), self._waiting = self._waiting, None
        work.wait()
        signum, negative = (int(value) for value in message.tolist())
        return signum, None if negative == -_NEVER else -negative
