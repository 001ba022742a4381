"""The whole model against the equation, and what may not change it: key order, tracing, compiling, exporting."""

import dataclasses
import itertools

import pytest
import torch
import torchrec.fx
from torch import nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.datasets.utils import Batch

from tests.model import oracle
from tests.model.small_models import SIZES, K, make_model, random_bags, to_kjt
from torchrec_deepfm import DeepFM, DeepFMTrain, embedding_tables
from torchrec_deepfm.model.arches import _rows_by_name
from torchrec_deepfm.model.deepfm import TERMS, Term


def expected_logits(
    model: DeepFM,
    dense: torch.Tensor,
    bags: dict[str, list[oracle.Bag]],
    terms: tuple[str, ...] = TERMS,
    widths: tuple[int, ...] = (),
) -> list[float]:
    tables = {
        name.split(".")[-2].removeprefix("t_"): weight.double().tolist()
        for name, weight in model.state_dict().items()
        if "embedding_bags" in name
    }
    layers: list[tuple[list[list[float]], list[float] | None]] = []
    if model.over_arch is not None:
        linear = [layer for layer in model.over_arch.layers if isinstance(layer, nn.Linear)]
        layers = [(m.weight.double().tolist(), None if m.bias is None else m.bias.double().tolist()) for m in linear]
    result = []
    for sample, x in enumerate(dense.double().tolist()):
        rows = model.dense_arch.rows.double().tolist() if model.dense_arch is not None else []
        fields = [oracle.field_of_number(row, value, K) for row, value in zip(rows, x, strict=True)]
        if widths:  # a field's numbers are summed as the values of a bag
            table = iter(zip(x, rows, strict=True))
            groups = [[next(table) for _ in range(width)] for width in widths]
            fields = [
                oracle.field_of_bag([row for _, row in group], [(i, value) for i, (value, _) in enumerate(group)], K)
                for group in groups
            ]
        fields += [oracle.field_of_bag(tables[name], bags[name][sample], K) for name in bags]
        logit = model.bias.double().item()
        logit += oracle.first_order(fields) if "linear" in terms else 0.0
        logit += oracle.second_order(fields) if "fm" in terms else 0.0
        logit += oracle.mlp(fields, layers) if "deep" in terms else 0.0
        result.append(logit)
    return result


def assert_is_the_equation(
    model: DeepFM,
    dense: torch.Tensor,
    bags: dict[str, list[oracle.Bag]],
    *,
    weighted: bool = False,
    widths: tuple[int, ...] = (),
) -> None:
    logits = model(dense, to_kjt(bags, weighted=weighted))
    assert logits.shape == (len(dense), 1)
    expected = expected_logits(model, dense, bags, model.terms, widths)
    torch.testing.assert_close(
        logits.squeeze(1).double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["one-hot", "multi-hot", "weighted", "empty"])
@pytest.mark.parametrize("batch", [1, 4])
def test_is_the_equation(kind: str, batch: int) -> None:
    weighted = kind == "weighted"
    model = make_model(weighted=weighted)
    assert_is_the_equation(model, torch.randn(batch, 2), random_bags(kind, batch), weighted=weighted)


@pytest.mark.parametrize(
    "terms", [combination for size in (1, 2, 3) for combination in itertools.combinations(TERMS, size)], ids="+".join
)
def test_terms_can_be_left_out(terms: tuple[str, ...]) -> None:
    model = make_model(terms=terms)
    assert_is_the_equation(model, torch.randn(4, 2), random_bags("multi-hot", 4))


@pytest.mark.parametrize("sizes", [{"a": 5}, {"a": 5, "b": 7}], ids=["1 field", "2 fields"])
def test_few_fields_and_no_numeric_features(sizes: dict[str, int]) -> None:
    model = make_model(sizes, numeric=0)
    assert model.dense_arch is None
    assert_is_the_equation(model, torch.empty(4, 0), random_bags("one-hot", 4, sizes))


@pytest.mark.parametrize("widths", [(3,), (1, 3), (3, 1, 1, 2), (1, 1, 1)], ids=str)
def test_a_list_of_numbers_is_one_field(widths: tuple[int, ...]) -> None:
    model = make_model(numeric=sum(widths), dense_widths=widths)
    assert model.over_arch is not None
    assert model.over_arch.layers[0].in_features == (len(widths) + len(SIZES)) * K
    dense, bags = torch.randn(4, sum(widths)), random_bags("one-hot", 4)
    assert_is_the_equation(model, dense, bags, widths=widths)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(dense, to_kjt(bags)), model(dense, to_kjt(bags)))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(dense, to_kjt(bags)), model(dense, to_kjt(bags)))


