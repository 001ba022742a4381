"""Small models with every parameter set, and batches for them."""

import random

import torch
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor

from tests.model import oracle
from torchrec_deepfm import DeepFM, embedding_tables

K = 3
# Not in alphabetical order, so that a test fails where fields are sorted by name.
SIZES = {"b": 5, "c": 7, "a": 9}


def make_model(
    sizes: dict[str, int] = SIZES, numeric: int = 2, *, weighted: bool = False, seed: int = 0, **options: object
) -> DeepFM:
    """A model with every parameter set to noise, so that no term can hide behind a zero."""
    tables = embedding_tables(sizes, factor_dim=K)
    options = {"over_arch_layer_sizes": (6, 5), "factor_dim": K, "dropout": 0.0} | options
    model = DeepFM(EmbeddingBagCollection(tables=tables, is_weighted=weighted), numeric, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return model


def to_kjt(bags: dict[str, list[oracle.Bag]], *, weighted: bool = False) -> KeyedJaggedTensor:
    flat = [pair for bag_list in bags.values() for bag in bag_list for pair in bag]
    return KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor([i for i, _ in flat], dtype=torch.int32),
        lengths=torch.tensor([len(bag) for bag_list in bags.values() for bag in bag_list], dtype=torch.int32),
        weights=torch.tensor([w for _, w in flat], dtype=torch.float32) if weighted else None,
    )


def random_bags(kind: str, batch: int, sizes: dict[str, int] = SIZES) -> dict[str, list[oracle.Bag]]:
    rng = random.Random(f"{kind}{batch}")
    length = {"one-hot": lambda: 1, "multi-hot": lambda: rng.randint(1, 4), "empty": lambda: rng.randint(0, 2)}
    kind_of_length = "multi-hot" if kind == "weighted" else kind

    def bag(size: int) -> oracle.Bag:
        count = length[kind_of_length]()
        return [
            (rng.randrange(size), rng.choice([0.5, 2.0, -1.0]) if kind == "weighted" else 1.0) for _ in range(count)
        ]

    return {name: [bag(size) for _ in range(batch)] for name, size in sizes.items()}
