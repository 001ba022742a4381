"""TorchRec's sharder of embedding bags, with every sharding type on CPU ranks too and quantised communication."""

import torch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.types import ShardingType

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.sharding_types import Qcomms


class AllTypesSharder(EmbeddingBagCollectionSharder):
    """Offers all seven sharding types on every device.

    The stock sharder leaves out row_wise, table_row_wise and grid_shard for ``cpu``, where they run as well.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return the stock sharder's types, then those that it leaves out."""
        more = (ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD)
        return list(dict.fromkeys([*super().sharding_types(compute_device_type), *(each.value for each in more)]))


def make_sharder(device: torch.device, forward: Qcomms = "fp32", backward: Qcomms = "fp32") -> AllTypesSharder:
    """Make the sharder of a training, with the precision in which pooled rows and their gradients travel.

    UserError: another precision than float32 is asked for on a CPU.
    """
    if (forward, backward) == ("fp32", "fp32"):
        return AllTypesSharder()
    if device.type != "cuda":
        raise UserError(
            f"quantised communication needs GPUs, these are {device.type} ranks",
            where=f"--qcomms {forward} {backward}",
            remedy="leave the option out",
        )
    config = QCommsConfig(forward_precision=CommType(forward), backward_precision=CommType(backward))
    return AllTypesSharder(qcomm_codecs_registry=get_qcomm_codecs_registry(config, device=device))
