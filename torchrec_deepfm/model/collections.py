"""Other collections of TorchRec in place of an ``EmbeddingBagCollection``: each as ``SparseArch`` wants it."""

from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


class FeatureProcessedTables(nn.Module):
    """Tables whose ids get their weights from feature processors, such as learned position weights.

    Args:
        collection: wraps a weighted collection of packed rows (``embedding_tables``).

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingBagCollection
        >>> from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
        >>> from torchrec_deepfm import DeepFM, FeatureProcessedTables, embedding_tables
        >>> ebc = EmbeddingBagCollection(tables=embedding_tables({"C1": 100}), is_weighted=True)
        >>> positions = PositionWeightedModuleCollection({"C1": 20})
        >>> tables = FeatureProcessedTables(FeatureProcessedEmbeddingBagCollection(ebc, positions))
        >>> ids = KeyedJaggedTensor.from_lengths_sync(["C1"], torch.tensor([7, 99]), torch.tensor([2]))
        >>> DeepFM(tables, dense_in_features=0)(torch.empty(1, 0), ids).shape
        torch.Size([1, 1])
    """

    def __init__(self, collection: FeatureProcessedEmbeddingBagCollection) -> None:
        super().__init__()
        self._configs = collection.split()[1].embedding_bag_configs()
        self.collection = collection

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether batches have weights: they do not, the processors make them."""
        return False

    def forward(self, sparse_features: KeyedJaggedTensor) -> KeyedTensor:
        """Weight, look up and pool."""
        pooled: KeyedTensor = self.collection(sparse_features)
        return pooled


class ManagedCollisionTables(nn.Module):
    """Tables whose rows are given to raw ids as they come (zero-collision hashing), and taken back from rare ones.

    Args:
        collection: wraps a collection of packed rows (``embedding_tables``).

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingBagCollection
        >>> from torchrec.modules.mc_modules import (
        ...     DistanceLFU_EvictionPolicy, ManagedCollisionCollection, MCHManagedCollisionModule
        ... )
        >>> from torchrec_deepfm import DeepFM, ManagedCollisionTables, embedding_tables
        >>> configs = embedding_tables({"C1": 100})
        >>> zch = MCHManagedCollisionModule(100, torch.device("cpu"), DistanceLFU_EvictionPolicy(), 10)
        >>> managed = ManagedCollisionCollection({configs[0].name: zch}, configs)
        >>> tables = ManagedCollisionEmbeddingBagCollection(EmbeddingBagCollection(tables=configs), managed)
        >>> ids = KeyedJaggedTensor.from_lengths_sync(["C1"], torch.tensor([2**60]), torch.tensor([1]))
        >>> DeepFM(ManagedCollisionTables(tables), dense_in_features=0)(torch.empty(1, 0), ids).shape
        torch.Size([1, 1])
    """

    def __init__(self, collection: ManagedCollisionEmbeddingBagCollection) -> None:
        super().__init__()
        self._configs = list(collection._embedding_module.embedding_bag_configs())  # type: ignore[operator]
        self._is_weighted = bool(collection._embedding_module.is_weighted())  # type: ignore[operator]
        self.collection = collection

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether batches have weights."""
        return self._is_weighted

    def forward(self, sparse_features: KeyedJaggedTensor) -> KeyedTensor:
        """Give rows to ids, look up and pool."""
        pooled: KeyedTensor = self.collection(sparse_features)[0]
        return pooled
