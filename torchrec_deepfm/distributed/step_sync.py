"""What all ranks must know at the same step: a request to stop, or a loss that is not finite."""

from datetime import timedelta

import torch
import torch.distributed as dist

_NEVER = 2**62


class Control:
    """One small asynchronous exchange per step, whose result is read at the next step.

    All ranks thus see a request at the same step, one step after the first rank received it.

    Args:
        timeout: seconds that ranks wait for each other.
        every: steps between two exchanges of ``after_step``.
    """

    def __init__(self, timeout: float, *, every: int = 1) -> None:
        self._every = every
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._waiting: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, signum: int, bad_step: int | None) -> tuple[int, int | None]:
        """Send this rank's state and return the result of the previous exchange; a collective.

        Args:
            signum: the signal that asks this rank to stop, or 0.
            bad_step: the first step whose loss was not finite on this rank; None without one.

        Returns:
            The same over all ranks, as of the previous exchange.
        """
        received = self._receive()
        message = torch.tensor([signum, -(_NEVER if bad_step is None else bad_step)])
        work = dist.all_reduce(message, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._waiting = work, message
        return received

    def after_step(self, step: int, signum: int, bad_step: int | None) -> tuple[int, int | None]:
        """Do what ``exchange`` does, at each ``every``-th step; a collective there. Others learn of nothing.

        Args:
            step: steps done, the same on every rank.
            signum: as for ``exchange``.
            bad_step: as for ``exchange``.

        Returns:
            As ``exchange``.
        """
        return (0, None) if step % self._every else self.exchange(signum, bad_step)

    def now(self, signum: int, bad_step: int | None) -> tuple[int, int | None]:
        """Send this rank's state and wait for the result; a collective.

        Args:
            signum: as for ``exchange``.
            bad_step: as for ``exchange``.

        Returns:
            The same over all ranks.
        """
        signum_before, bad_before = self.exchange(signum, bad_step)
        signum, bad_step = self._receive()
        return max(signum, signum_before), bad_before if bad_step is None else bad_step

    def _receive(self) -> tuple[int, int | None]:
        if self._waiting is None:
            return 0, None
        (work, message), self._waiting = self._waiting, None
        work.wait()
        signum, negative = (int(value) for value in message.tolist())
        return signum, None if negative == -_NEVER else -negative