def test_a_bag_is_pooled_before_it_interacts() -> None:
    """Two ids in one bag of the only feature: no pairs, so the FM term is exactly zero."""
    model = make_model({"a": 5}, numeric=0, terms=("fm",))
    logit = model(torch.empty(1, 0), to_kjt({"a": [[(1, 1.0), (2, 1.0)]]}))
    assert logit.item() == pytest.approx(model.bias.item(), abs=1e-7)


def test_a_bag_pooled_by_mean_has_weights_of_one_by_its_length() -> None:
    tables = [dataclasses.replace(table, pooling=PoolingType.MEAN) for table in embedding_tables(SIZES, factor_dim=K)]
    model = make_model()
    mean = DeepFM(EmbeddingBagCollection(tables=tables), 2, (6, 5), K, dropout=0.0)
    mean.load_state_dict(model.state_dict())
    bags, dense = random_bags("multi-hot", 8), torch.randn(8, 2)
    weighted = {name: [[(i, 1 / len(bag)) for i, _ in bag] for bag in of] for name, of in bags.items()}
    expected = torch.tensor(expected_logits(mean, dense, weighted), dtype=torch.float64)
    torch.testing.assert_close(mean(dense, to_kjt(bags)).squeeze(1).double(), expected, rtol=1e-5, atol=1e-6)


def test_features_without_a_table_are_left_out() -> None:
    """As in TorchRec's DLRM: one batch can feed several models."""
    model, bags, dense = make_model(), random_bags("one-hot", 4), torch.randn(4, 2)
    more = {"first": [[(10**6, 1.0)]] * 4} | bags | {"last": [[]] * 4}
    assert torch.equal(model(dense, to_kjt(more)), model(dense, to_kjt(bags)))


