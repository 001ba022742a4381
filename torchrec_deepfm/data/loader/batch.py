"""Copied rows -> a checked batch of TorchRec.

Shape letters: B rows of the batch, I numeric columns, F categorical columns, F1 of them with one id per row.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.row_reader import CopiedBags, CopiedRows, SplitRows
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError

_REPAIR = "the folder is damaged or was not written by prepare; prepare the data again"


class Assembler:
    """Checks every value of a batch and builds its tensors.

    ``source``: the split's rows; it locates a bad value for messages. ``gpu``: the one that batches are for; they are
    then in pinned memory, except for what all of them share, which is on the GPU.
    """

    def __init__(
        self, data: PreparedData, source: SplitRows, batch_size: int, *, gpu: torch.device | None = None
    ) -> None:
        self._data, self._source, self._batch_size = data, source, batch_size
        schema = data.schema
        self._keys = list(schema.categorical)
        self._index_per_key = {key: i for i, key in enumerate(self._keys)}
        self._limits = np.array([data.num_embeddings[key] for key in schema.one_hot], np.uint64)[:, None]
        self._limits32 = self._limits.astype(np.uint32)
        self._modulo = data.external is not None and data.external.modulo
        self._plain = not schema.multi_hot
        # One id per row and key: these parts are the same in every batch; TorchRec would compute them each time.
        self._lengths = torch.ones(len(self._keys) * batch_size, dtype=torch.int32)
        self._offsets = torch.arange(len(self._keys) * batch_size + 1, dtype=torch.int32)
        self._gpu = gpu
        if gpu is not None:  # two thirds of the sparse bytes would else travel there at each step
            self._lengths, self._offsets = self._lengths.to(gpu), self._offsets.to(gpu)
        self._length_per_key = [batch_size] * len(self._keys)
        self._offset_per_key = [batch_size * i for i in range(len(self._keys) + 1)]

    def batch(self, rows: NDArray[np.int64] | range, copied: CopiedRows) -> Batch:
        """Build a batch.

        Returns as ``Loader.batch`` returns.
        """
        dense, labels = copied.dense.astype(np.float32, copy=False), copied.labels
        features = self._features(copied)
        weights = copied.weights
        if (
            features is None
            or not np.isfinite(dense).all()
            or not _all_labels(labels)
            or (weights is not None and not _all_weights(weights))
        ):
            self._report(rows, copied)
        targets = (
            labels.astype(np.int32, copy=False)
            if weights is None
            else np.stack([labels.astype(np.float32), weights], axis=1)
        )
        return Batch(
            dense_features=self._pinned(torch.from_numpy(dense)),
            sparse_features=features,
            labels=self._pinned(torch.from_numpy(targets)),
        )

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor if self._gpu is None else tensor.pin_memory()

    def _features(self, copied: CopiedRows) -> KeyedJaggedTensor | None:
        """The ids key by key; ``None`` if an id or a weight is not valid."""
        by_key = self._one_hot(copied.sparse)  # [F1, B], as a KeyedJaggedTensor wants it
        if by_key is None:
            return None
        if self._plain:
            return KeyedJaggedTensor(
                keys=self._keys,
                values=self._pinned(torch.from_numpy(by_key.reshape(-1))),
                lengths=self._lengths,
                offsets=self._offsets,
                stride=self._batch_size,
                length_per_key=self._length_per_key,
                offset_per_key=self._offset_per_key,
                index_per_key=self._index_per_key,
            )
        bags = {}
        for key, given in copied.bags.items():
            ids = self._reduced(given.ids, self._data.num_embeddings[key])
            if _outside(ids, self._data.num_embeddings[key]).any():
                return None
            if given.weights is not None and not np.isfinite(given.weights).all():
                return None
            bags[key] = replace(given, ids=ids.astype(np.int32, copy=False))
        if self._gpu is None:
            return key_jagged(self._data.schema, by_key, bags, self._batch_size)
        # A GPU computes the offsets from the lengths sooner than they would travel there.
        return key_jagged(self._data.schema, by_key, bags, self._batch_size, offsets=False).pin_memory()

    def _one_hot(self, sparse: NDArray[Any]) -> NDArray[np.int32] | None:
        """[B, F1] -> int32 [F1, B], or ``None`` if an id is not valid."""
        by_key = np.ascontiguousarray(sparse.T)
        if self._modulo:
            for ids, limit in zip(by_key, self._limits[:, 0].tolist(), strict=True):
                ids[:] = self._reduced(ids, limit)
        # As unsigned numbers negative ids are large: one comparison finds both errors.
        wide = by_key.dtype.itemsize == 8
        bad = by_key.view(np.uint64) >= self._limits if wide else by_key.view(np.uint32) >= self._limits32
        if bad.any():
            return None
        return by_key.astype(np.int32, copy=False)

    def _reduced(self, ids: NDArray[Any], num_embeddings: int) -> NDArray[Any]:
        # The remainder from the quotient, ten times as fast in numpy; like %, never negative.
        return ids - ids // num_embeddings * num_embeddings if self._modulo else ids

    def _report(self, rows: NDArray[np.int64] | range, copied: CopiedRows) -> NoReturn:
        """Name the first bad value of a batch."""
        schema, limits = self._data.schema, self._data.num_embeddings
        where, row, column, value, fault = self._first_fault(copied, limits)
        day, inside = self._source.locate(int(rows[row]))
        arrays = self._source.arrays[day]
        files = {"dense": arrays.dense, "sparse": arrays.sparse, "labels": arrays.labels, "row weights": arrays.weights}
        file = files.get(where)
        if file is None:
            bags = arrays.bags[column]
            file = bags.weights if where == "weights" and bags.weights is not None else bags.ids
        assert column in (*schema.dense_names, *schema.categorical, schema.label, schema.weight)
        remedy = _REPAIR if self._data.external is None else "fix the file or remove the day's files"
        raise UserError(f"row {inside}, column {column}: {value} {fault}", where=file.where, remedy=remedy)

    def _first_fault(self, copied: CopiedRows, limits: Mapping[str, int]) -> tuple[str, int, str, Any, str]:
        """(array, row of the batch, column, value, what is wrong) of the first bad value."""
        schema = self._data.schema
        bad = ~np.isfinite(copied.dense.astype(np.float32, copy=False))
        if bad.any():
            i, j = np.argwhere(bad)[0].tolist()
            return "dense", i, schema.dense_names[j], copied.dense[i, j], "is not a finite number"
        for j, key in enumerate(schema.one_hot):
            bad = _outside(self._reduced(copied.sparse[:, j], limits[key]), limits[key])
            if bad.any():
                i = int(np.argmax(bad))
                return "sparse", i, key, copied.sparse[i, j], f"is not an id from 0 to {limits[key] - 1}"
        for key, bags in copied.bags.items():
            owner = np.repeat(np.arange(len(bags.lengths)), bags.lengths)
            bad = _outside(self._reduced(bags.ids, limits[key]), limits[key])
            if bad.any():
                k = int(np.argmax(bad))
                return "ids", int(owner[k]), key, bags.ids[k], f"is not an id from 0 to {limits[key] - 1}"
            if bags.weights is not None and not np.isfinite(bags.weights).all():
                k = int(np.argmin(np.isfinite(bags.weights)))
                return "weights", int(owner[k]), key, bags.weights[k], "is not a finite weight"
        bad = ~((copied.labels == 0) | (copied.labels == 1))
        if bad.any():
            i = int(np.argmax(bad))
            return "labels", i, schema.label, copied.labels[i], "is not a valid label (expected 0 or 1)"
        if copied.weights is not None and not _all_weights(copied.weights):
            i = int(np.argmin(np.isfinite(copied.weights) & (copied.weights >= 0)))
            return "row weights", i, str(schema.weight), copied.weights[i], "is not a weight (expected 0 or more)"
        raise AssertionError("the batch has a bad value, but no part of it has")


def key_jagged(
    schema: Schema, by_key: NDArray[np.int32], bags: Mapping[str, CopiedBags], rows: int, *, offsets: bool = True
) -> KeyedJaggedTensor:
    """Put the ids of all columns, int32 [F1, B] of the one-hot ones and bags of the others, into one tensor.

    It has B bags per column, with weights if any column has some; then an id without one weighs 1. ``offsets``: compute
    them now.
    """
    one_hot, keys = iter(by_key), list(schema.categorical)
    lengths = np.ones((len(keys), rows), np.int32)
    values: list[NDArray[np.int32]] = []
    weights: list[NDArray[np.float32]] = []
    for j, key in enumerate(keys):
        given = bags.get(key)
        if given is not None:
            lengths[j] = given.lengths
        values.append(next(one_hot) if given is None else given.ids)
        if schema.weighted:
            weighed = None if given is None else given.weights
            weights.append(np.ones(len(values[-1]), np.float32) if weighed is None else weighed)
    sizes = [len(ids) for ids in values]
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.from_numpy(np.concatenate(values)),
        weights=torch.from_numpy(np.concatenate(weights)) if schema.weighted else None,
        lengths=torch.from_numpy(lengths.reshape(-1)),
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)) if offsets else None,
        stride=rows,
        length_per_key=sizes,
        offset_per_key=[0, *np.cumsum(sizes).tolist()],
        index_per_key={key: i for i, key in enumerate(keys)},
    )


def _outside(ids: NDArray[Any], limit: int) -> NDArray[np.bool_]:
    return np.asarray(ids.view(f"u{ids.dtype.itemsize}") >= np.uint64(limit)) if ids.size else np.zeros(0, np.bool_)


def _all_labels(labels: NDArray[Any]) -> bool:
    if labels.dtype == np.int32:
        return not (labels.view(np.uint32) > 1).any()
    return bool(((labels == 0) | (labels == 1)).all())


def _all_weights(weights: NDArray[np.float32]) -> bool:
    return bool((np.isfinite(weights) & (weights >= 0)).all())
