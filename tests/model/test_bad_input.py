"""Tables, options and batches that a model refuses: one line, what and what to do."""

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType

from tests.model import oracle
from tests.model.small_models import make_model, random_bags, to_kjt
from torchrec_deepfm import DeepFM, embedding_tables
from torchrec_deepfm.errors import UserError


def table(name: str, width: int, pooling: PoolingType = PoolingType.SUM) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=5, embedding_dim=width, pooling=pooling)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            [table("x", 4), table("y", 8)],
            r"tables of unequal width \(x=4, y=8\), where each of a DeepFM's is 4 wide; use",
        ),
        (
            [table("x", 8)],
            r"table 'x' is 8 wide, but factor_dim=3 wants 4 columns \[v \(3\) \| w \(1\) \| padding\]; use",
        ),
    ],
)
def test_bad_tables(tables: list[EmbeddingBagConfig], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}.*$"):
        DeepFM(EmbeddingBagCollection(tables=tables), dense_in_features=0, factor_dim=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": ()}, r"terms=\(\): choose one or more of 'linear', 'fm', 'deep'"),
        ({"terms": ("wide",)}, r"terms=\('wide',\): choose one or more"),
        ({"terms": "fm"}, r"terms='fm': choose one or more of 'linear', 'fm', 'deep', as a tuple"),
        ({"dropout": 1.0}, r"dropout=1.0: the probability of dropping a unit lies in \[0, 1\)"),
        ({"over_arch_layer_sizes": (4, 0)}, r"over_arch_layer_sizes=\(4, 0\): every hidden layer needs at least one"),
        ({"numeric": -1}, r"dense_in_features=-1: give the number of numeric features, or 0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        make_model(**options)  # type: ignore[arg-type]


def test_bad_widths() -> None:
    with pytest.raises(UserError, match="which sum to dense_in_features=2"):
        make_model(dense_widths=(1, 2))


def test_bad_table_requests() -> None:
    with pytest.raises(UserError, match=r"^num_embeddings is empty; name at least one categorical feature"):
        embedding_tables({})
    with pytest.raises(UserError, match=r"^num_embeddings\['a'\]=0: a table needs at least one row"):
        embedding_tables({"a": 0})


@pytest.mark.parametrize(
    ("bags", "message"),
    [
        ({"a": [[(5, 1.0)]]}, r"feature 'a' has the id 5, but its table has 5 rows \(ids 0 to 4\)"),
        ({"a": [[(-1, 1.0)]]}, r"feature 'a' has the id -1, but its table has 5 rows"),
        ({"a": [[(2**31 - 1, 1.0)]]}, r"feature 'a' has the id 2147483647, but its table"),
        ({"z": [[(0, 1.0)]]}, r"feature 'a' of the tables is not in the batch, whose keys are \['z'\]"),
    ],
)
def test_bad_batches(bags: dict[str, list[oracle.Bag]], message: str) -> None:
    model = make_model({"a": 5}, numeric=0)
    with pytest.raises(UserError, match=f"^{message}"):
        model(torch.empty(1, 0), to_kjt(bags))


def test_weights_that_one_side_has_and_the_other_has_not() -> None:
    bags, dense = random_bags("weighted", 4), torch.randn(4, 2)
    with pytest.raises(UserError, match=r"^the batch has weights, but the tables have none; make the"):
        make_model()(dense, to_kjt(bags, weighted=True))
    with pytest.raises(UserError, match=r"^the tables are weighted, but the batch has no weights; give every id one"):
        make_model(weighted=True)(dense, to_kjt(bags))


def test_bad_dense_features() -> None:
    with pytest.raises(UserError, match=r"^dense_features has shape \(1, 3\), but the model was made for \[B, 2\]"):
        make_model()(torch.zeros(1, 3), to_kjt(random_bags("one-hot", 1)))
