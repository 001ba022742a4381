"""The arrays that an exported model takes, from encoded rows, and their checks. No torch.

Shape letters as in ``graph.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.data.prepare.row_encoder import EncodedRows
from torchrec_deepfm.errors import UserError

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """The inputs of an exported model.

    ``dense`` and ``ids`` name the columns of these inputs, ``bags`` the rows of ``lengths``. An id is 0 to
    ``num_embeddings`` minus 1.
    """

    inputs: tuple[str, ...]
    dense: tuple[str, ...]
    ids: tuple[str, ...]
    bags: tuple[str, ...]
    num_embeddings: dict[str, Count]

    def from_rows(self, rows: EncodedRows) -> Arrays:
        """Return the inputs for n rows of ``RowEncoder.encode``; features and ids that do not fit are refused."""
        n, bags = len(rows.dense), [rows.bags[name] for name in self.bags if name in rows.bags]
        if (
            rows.dense.shape[1] != len(self.dense)
            or rows.sparse.shape[1] != len(self.ids)
            or len(bags) < len(self.bags)
        ):
            raise UserError("the encoder is of another run (its columns are not the features of the model)")
        arrays: dict[str, NDArray[Any]] = {"dense": rows.dense, "ids": rows.sparse.astype(np.int64)}
        if bags:
            weights = [np.ones(len(bag.ids), np.float32) if bag.weights is None else bag.weights for bag in bags]
            arrays["values"] = np.concatenate([bag.ids for bag in bags]).astype(np.int64)
            arrays["lengths"] = np.stack([bag.lengths for bag in bags]).astype(np.int64)
            arrays["weights"] = np.concatenate(weights)
            assert arrays["lengths"].shape == (len(bags), n)
        # Writable, as torch warns of other arrays; those of Arrow are not.
        found = {name: np.require(arrays[name], requirements=("C", "W")) for name in self.inputs}
        self.check_ids(found)
        return found

    def check_ids(self, arrays: Arrays) -> None:
        """Check that every id has a row in its table."""
        groups = [(name, arrays["ids"][:, column]) for column, name in enumerate(self.ids)]
        if self.bags:
            ends = np.cumsum(arrays["lengths"].sum(1))[:-1]
            groups += zip(self.bags, np.split(arrays["values"], ends), strict=True)
        for name, ids in groups:
            most = self.num_embeddings[name] - 1
            if len(ids) and not 0 <= (low := int(ids.min())) <= (high := int(ids.max())) <= most:
                wrong = low if low < 0 else high
                raise UserError(
                    f"id {wrong} is not one of 0 to {most}, so the encoder is of another run",
                    where=f"column {name!r}",
                    remedy="restore the run or package",
                )
