"""Predictions by a model whose tables are sharded over the ranks, for tables larger than one process.

Shape letters: B rows of a batch, padding included.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.distributed.planner import ParameterConstraints
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_deepfm.data.loader.batch import key_jagged
from torchrec_deepfm.data.prepare.row_encoder import EncodedRows
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.distributed.process_group import gather, on_main
from torchrec_deepfm.inference.scorer import computing
from torchrec_deepfm.launch.processes import local_world_size
from torchrec_deepfm.model.table_name import table_name
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.checkpoint.manager import restore_model
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run.weights import find_weights

CPU = torch.device("cpu")
# Without cut rows a bag is summed in one place, in the order of its ids: the same bits on any number of ranks.
_WHOLE_ROWS = ["table_wise", "column_wise", "data_parallel"]


def fits_every_rank(run: Path) -> bool:
    """Whether every rank of this host can hold a copy of a run's tables in half of the memory."""
    described = run_folder.read(run)
    width = -(-(described.config.factor_dim + 1) // 4) * 4
    tables = sum(described.num_embeddings.values()) * width * 4
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return tables * local_world_size() <= memory / 2


class ShardedScorer:
    """Scores the rows of all ranks together.

    Args:
        run: The run.
        checkpoint: As for ``load_model``.
        schema: The columns of encoded rows.

    Raises:
        UserError: The checkpoint does not exist or is damaged; on all ranks.
    """

    def __init__(self, run: Path, checkpoint: str | int | None, schema: Schema) -> None:
        described = run_folder.read(run)
        weights = on_main(lambda: find_weights(run, checkpoint))
        # An optimizer without state, as none runs; Adam would replicate every table.
        config = dataclasses.replace(
            described.config, qcomms=("fp32",), sparse_optimizer="sgd", ema=0.0, ema_every=1, embedding_l2=0.0,
            linear_l2=0.0, touched_embedding_l2=0.0, touched_linear_l2=0.0, embedding_weight_decay=0.0,
        )  # fmt: skip
        constraints = {table_name(name): ParameterConstraints(sharding_types=_WHOLE_ROWS) for name in schema.multi_hot}
        sharded = build_model(
            config, described.num_embeddings, described.dense_in_features, CPU, dense_widths=described.widths,
            is_weighted=described.weighted, constraints=constraints,
        )  # fmt: skip
        restore_model(sharded.model, weights)
        self.schema, self._precision = schema, described.config.precision
        self._model: Any = get_unwrapped_module(sharded.model.eval()).model

    def logits(self, rows: EncodedRows | None) -> NDArray[np.float32]:
        """Return the logits of this rank's rows, float32 [n]; a collective.

        Args:
            rows: n rows; ``None`` if this rank has none while others have some.
        """
        batches = [] if rows is None else list(rows.batches())
        sizes = gather([len(batch) for batch in batches])
        found = []
        for step in range(max(map(len, sizes))):
            own = batches[step] if step < len(batches) else None
            most = max(each[step] for each in sizes if step < len(each))
            with computing(self._precision, torch.no_grad()):
                looked_up = self._model.sparse_arch(self._padded(own, most))
                if own is not None:  # the same batches as alone, so that every sum is the same
                    dense = torch.from_numpy(np.ascontiguousarray(own.dense))
                    found.append(self._model.combine(dense, looked_up[: len(own)]).float().squeeze(1).numpy())
        return np.concatenate(found) if found else np.empty(0, np.float32)

    def _padded(self, rows: EncodedRows | None, size: int) -> KeyedJaggedTensor:
        """B bags per column; those after the rows are empty."""
        keys, count = list(self.schema.categorical), 0 if rows is None else len(rows)
        if rows is None:
            weights = torch.empty(0) if self.schema.weighted else None
            return KeyedJaggedTensor(
                keys, torch.empty(0, dtype=torch.int32), weights, torch.zeros(len(keys) * size, dtype=torch.int32)
            )
        ids = key_jagged(self.schema, np.ascontiguousarray(rows.sparse.T), rows.bags, count)
        lengths = functional.pad(ids.lengths().view(len(keys), count), (0, size - count)).flatten()
        return KeyedJaggedTensor(keys, ids.values(), ids.weights_or_none(), lengths)
