"""The prepared folder -> batches of TorchRec, the rows of each batch shared out over ranks.

Shape letters: B batch size per rank, W ranks, N rows of the split, I numeric columns, F categorical columns.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_deepfm.data.order import EpochOrder
from torchrec_deepfm.data.prepared import DENSE, LABELS, SPARSE, PreparedData
from torchrec_deepfm.errors import UserError

_REPAIR = "the folder is damaged or foreign; prepare the data again"

# dense [n, I], sparse [n, F], labels [n, 1]
_Arrays = tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]


def _take(arrays: _Arrays, rows: NDArray[np.int64]) -> _Arrays:
    """Copy rows; take() does it more than twice as fast as indexing."""
    dense, sparse, labels = arrays
    return dense.take(rows, axis=0), sparse.take(rows, axis=0), labels.take(rows, axis=0)


class Loader:
    r"""Iterates one rank's batches of one split; constant memory, whatever the size of the split.

    An epoch has one global row order (``EpochOrder``). Global batch g is its rows ``[g*W*B, (g+1)*W*B)`` and rank r
    gets the r-th B of them, so that one rank with batch 2B and two ranks with batch B see the same global batches.

    With ``drop_last`` the last, incomplete global batch is left out. Without, it is filled up by rows from the head of
    the order, because all ranks must take the same number of steps with batches of one size; ``valid_rows`` tells how
    many rows of a batch are real. They come first, and over all ranks each row is real exactly once.

    Args:
        data: The opened folder.
        split: ``train``, ``validation`` or ``test``.
        batch_size: B, rows per rank and step.
        rank: This rank, 0 to W - 1.
        world_size: W, the number of ranks.
        shuffle: Block shuffle, another one each epoch; else the order of the files.
        seed: Picks the shuffle.
        drop_last: Leave out the last, incomplete global batch.
        pin_memory: Put the batches into page-locked memory for faster copies to a GPU.

    Raises:
        UserError: An option is out of range, there are fewer rows than ranks, nothing is left after ``drop_last``, or
            an array does not fit the manifest. While iterating: an id, number or label is not valid.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from torchrec_deepfm.data.prepare import prepare
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
    ) -> None:
        self._data, self._batch_size, self._rank = data, batch_size, rank
        self._days = data.days(split)
        self._rows = data.rows(split)
        self._global = world_size * batch_size
        if batch_size < 1:
            raise UserError(f"--batch-size: {batch_size} is too small; give 1 or more")
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} of {world_size} ranks does not exist; give 0 to world_size - 1")
        if seed < 0:
            raise UserError(f"--seed: {seed} is negative; give 0 or more")
        if self._rows < world_size:
            raise UserError(
                f"{data.folder}: split {split} has {self._rows} rows for {world_size} ranks; "
                "use fewer ranks or more data"
            )
        if drop_last and self._rows < self._global:
            raise UserError(
                f"{data.folder}: split {split} has {self._rows} rows, less than one step of batch size {batch_size} on "
                f"{world_size} ranks; lower --batch-size or use fewer ranks"
            )
        if pin_memory and not torch.cuda.is_available():
            raise UserError("pin_memory: there is no CUDA device; leave the option off")
        self._steps = self._rows // self._global if drop_last else -(-self._rows // self._global)
        self._shuffle, self._seed, self._pin_memory = shuffle, seed, pin_memory
        self._arrays = [data.arrays(day) for day in self._days]
        self._starts = np.cumsum([0, *(day.rows for day in self._days)])
        self._keys = list(data.schema.categorical)
        self._limits = np.array([data.num_embeddings[key] for key in self._keys], np.uint32)[:, None]
        # One id per row and key: these parts are the same in every batch, and TorchRec would else compute them anew.
        self._lengths = torch.ones(len(self._keys) * batch_size, dtype=torch.int32)
        self._offsets = torch.arange(len(self._keys) * batch_size + 1, dtype=torch.int32)
        self._length_per_key = [batch_size] * len(self._keys)
        self._offset_per_key = [batch_size * i for i in range(len(self._keys) + 1)]
        self._index_per_key = {key: i for i, key in enumerate(self._keys)}
        self._drop_last, self._start, self._yielded = drop_last, 0, 0
        self.set_epoch(0)

    def __len__(self) -> int:
        """Return the number of steps of an epoch, the same on every rank."""
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches of the current epoch."""
        return self.batches()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the shuffle, of the iterations that start from here on.

        Args:
            epoch: Not negative.

        Raises:
            UserError: The epoch is negative.
        """
        if epoch < 0:
            raise UserError(f"epoch: {epoch} is negative; give 0 or more")
        self._order = EpochOrder(self._rows, shuffle=self._shuffle, seed=self._seed, epoch=epoch)
        self._epoch, self._start, self._yielded = epoch, 0, 0

    @property
    def steps_left(self) -> int:
        """Steps from the loaded position to the end of its epoch."""
        rows = max(self._rows - self._start, 0)
        return rows // self._global if self._drop_last else -(-rows // self._global)

    def position(self, step: int) -> dict[str, Any]:
        """Return the state after ``step`` batches of the current epoch, counted from the point of resumption."""
        row = min(self._start + step * self._global, self._rows)
        state: dict[str, Any] = {"version": 1, "epoch": self._epoch, "row": row, "seed": self._seed}
        return state | {"shuffle": self._shuffle, "rows": self._rows}

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was yielded."""
        return self.position(self._yielded)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Start the next iteration at a saved position.

        Raises:
            UserError: the position is of other data, another seed or another order.
        """
        for name, mine in (("rows", self._rows), ("seed", self._seed), ("shuffle", self._shuffle)):
            if state[name] != mine:
                raise UserError(f"{self._data.folder}: the position is of {name} {state[name]}, here it is {mine}")
        self.set_epoch(state["epoch"])
        self._start = state["row"]

    def valid_rows(self, step: int) -> int:
        """Tell how many rows of this rank's batch are real; the rest, at its end, is filling.

        Args:
            step: Number of the batch in the epoch, from 0.

        Returns:
            0 to B. It is B for all steps but the last.
        """
        return min(max(self._rows - self._start - self._begin(step), 0), self._batch_size)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of the current epoch from a step on.

        Args:
            start: The first step, from 0; nothing before it is read.

        Yields:
            As ``batch`` returns.

        Raises:
            UserError: An id, number or label is not valid.
        """
        order = self._order  # an epoch that has begun ends in its own order
        for step in range(start, self.steps_left):
            batch = self._batch(order, step)
            self._yielded = step + 1
            yield batch

    def batch(self, step: int) -> Batch:
        """Read one batch of the current epoch.

        Args:
            step: Number of the batch in the epoch, 0 to ``len(self) - 1``.

        Returns:
            Dense features float32 [B, I], sparse features with one int32 id per row and key, labels int32 [B].

        Raises:
            UserError: An id, number or label is not valid; the message names file, row and column.
            IndexError: There is no such step.
        """
        if not 0 <= step < self._steps:
            raise IndexError(f"step {step} of {self._steps}")
        return self._batch(self._order, step)

    def _begin(self, step: int) -> int:
        return step * self._global + self._rank * self._batch_size

    def _batch(self, order: EpochOrder, step: int) -> Batch:
        begin, valid = self._start + self._begin(step), self.valid_rows(step)
        rows = order[begin : begin + valid]
        if valid < self._batch_size:
            head = order[0 : min(self._rows, self._batch_size - valid)]
            rows = np.concatenate([rows, np.resize(head, self._batch_size - valid)])
        dense, sparse, labels = self._gather(rows)
        values = np.ascontiguousarray(sparse.T)  # [F, B], as a KeyedJaggedTensor wants it
        # As unsigned numbers, negative ids are large ones: one comparison finds both kinds.
        good = (
            bool(np.isfinite(dense).all())
            and not (values.view(np.uint32) >= self._limits).any()
            and not (labels.view(np.uint32) > 1).any()
        )
        if not good:
            self._report(rows, dense, sparse, labels)
        batch = Batch(
            dense_features=torch.from_numpy(dense),
            sparse_features=KeyedJaggedTensor(
                keys=self._keys,
                values=torch.from_numpy(values.reshape(-1)),
                lengths=self._lengths,
                offsets=self._offsets,
                stride=self._batch_size,
                length_per_key=self._length_per_key,
                offset_per_key=self._offset_per_key,
                index_per_key=self._index_per_key,
            ),
            labels=torch.from_numpy(labels.reshape(-1)),
        )
        return batch.pin_memory() if self._pin_memory else batch

    def _gather(self, rows: NDArray[np.int64]) -> _Arrays:
        """Copy rows (numbered over all days) out of the files: [B, I], [B, F], [B, 1]."""
        if len(self._arrays) == 1:
            return _take(self._arrays[0], rows)
        dense = np.empty((len(rows), len(self._data.schema.numeric)), np.float32)
        sparse = np.empty((len(rows), len(self._keys)), np.int32)
        labels = np.empty((len(rows), 1), np.int32)
        days = np.searchsorted(self._starts, rows, side="right") - 1
        for day in np.unique(days).tolist():
            places = np.flatnonzero(days == day)
            inside = rows[places] - self._starts[day]
            dense[places], sparse[places], labels[places] = _take(self._arrays[day], inside)
        return dense, sparse, labels

    def _report(
        self,
        rows: NDArray[np.int64],
        dense: NDArray[np.float32],
        sparse: NDArray[np.int32],
        labels: NDArray[np.int32],
    ) -> NoReturn:
        """Name the first bad value of a batch."""
        schema = self._data.schema
        checks: list[tuple[str, tuple[str, ...], NDArray[np.float32] | NDArray[np.int32], NDArray[np.bool_], str]] = [
            (DENSE, schema.numeric, dense, ~np.isfinite(dense), "is no finite number"),
            (SPARSE, schema.categorical, sparse, sparse.view(np.uint32) >= self._limits.T, "is no id below"),
            (LABELS, (schema.label,), labels, labels.view(np.uint32) > 1, "is no label, it must be 0 or 1"),
        ]
        for ending, columns, values, bad, fault in checks:
            if not bad.any():
                continue
            i, j = np.argwhere(bad)[0].tolist()
            day = int(np.searchsorted(self._starts, rows[i], side="right")) - 1
            path = self._data.folder / f"{self._days[day].stem}{ending}"
            limit = f" {self._data.num_embeddings[columns[j]]} and not negative" if ending == SPARSE else ""
            where = f"{path}: row {rows[i] - self._starts[day]}, column {columns[j]}"
            raise UserError(f"{where}: {values[i, j]} {fault}{limit}; {_REPAIR}")
        raise AssertionError("a batch that is bad as a whole but not in any part")