def test_bf16_logits_are_not_rounded_to_bfloat16() -> None:
    model, dense = make_model(terms=("deep",)), torch.randn(2000, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(dense, to_kjt(random_bags("one-hot", 2000)))
    assert logits.unique().numel() > 1500
    assert (logits.bfloat16().float() != logits).double().mean().item() > 0.9


def test_the_padding_is_never_read() -> None:
    model = make_model({"a": 5}, numeric=0, factor_dim=1, seed=3)  # rows of 4 columns: v, w and two of padding
    dense, kjt = torch.empty(2, 0), to_kjt({"a": [[(1, 1.0)], [(4, 1.0)]]})
    before = model(dense, kjt)
    before.sum().backward()
    weight = model.sparse_arch.embedding_bag_collection.embedding_bags["t_a"].weight
    assert weight.shape == (5, 4)
    assert weight.grad is not None
    assert weight.grad[:, 2:].abs().max().item() == 0.0
    with torch.no_grad():
        weight[:, 2:] += 100.0
    assert torch.equal(model(dense, kjt), before)


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_any_key_order_in_the_batch(order: tuple[str, ...]) -> None:
    model, dense, bags = make_model(), torch.randn(4, 2), random_bags("multi-hot", 4)
    shuffled = {name: bags[name] for name in order}
    assert torch.equal(model(dense, to_kjt(shuffled)), model(dense, to_kjt(bags)))


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
@pytest.mark.parametrize("samples", [0, 4])
def test_any_key_order_in_the_pooled_rows(order: tuple[str, ...], samples: int) -> None:
    """Sharding orders the keys by rank. Row and gradient of each name, to the last bit."""
    by_name = {name: torch.randn(samples, 4) for name in "abc"}
    values = torch.cat([by_name[name] for name in order], dim=1).requires_grad_()
    rows = _rows_by_name(KeyedTensor(list(order), [4, 4, 4], values), list("abc"))
    weights = torch.randn(samples, 3, 4)
    (rows * weights).sum().backward()
    assert values.grad is not None
    for place, name in enumerate("abc"):
        assert rows[:, place].equal(by_name[name])
        begin = 4 * order.index(name)
        assert values.grad[:, begin : begin + 4].equal(weights[:, place])


def test_gradients_by_finite_differences() -> None:
    model = make_model(activation=nn.Tanh).double()  # smooth, so that finite differences mean something
    names = [name for name, _ in model.named_parameters()]
    values = tuple(parameter.detach().clone().requires_grad_() for parameter in model.parameters())
    dense, kjt = torch.randn(3, 2, dtype=torch.float64, requires_grad=True), to_kjt(random_bags("multi-hot", 3))
    # The collection pools in float32 (`.float()` in its forward), too coarse for gradcheck: pool here, by hand.
    arch = model.sparse_arch

    def pooled(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        bags = kjt.to_dict()
        fields = []
        for name in SIZES:
            weight = parameters[f"sparse_arch.embedding_bag_collection.embedding_bags.t_{name}.weight"]
            jagged = bags[name]
            fields.append(nn.functional.embedding_bag(jagged.values(), weight, jagged.offsets()[:-1], mode="sum"))
        return torch.stack(fields, dim=1)[:, :, : K + 1]

    def logits(dense: torch.Tensor, *flat: torch.Tensor) -> torch.Tensor:
        parameters = dict(zip(names, flat, strict=True))
        arch.forward = lambda _: pooled(parameters)  # type: ignore[method-assign, assignment]
        rest = {name: value for name, value in parameters.items() if not name.startswith("sparse_arch")}
        return torch.func.functional_call(model, rest, (dense, kjt))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(logits, (dense, *values))


def test_gradients_reach_the_tables() -> None:
    """d logit / d w of an id is how often it occurs; the rows of other ids get nothing."""
    model = make_model({"a": 5}, numeric=0, terms=("linear",))
    model(torch.empty(2, 0), to_kjt({"a": [[(1, 1.0), (1, 1.0)], [(4, 1.0)]]})).sum().backward()
    grad = model.sparse_arch.embedding_bag_collection.embedding_bags["t_a"].weight.grad
    assert grad is not None
    assert grad[:, K].tolist() == [0.0, 2.0, 0.0, 0.0, 1.0]
    assert grad[:, :K].abs().max().item() == 0.0


def test_empty_batch() -> None:
    train_model = DeepFMTrain(make_model())
    kjt = KeyedJaggedTensor(
        keys=list(SIZES), values=torch.empty(0, dtype=torch.int32), lengths=torch.empty(0, dtype=torch.int32)
    )
    loss, (_, logits, labels) = train_model(Batch(torch.empty(0, 2), kjt, torch.empty(0)))
    loss.backward()
    assert (loss.item(), logits.shape, labels.shape) == (0.0, (0,), (0,))


def test_train_model_returns_the_mean_cross_entropy() -> None:
    model, dense, bags = make_model(), torch.randn(4, 2), random_bags("one-hot", 4)
    labels = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    loss, (detached, logits, returned) = DeepFMTrain(model)(Batch(dense, to_kjt(bags), labels))
    probabilities = torch.sigmoid(torch.tensor(expected_logits(model, dense, bags), dtype=torch.float64))
    clicked = labels.bool()
    expected = -(torch.log(torch.where(clicked, probabilities, 1 - probabilities))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.requires_grad
    assert not detached.requires_grad
    assert not logits.requires_grad
    assert torch.equal(returned, labels)
    column = DeepFMTrain(model)(Batch(dense, to_kjt(bags), labels.unsqueeze(1)))
    assert torch.equal(column[0], loss)
    assert column[1][1].shape == (4,)


@pytest.mark.parametrize("tracer", [torch.fx.Tracer, torchrec.fx.Tracer], ids=["torch.fx", "torchrec.fx"])
def test_symbolic_trace(tracer: type[torch.fx.Tracer]) -> None:
    train_model, dense, bags = DeepFMTrain(make_model()), torch.randn(4, 2), random_bags("multi-hot", 4)
    batch = Batch(dense, to_kjt(bags), torch.tensor([0, 1, 1, 0]))
    traced = torch.fx.GraphModule(train_model, tracer().trace(train_model))
    assert torch.equal(traced(batch)[1][1], train_model(batch)[1][1])


def test_torchscript() -> None:
    model, dense, kjt = make_model(), torch.randn(4, 2), to_kjt(random_bags("multi-hot", 4))
    torch.testing.assert_close(torch.jit.script(model)(dense, kjt), model(dense, kjt))


@pytest.mark.parametrize("terms", [TERMS, ("deep",), ("linear",)])
def test_compile_dense_path(terms: tuple[Term, ...]) -> None:
    model, dense, kjt = make_model(terms=terms), torch.randn(4, 2), to_kjt(random_bags("one-hot", 4))
    expected = model(dense, kjt)
    names = list(model.state_dict())
    model.compile_dense_path(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(dense, kjt), expected)
    assert list(model.state_dict()) == names  # checkpoints stay


def test_compile_in_one_graph() -> None:
    model, dense = make_model(), torch.randn(4, 2)
    kjt = to_kjt(random_bags("one-hot", 4))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(dense, kjt), model(dense, kjt))


class TensorsIn(nn.Module):
    """The thin wrapper that torch.export wants: tensors in, logits out."""

    def __init__(self, model: DeepFM) -> None:
        super().__init__()
        self.model = model

    def forward(self, dense: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.model(dense, KeyedJaggedTensor(keys=list(SIZES), values=values, lengths=lengths))  # type: ignore[no-any-return]


def test_export_with_a_dynamic_batch() -> None:
    wrapper = TensorsIn(make_model()).eval()
    first = to_kjt(random_bags("multi-hot", 4))
    dynamic = {0: torch.export.Dim.AUTO}
    program = torch.export.export(
        wrapper, (torch.randn(4, 2), first.values(), first.lengths()), dynamic_shapes=(dynamic, dynamic, dynamic)
    )
    for batch in (2, 4, 33):
        dense, kjt = torch.randn(batch, 2), to_kjt(random_bags("empty", batch))
        logits = program.module()(dense, kjt.values(), kjt.lengths())
        torch.testing.assert_close(logits, wrapper(dense, kjt.values(), kjt.lengths()))


def test_on_meta() -> None:
    meta = torch.device("meta")
    ebc = EmbeddingBagCollection(tables=embedding_tables({"a": 40_000_000, "b": 3}), device=meta)
    model = DeepFM(ebc, dense_in_features=2, dense_device=meta, batch_norm=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    kjt = KeyedJaggedTensor(
        keys=["a", "b"],
        values=torch.empty(8, dtype=torch.int32, device=meta),
        lengths=torch.empty(8, dtype=torch.int32, device=meta),
        length_per_key=[4, 4],
    )
    logits = model(torch.empty(4, 2, device=meta), kjt)
    assert (logits.shape, logits.device.type) == ((4, 1), "meta")


def test_bf16_autocast_keeps_the_wide_side_in_float32() -> None:
    model, dense, bags = make_model(terms=("linear", "fm")), torch.randn(4, 2), random_bags("one-hot", 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(dense, to_kjt(bags))
    assert logits.dtype is torch.float32
    expected = torch.tensor(expected_logits(model, dense, bags, model.terms), dtype=torch.float64)
    torch.testing.assert_close(logits.squeeze(1).double(), expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make_model()(dense, to_kjt(bags)).dtype is torch.float32


def test_the_papers_defaults() -> None:
    model = DeepFM(EmbeddingBagCollection(tables=embedding_tables({"a": 5})), dense_in_features=13)
    assert model.over_arch is not None
    linear = [
        (layer.in_features, layer.out_features) for layer in model.over_arch.layers if isinstance(layer, nn.Linear)
    ]
    assert linear == [(14 * 10, 400), (400, 400), (400, 400), (400, 1)]
    assert [layer.p for layer in model.over_arch.layers if isinstance(layer, nn.Dropout)] == [0.5, 0.5, 0.5]
    last = model.over_arch.layers[-1]
    assert isinstance(last, nn.Linear)
    assert last.bias is None  # the model has one bias, b
    assert sum(isinstance(layer, nn.ReLU) for layer in model.over_arch.layers) == 3


def test_batch_norm_and_activation_are_chosen() -> None:
    model = make_model(batch_norm=True, activation=nn.SiLU, dropout=0.25)
    assert model.over_arch is not None
    kinds = [nn.Linear, nn.BatchNorm1d, nn.SiLU, nn.Dropout] * 2 + [nn.Linear]
    assert all(isinstance(layer, kind) for layer, kind in zip(model.over_arch.layers, kinds, strict=True))


def test_initial_values_of_every_field() -> None:
    """v of categorical and numeric features has the deviation that was asked for; w starts at zero."""
    torch.manual_seed(0)
    tables = embedding_tables({"a": 4000}, factor_dim=K, init_std=0.3)
    model = DeepFM(EmbeddingBagCollection(tables=tables), 4000, (), K, init_std=0.3)
    assert model.dense_arch is not None
    for rows in (model.sparse_arch.embedding_bag_collection.embedding_bags["t_a"].weight, model.dense_arch.rows):
        assert rows[:, :K].std().item() == pytest.approx(0.3, rel=0.05)
        assert rows[:, K:].abs().max().item() == 0.0


def test_a_list_starts_as_torchs_linear_and_the_other_rows_as_without_it() -> None:
    def rows(widths: tuple[int, ...]) -> torch.Tensor:
        torch.manual_seed(0)
        tables = EmbeddingBagCollection(tables=embedding_tables({"a": 5}, factor_dim=50), device=torch.device("meta"))
        arch = DeepFM(tables, 302, (4,), 50, dense_widths=widths).dense_arch
        assert arch is not None
        return arch.rows.detach()

    found = rows((1, 300, 1))
    assert torch.equal(found[[0, 301]], rows(())[[0, 301]])
    linear = torch.nn.Linear(300, 2000).weight.std()
    assert found[1:301, :50].std() == pytest.approx(linear.item(), rel=0.03)
    assert not found[:, 50].any()
