"""The phases of a step, beside a clock around the whole of it."""

import time
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from tests.support.plans.experiments import BATCH_SIZE, plan
from tests.support.pretend_gpu import Event, pretend_gpu
from torchrec_deepfm.experiment import step_timer
from torchrec_deepfm.experiment.step_timer import PHASES, split_step, step_seconds
from torchrec_deepfm.experiment.workload import BatchOptions, batches, build_workload
from torchrec_deepfm.sharding.inputs.tables import Table

TABLES = tuple(
    Table(name=f"t{number}", num_embeddings=2000, embedding_dim=16, pooling_factor=200) for number in range(4)
)


@pytest.mark.parametrize("kinds", [["table_wise"] * 4, ["data_parallel"] * 4, ["table_wise", "data_parallel"] * 2])
def test_phases_sum_up_to_the_step(kinds: list[str], device: torch.device) -> None:
    trained = build_workload(
        TABLES, plan(TABLES, kinds, 1), device, optimizer="rowwise_adagrad", over_arch_layer_sizes=(64,)
    )
    own = batches(TABLES, BatchOptions(batch_size=BATCH_SIZE), 0, 1, device)[0]
    trained.step(own)
    shares = []
    for _ in range(20):
        start = time.perf_counter()
        split = split_step(trained, own)
        whole = time.perf_counter() - start
        assert set(split) == set(PHASES)
        assert min(split.values()) >= 0
        assert sum(split.values()) <= whole
        shares.append(sum(split.values()) / whole)
    # What is left out is the work of the marks themselves; a lost phase would take more.
    assert max(shares) > 0.8


def test_a_pipelined_step_trains_as_one_without_a_pipeline(device: torch.device) -> None:
    """And the model can be used without it afterwards."""
    weights = []
    for pipelined in (True, False):
        torch.manual_seed(0)
        trained = build_workload(
            TABLES, plan(TABLES, ["table_wise"] * 4, 1), device, optimizer="sgd", over_arch_layer_sizes=(8,)
        )
        own = batches(TABLES, BatchOptions(batch_size=BATCH_SIZE), 0, 5, device)
        if pipelined:
            assert 0 < step_seconds(trained, own[:4]) < 60
        else:
            for batch in own[:4]:
                trained.step(batch)
        trained.step(own[4])
        weights.append({name: value.detach().clone() for name, value in trained.model.named_parameters()})
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_filling_and_emptying_the_pipeline_is_not_timed(kind: str) -> None:
    """On a GPU the clock is that of its events: the CPU's stands still here."""
    now = 0.0

    class Pipeline:
        def __init__(self, *args: object, **options: object) -> None: ...
        def progress(self, batches: Iterator[int]) -> None:
            nonlocal now
            now += 0.5 if 0 < next(batches) < 5 else 100

        def detach(self) -> None: ...

    class OwnEvent(Event):
        def record(self, stream: object = None) -> None:
            self._at = now

    def clock() -> float:
        return now if kind == "cpu" else 0.0

    trained = step_timer.TrainableModel(model=mock.Mock(), optimizer=mock.Mock(), device=torch.device(kind))
    with (
        pretend_gpu(),
        mock.patch.object(step_timer, "TrainPipelineSparseDist", Pipeline),
        mock.patch.object(torch.cuda, "Event", OwnEvent),
        mock.patch.object(time, "perf_counter", clock),
    ):
        assert step_seconds(trained, range(7)) == 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "phase"),
    [("_input_dists", "input_dist"), ("_lookups", "lookup"), ("_output_dists", "output_dist"), ("over_arch", "dense")],
)
def test_a_phase_has_the_time_of_its_part(parts: str, phase: str, device: torch.device) -> None:
    trained = build_workload(
        TABLES, plan(TABLES, ["table_wise"] * 4, 1), device, optimizer="sgd", over_arch_layer_sizes=(64,)
    )
    own = batches(TABLES, BatchOptions(batch_size=BATCH_SIZE), 0, 1, device)[0]
    trained.step(own)
    now = 0.0  # only the part takes time

    def take_a_second(*_: object) -> None:
        nonlocal now
        now += 1.0

    def clock() -> float:
        return now

    for module in trained.model.modules():
        part = getattr(module, parts, None)
        for one in part if isinstance(part, list | torch.nn.ModuleList) else [part]:
            if isinstance(one, torch.nn.Module):
                one.register_forward_pre_hook(take_a_second)
    with mock.patch.object(time, "perf_counter", clock):
        split = split_step(trained, own)
    assert split[phase] == now > 0
    assert sum(split.values()) == now
