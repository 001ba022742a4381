"""Dynamic batching: requests that wait are scored together, one batch at a time, in the order in which they came."""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

# A batch that takes less is scored by the event loop itself. In a thread it takes several times as long under load:
# every call of a library gives up Python's lock, which the event loop then keeps.
_SHORT_SECONDS: Final = 0.05
_REMEMBERED: Final = 8


class QueueFullError(Exception):
    """So many rows wait already that no more are taken."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    rows: int
    payload: Any
    key: Hashable
    arrived: float
    answer: "asyncio.Future[Any]" = field(compare=False)


class Batcher:
    """Collects payloads into batches.

    A batch starts when ``rows`` are together, or when its first payload has waited for ``wait``; payloads that came
    while the batch before was scored have often waited long enough.

    Args:
        call: Given the payloads of a batch, returns an answer for each; or an exception in its place. Runs in a thread
            of its own, unless batches of about as many rows, with a key, took less than 50 ms before.
        rows: Rows of a batch, unless a single payload has more.
        wait: Seconds.
        queue_rows: Rows that may wait; but a payload of any size is taken by an empty queue.
        observe: Called with the rows of every batch.

    Attributes:
        waiting: Rows that wait.
        unanswered: Payloads that wait or are being scored.
    """

    def __init__(
        self,
        call: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        rows: int,
        wait: float,
        queue_rows: int,
        observe: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self._call, self._batch_rows, self._wait, self._queue_rows = call, rows, wait, queue_rows
        self._observe = observe
        self._jobs: deque[_Job] = deque()
        self._seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._changed = asyncio.Event()
        self._closing = False
        self._thread = ThreadPoolExecutor(1, "model")
        self._worker = asyncio.create_task(self._work())
        self.waiting = 0
        self.unanswered = 0

    async def submit(self, payload: Any, rows: int, key: Hashable = None) -> Any:
        """Wait for the answer to a payload of some rows; payloads with the same key, not ``None``, may share a batch.

        Raises what ``call`` returned for it or raised, or QueueFullError where too many rows wait.
        """
        if self._jobs and self.waiting + rows > self._queue_rows:
            raise QueueFullError
        loop = asyncio.get_running_loop()
        job = _Job(rows=rows, payload=payload, key=key, arrived=loop.time(), answer=loop.create_future())
        self._jobs.append(job)
        self.waiting += rows
        self.unanswered += 1
        self._changed.set()
        try:
            return await job.answer
        finally:
            self.unanswered -= 1

    async def close(self) -> None:
        """Answer what waits, then end the thread."""
        self._closing = True
        self._changed.set()
        await self._worker
        self._thread.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._jobs:
                if self._closing:
                    return
                self._changed.clear()
                await self._changed.wait()
            left = self._jobs[0].arrived + self._wait - loop.time()
            if left > 0 and self.waiting < self._batch_rows and not self._closing:
                self._changed.clear()
                try:
                    async with asyncio.timeout(left):
                        await self._changed.wait()
                except TimeoutError:
                    pass
                else:
                    continue
            await self._take_in()
            await self._answer(self._take())

    async def _take_in(self) -> None:
        """Let the event loop read what has arrived, for which it has no time while it scores."""
        before = -1
        while before != len(self._jobs) and self.waiting < self._batch_rows:
            before = len(self._jobs)
            for _ in range(2):  # reads a socket, then runs its request
                await asyncio.sleep(0)

    def _take(self) -> list[_Job]:
        """The jobs of the next batch; those whose client has given up are dropped."""
        batch: list[_Job] = []
        rows = 0
        while self._jobs:
            job = self._jobs[0]
            wanted = not job.answer.done()
            if batch and wanted:
                together = job.key is not None and job.key == batch[0].key
                if not together or rows + job.rows > self._batch_rows:
                    break
            self._jobs.popleft()
            self.waiting -= job.rows
            if wanted:
                batch.append(job)
                rows += job.rows
        return batch

    async def _answer(self, batch: list[_Job]) -> None:
        if not batch:
            return
        rows = sum(job.rows for job in batch)
        self._observe(rows)
        payloads, taken = [job.payload for job in batch], self._seconds[rows.bit_length()]
        start = time.perf_counter()
        try:
            if batch[0].key is not None and taken and min(taken) < _SHORT_SECONDS:
                answers = self._call(payloads)
            else:
                answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._call, payloads)
        except Exception as error:
            answers = [error] * len(batch)
        if batch[0].key is not None:
            taken.append(time.perf_counter() - start)
        for job, answer in zip(batch, answers, strict=True):
            if job.answer.done():  # its client has given up meanwhile
                continue
            if isinstance(answer, Exception):
                job.answer.set_exception(answer)
            else:
                job.answer.set_result(answer)
