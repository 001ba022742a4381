"""This project's side of ``speed.py``: the trainer's step, sharded by DMP, through TrainPipelineSparseDist.

    python -m benchmarks.training.steps.step_ours --precision bf16

``speed.py`` starts it and says when to work.
"""

import itertools
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from benchmarks._lib.windows import serve
from benchmarks.training.criteo_rows import arguments, draw
from benchmarks.training.random_criteo import KEYS, build, training_rank


def deepfm(options: Any, device: Any) -> tuple[Any, Any]:
    """Return (sharded ``DeepFMTrain``, optimizer)."""
    model, optimizer, _ = build(options.rows, options.batch_size, device, factor_dim=options.factor_dim)
    return model, optimizer


def pipelined(options: Any, make: Callable[[Any, Any], tuple[Any, Any]], answer: Callable[..., None] = serve) -> None:
    """Serve a sharded model through TorchRec's pipeline.

    Args:
        options: Of ``arguments``.
        make: Makes model and optimizer from the options and the rank's device.
        answer: ``serve``, or what does the same for all ranks.
    """
    with training_rank(options.device, int(os.environ["OMP_NUM_THREADS"])) as device:
        import torch
        from torchrec.datasets.utils import Batch
        from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        from torchrec_deepfm.training.scoring.evaluation import autocast

        torch.set_float32_matmul_precision("medium" if options.precision == "medium" else "highest")
        rank = int(os.environ.get("RANK", "0"))
        rows = draw(options.rows, options.batch_size)
        model, optimizer = make(options, device)
        lengths = torch.ones(len(KEYS) * options.batch_size, dtype=torch.int32)
        made = [
            Batch(
                dense_features=torch.from_numpy(dense),
                sparse_features=KeyedJaggedTensor.from_lengths_sync(
                    KEYS, torch.from_numpy(ids.T.copy()).flatten().int(), lengths
                ),
                labels=torch.from_numpy(labels).int(),
            )
            for dense, ids, labels in zip(rows.dense, rows.ids, rows.labels, strict=True)
        ]
        made = made[rank:] + made[:rank]  # ranks work on different batches
        batches = itertools.cycle([batch.pin_memory() for batch in made] if device.type == "cuda" else made)

        def with_loss(batch: Batch) -> object:
            with autocast(options.precision, device):
                return model(batch)

        pipeline = TrainPipelineSparseDist(model, optimizer, device, custom_model_fwd=with_loss)

        def train() -> int:
            pipeline.progress(batches)
            return int(options.batch_size)

        def forward() -> int:
            with torch.no_grad():
                with_loss(next(batches).to(device))
            return int(options.batch_size)

        model.train(options.work == "train")
        about = {"torch": torch.__version__, "torchrec": version("torchrec")}
        wait = torch.cuda.synchronize if device.type == "cuda" else None
        answer(train if options.work == "train" else forward, about, wait)


if __name__ == "__main__":
    pipelined(arguments(), deepfm)
