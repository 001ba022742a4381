"""The prepared folder -> batches of TorchRec, the rows of each batch split over ranks.

Shape letters: B batch size per rank, W ranks, N rows of the split, I numeric columns.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.datasets.utils import Batch

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.batch import Assembler
from torchrec_deepfm.data.loader.epoch_order import EpochOrder
from torchrec_deepfm.data.loader.row_reader import SplitRows
from torchrec_deepfm.errors import UserError

STATE_VERSION = 1


@dataclass(kw_only=True)
class _Run:
    """One iteration over an epoch, from its start position."""

    order: EpochOrder
    epoch: int
    begin: int  # rows of the epoch's order consumed before it
    yielded: int = 0  # batches of this rank since begin
    window: int = -1  # the window of the order that was last read in
    compared: set[int] = field(default_factory=set)  # windows whose checksums were compared


class Loader:
    r"""Iterates one rank's batches of one split in constant memory.

    An epoch has one global row order (``EpochOrder``). Global batch g is its rows ``[g*W*B, (g+1)*W*B)`` and rank r
    gets the r-th B of them: one rank with batch 2B and two ranks with batch B see the same global batches.

    With ``drop_last`` the last, incomplete global batch is left out. Without, it is padded with rows from the head of
    the order, because all ranks must take the same number of steps with batches of one size. ``valid_rows`` returns how
    many rows of a batch are real. They come first, and over all ranks each row is real exactly once.

    ``state_dict`` holds the position of all ranks, in rows. ``load_state_dict`` resumes from it, on any number of ranks
    and with any batch size. Steps are then counted from that row.

    A multi-hot column has a bag of ids in each row, which may be empty. If one column of the schema has
    weights, all have: those of the others are 1.

    Args:
        data: The opened folder.
        split: ``train``, ``validation`` or ``test``.
        batch_size: B, rows per rank per step.
        rank: This rank, 0 to W - 1.
        world_size: W, the number of ranks.
        shuffle: Block shuffle, different in each epoch; else the order of the files.
        seed: Seed of the shuffle.
        drop_last: Leave out the last, incomplete global batch.
        pin_memory: Store the batches in page-locked memory for faster copies to the current GPU; where each row has one
            id per column, the lengths and offsets, which all batches share, are on the GPU.
        prefetch: Batches that a thread reads ahead; 0 for no thread.

    Raises:
        UserError: An option is out of range, there are fewer rows than ranks, nothing is left after ``drop_last``, or
            an array does not fit the manifest. While iterating: an id, number, weight or label is not valid, or a block
            of rows differs from its checksum.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from torchrec_deepfm.data.prepare.prepare import prepare
        >>> from torchrec_deepfm.data.schema import Schema
        >>> schema = Schema(label="click", numeric=("price",), categorical=("user", "item"))
        >>> with TemporaryDirectory() as folder:
        ...     raw = Path(folder, "log.tsv")
        ...     _ = raw.write_text("1\t5\tab\tcd\n0\t\tab\t\n" * 50)
        ...     data = prepare([raw], Path(folder, "data"), schema=schema)
        ...     loader = Loader(data, "train", batch_size=16, shuffle=True)
        ...     loader.set_epoch(1)
        ...     batch = next(iter(loader))
        >>> batch.dense_features.shape, batch.sparse_features.keys(), batch.labels.shape
        (torch.Size([16, 1]), ['user', 'item'], torch.Size([16]))
        >>> loader.state_dict()["epoch"], loader.state_dict()["row"]
        (1, 16)
    """

    def __init__(
        self,
        data: PreparedData,
        split: str,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
        prefetch: int = 2,
    ) -> None:
        self._batch_size, self._rank = batch_size, rank
        self._rows = data.rows(split)
        self._global = world_size * batch_size
        if batch_size < 1:
            raise UserError(f"{batch_size} is less than 1", where="--batch-size", remedy="give 1 or more")
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} of {world_size} ranks does not exist", remedy="give 0 to world_size - 1")
        if seed < 0:
            raise UserError(f"{seed} is negative", where="--seed", remedy="give 0 or more")
        if prefetch < 0:
            raise UserError(f"{prefetch} is negative", where="prefetch", remedy="give 0 or more")
        if self._rows == 0:
            raise UserError(f"split {split} is empty", where=data.named, remedy="prepare the data with rows for it")
        if self._rows < world_size:
            raise UserError(
                f"split {split} has {self._rows} rows for {world_size} ranks",
                where=data.named,
                remedy="use fewer ranks or more data",
            )
        if drop_last and self._rows < self._global:
            raise UserError(
                f"split {split} has {self._rows} rows, less than one step of batch size {batch_size} on "
                f"{world_size} ranks",
                where=data.named,
                remedy="lower --batch-size or use fewer ranks",
            )
        if pin_memory and not torch.cuda.is_available():
            raise UserError("no CUDA device found", where="pin_memory", remedy="leave the option off")
        self._shuffle, self._seed, self._drop_last = shuffle, seed, drop_last
        self._pin_memory, self._prefetch = pin_memory, prefetch
        self._source = SplitRows(data, split)
        gpu = torch.device("cuda", torch.cuda.current_device()) if pin_memory else None
        self._assembler = Assembler(data, self._source, batch_size, gpu=gpu)
        self._run = self._begin_run(epoch=0, row=0)

    @property
    def batch_size(self) -> int:
        """B."""
        return self._batch_size

    def __len__(self) -> int:
        """Return the number of steps of a whole epoch, the same on every rank."""
        return self._steps(0)

    @property
    def steps_left(self) -> int:
        """Steps from the start of an iteration, row 0 or the loaded position, to the end of the epoch."""
        return self._steps(self._run.begin)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches of the current epoch, from the loaded position on if one was loaded."""
        return self.batches()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, and so the shuffle, of the next iterations.

        A loaded position applies to its own epoch; every other epoch starts at row 0.

        Args:
            epoch: Not negative.

        Raises:
            UserError: The epoch is negative.
        """
        if epoch < 0:
            raise UserError(f"{epoch} is negative", where="epoch", remedy="give 0 or more")
        if epoch != self._run.epoch:
            self._run = self._begin_run(epoch=epoch, row=0)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the ranks after the batches that the newest iteration has yielded.

        Returns:
            ``version``; ``epoch``; ``row``, rows of the epoch's order that all ranks together have consumed, N after
            the last step (including rows that ``drop_last`` leaves out); ``rows``, N; ``seed``; ``shuffle``. It is
            the same on every rank after the same number of steps.
        """
        return self.position(self._run.yielded)

    def position(self, step: int) -> dict[str, Any]:
        """Return the state after some batches of the current epoch, for callers that read ahead.

        Args:
            step: Batches done since row 0 or the loaded position, 0 to ``steps_left``.

        Returns:
            As ``state_dict``.

        Raises:
            IndexError: ``step`` is out of range.
        """
        if not 0 <= step <= self.steps_left:
            raise IndexError(f"step {step} of {self.steps_left}")
        row = self._rows if step == self.steps_left else self._run.begin + step * self._global
        return {
            "version": STATE_VERSION,
            "epoch": self._run.epoch,
            "row": row,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "rows": self._rows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the position of another loader, of any number of ranks and any batch size.

        The next iterations start there, until ``set_epoch`` sets another epoch.

        Args:
            state: What ``state_dict`` or ``position`` returned.

        Raises:
            UserError: The state is damaged, or was copied from another split, seed or order.
        """
        names = ("version", "epoch", "row", "seed", "shuffle", "rows")
        kinds = {name: type(state.get(name)) for name in names}
        if any(kind is not (bool if name == "shuffle" else int) for name, kind in kinds.items()):
            raise UserError(
                f"damaged ({dict(state)})", where="state of the loader", remedy="start the epoch from its beginning"
            )
        if state["version"] != STATE_VERSION:
            raise UserError(
                f"version {state['version']}, this version reads {STATE_VERSION}",
                where="state of the loader",
                remedy="use the version that wrote it",
            )
        current = {"seed": self._seed, "shuffle": self._shuffle, "rows": self._rows}
        for name, value in current.items():
            if state[name] != value:
                raise UserError(
                    f"{name} was {state[name]}, now it is {value}",
                    where="state of the loader",
                    remedy="resume with the same data and options",
                )
        if state["epoch"] < 0 or not 0 <= state["row"] <= self._rows:
            raise UserError(
                f"row {state['row']} of epoch {state['epoch']} does not exist",
                where="state of the loader",
                remedy="start the epoch from its beginning",
            )
        self._run = self._begin_run(epoch=state["epoch"], row=state["row"])

    def valid_rows(self, step: int) -> int:
        """Return how many rows of this rank's batch are real; the rest, at its end, is padding.

        Args:
            step: Number of the batch since row 0 or the loaded position, from 0.

        Returns:
            0 to B; B for all steps except the last.
        """
        return self._valid(self._run, step)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of the current epoch, starting at a step.

        Args:
            start: The first step since row 0 or the loaded position, from 0; earlier batches are not read.

        Yields:
            As ``batch`` returns. With ``prefetch`` a thread reads them; it ends with the iterator.

        Raises:
            UserError: An id, number, weight or label is not valid.
        """
        # A running iteration keeps its order, and no longer sets the position once another one starts.
        run = self._run = self._begin_run(epoch=self._run.epoch, row=self._run.begin, order=self._run.order)
        run.yielded = start
        return self._ahead(run, start) if self._prefetch else self._one_by_one(run, start)

    def batch(self, step: int) -> Batch:
        """Read one batch of the current epoch.

        Args:
            step: Number of the batch since row 0 or the loaded position, 0 to ``steps_left - 1``.

        Returns:
            Dense features float32 [B, I]; sparse features, int32 ids, B bags per key in the schema's order, and
            float32 weights if the schema has any; labels int32 [B], or float32 [B, 2], label and weight, where rows
            have weights.

        Raises:
            UserError: An id, number, weight or label is not valid; the message names file, row and column.
            IndexError: ``step`` is out of range.
        """
        if not 0 <= step < self.steps_left:
            raise IndexError(f"step {step} of {self.steps_left}")
        return self._batch(self._run, step)

    def _begin_run(self, *, epoch: int, row: int, order: EpochOrder | None = None) -> _Run:
        if order is None:
            order = EpochOrder(self._rows, shuffle=self._shuffle, seed=self._seed, epoch=epoch)
        return _Run(order=order, epoch=epoch, begin=row)

    def _steps(self, row: int) -> int:
        left = self._rows - row
        return left // self._global if self._drop_last else -(-left // self._global)

    def _one_by_one(self, run: _Run, start: int) -> Iterator[Batch]:
        for step in range(start, self._steps(run.begin)):
            batch = self._batch(run, step)
            run.yielded = step + 1
            yield batch

    def _ahead(self, run: _Run, start: int) -> Iterator[Batch]:
        # A new thread would use GPU 0, and pinning would create a context on it.
        device = torch.cuda.current_device() if self._pin_memory else None
        # The executor joins its thread at interpreter exit, and ends it when the executor is no longer referenced.
        executor = ThreadPoolExecutor(
            1, thread_name_prefix="loader", initializer=_use_device, initargs=() if device is None else (device,)
        )
        pending: deque[Future[Batch]] = deque()
        try:
            steps = self._steps(run.begin)
            submitted = start
            for step in range(start, steps):
                while submitted < min(step + 1 + self._prefetch, steps):
                    pending.append(executor.submit(self._batch, run, submitted))
                    submitted += 1
                batch = pending.popleft().result()
                run.yielded = step + 1
                yield batch
        finally:
            # No wait: the garbage collector may close this iterator in any thread, including the executor's.
            executor.shutdown(wait=False, cancel_futures=True)

    def _first(self, run: _Run, step: int) -> int:
        return run.begin + step * self._global + self._rank * self._batch_size

    def _valid(self, run: _Run, step: int) -> int:
        return min(max(self._rows - self._first(run, step), 0), self._batch_size)

    def _batch(self, run: _Run, step: int) -> Batch:
        begin, valid = self._first(run, step), self._valid(run, step)
        self._enter_window(run, min(begin, self._rows - 1))
        if valid == self._batch_size and not self._shuffle:
            rows: NDArray[np.int64] | range = range(begin, begin + valid)
            copied = self._source.stretch(begin, begin + valid)
        else:
            rows = run.order[begin : begin + valid]
            if valid < self._batch_size:
                head = run.order[0 : min(self._rows, self._batch_size - valid)]
                rows = np.concatenate([rows, np.resize(head, self._batch_size - valid)])
                self._check(run, 0, len(head))
            self._check(run, begin, begin + valid)
            copied = self._source.take(rows)
        return self._assembler.batch(rows, copied)

    def _check(self, run: _Run, start: int, stop: int) -> None:
        """Compare the checksums of the rows at positions of the order: of whole windows if shuffled."""
        if start < stop and not self._shuffle:
            self._source.check([(start, stop)])
        elif start < stop:
            for window in range(run.order.window_at(start), run.order.window_at(stop - 1) + 1):
                if window not in run.compared:
                    self._source.check(run.order.stretches(window))
                    run.compared.add(window)

    def _enter_window(self, run: _Run, position: int) -> None:
        """Release the pages of the previous window, so that memory stays constant, and fetch the next window's."""
        window = run.order.window_at(position)
        if window != run.window:
            self._source.release()
            if window != run.window + 1:  # it was not fetched ahead
                self._source.fetch(run.order.stretches(window))
            self._source.fetch(run.order.stretches(window + 1))
            run.window = window


def _use_device(device: int | None = None) -> None:
    if device is not None:
        torch.cuda.set_device(device)
