"""The side of TorchRec's DLRM in ``speed.py``: sharded by DMP with TorchRec's planner, through TrainPipelineSparseDist.

Its tables have DeepFM's width, its over arch DeepFM's hidden layers.

    python -m benchmarks.training.steps.step_dlrm --precision bf16

``speed.py`` starts it and says when to work.
"""

from typing import Any

from benchmarks.training.criteo_rows import HIDDEN, NUMERIC, arguments
from benchmarks.training.random_criteo import KEYS
from benchmarks.training.steps.step_ours import pipelined


def build(options: Any, device: Any) -> tuple[Any, Any]:
    """Return (sharded ``DLRMTrain``, optimizer)."""
    import torch
    from torchrec import EmbeddingBagCollection
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.models.dlrm import DLRM, DLRMTrain
    from torchrec.modules.embedding_configs import EmbeddingBagConfig

    from torchrec_deepfm.sharding.runtime.sharder import make_sharder
    from torchrec_deepfm.training.config import TrainConfig
    from torchrec_deepfm.training.optim.optimizers import fuse_sparse_optimizer, make_optimizer

    config = TrainConfig(batch_size=options.batch_size)
    width = options.factor_dim + 1
    tables = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f"t_{key}", embedding_dim=width, num_embeddings=options.rows // len(KEYS), feature_names=[key]
            )
            for key in KEYS
        ],
        device=torch.device("meta"),
    )
    dlrm = DLRM(
        tables,
        dense_in_features=NUMERIC,
        dense_arch_layer_sizes=[HIDDEN[0], width],
        over_arch_layer_sizes=[*HIDDEN, 1],
        dense_device=device,
    )
    fuse_sparse_optimizer(tables.parameters(), config)
    model = DistributedModelParallel(DLRMTrain(dlrm), device=device, sharders=[make_sharder(device)])  # type: ignore[list-item]
    return model, make_optimizer(model, config)


if __name__ == "__main__":
    pipelined(arguments(), build)
