"""The embedding tables of a DeepFM: one packed row per id."""

from collections.abc import Mapping
from functools import partial

from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.model.fm import init_packed_rows_, packed_dim
from torchrec_deepfm.model.table_name import table_name


def embedding_tables(
    num_embeddings: Mapping[str, int], factor_dim: int = 10, *, init_std: float = 0.01
) -> list[EmbeddingBagConfig]:
    """Make the table configurations of a DeepFM, one table per categorical feature.

    Args:
        num_embeddings: number of ids of each feature, in the order of the fields.
        factor_dim: K, width of the latent vectors (10 in the paper, section 3.1).
        init_std: standard deviation of the latent vectors at the start; first-order weights and padding start at zero.

    Returns:
        One ``EmbeddingBagConfig`` per feature: table ``table_name(feature)`` of width ``packed_dim(factor_dim)``,
        sum-pooled.

    Raises:
        UserError: no feature is given, a feature has no ids, or ``factor_dim`` is not positive.

    Example:
        >>> [table] = embedding_tables({"C1": 1000}, factor_dim=10)
        >>> table.name, table.feature_names, table.num_embeddings, table.embedding_dim
        ('t_C1', ['C1'], 1000, 12)
    """
    if not num_embeddings:
        raise UserError("num_embeddings is empty", remedy="name at least one categorical feature and its number of ids")
    for feature, count in num_embeddings.items():
        if count < 1:
            raise UserError("a table needs at least one row", where=f"num_embeddings[{feature!r}]={count}")
    return [
        EmbeddingBagConfig(
            name=table_name(feature),
            feature_names=[feature],
            num_embeddings=count,
            embedding_dim=packed_dim(factor_dim),
            pooling=PoolingType.SUM,
            init_fn=partial(init_packed_rows_, factor_dim=factor_dim, std=init_std),
        )
        for feature, count in num_embeddings.items()
    ]
