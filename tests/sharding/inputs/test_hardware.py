"""Descriptions of hardware: presets, TOML files, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import CollectiveType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.hardware import Hardware
from torchrec_deepfm.sharding.inputs.hardware_toml import read_hardware, write_hardware
from torchrec_deepfm.sharding.inputs.presets import PRESETS
from torchrec_deepfm.sharding.inputs.topology import topology
from torchrec_deepfm.strict_json import as_type


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_file_and_its_json(name: str, tmp_path: Path) -> None:
    calibrated = replace(PRESETS[name], extra={"shard_ms": 0.25, "step_ms": 1.0})
    for hardware in (PRESETS[name], calibrated):
        write_hardware(hardware, tmp_path / "mine.toml")
        assert read_hardware(str(tmp_path / "mine.toml")) == hardware
        assert as_type(hardware.to_json(), Hardware, where="x", remedy="y") == hardware
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_presets_say_where_their_figures_come_from() -> None:
    for name in ("a100-40", "a100-80", "h100", "h200", "b200", "gb200", "gh200"):
        assert "NVIDIA" in PRESETS[name].source
        assert "data sheet (20" in PRESETS[name].source


def test_a_file_takes_the_rest_from_its_base_and_reads_units(tmp_path: Path) -> None:
    path = tmp_path / "slow net.toml"
    path.write_text('base = "h100"\ninter_host_bandwidth = "12.5 GB/s"\nhbm_bytes = "40 GiB"\n')
    hardware = read_hardware(str(path))
    assert hardware.name == "slow net"
    assert (hardware.inter_host_bandwidth, hardware.hbm_bytes) == (12.5e9, 40 * 2**30)
    assert hardware.intra_host_bandwidth == PRESETS["h100"].intra_host_bandwidth
    assert "the user's own figures" in hardware.source


def test_the_planner_sees_the_bandwidths() -> None:
    """TorchRec's factory leaves them out unless it is asked to; then it plans for its own defaults."""
    found = topology(PRESETS["b200"], 32)
    assert (found.world_size, found.local_world_size) == (32, 8)
    assert found.hbm_mem_bw == 8000e9 / 1000
    assert (found.intra_host_bw, found.inter_host_bw) == (900e9 / 1000, 50e9 / 1000)
    assert {device.storage.hbm for device in found.devices} == {180 * 2**30}


def test_a_rack_of_gb200_adds_up_to_its_data_sheet() -> None:
    rack = PRESETS["gb200"]
    gpus = rack.ranks_per_host * rack.pod_size
    assert gpus == 72
    assert rack.hbm_bandwidth * gpus == 576e12
    assert 2 * rack.intra_host_bandwidth * gpus == pytest.approx(130e12, rel=0.01)  # both directions
    assert rack.hbm_bytes is not None
    assert rack.hbm_bytes / 2**30 * gpus == pytest.approx(13_400, rel=0.01)  # printed as 13.4 TB
    assert rack.ddr_bytes / 2**30 * gpus == pytest.approx(17_000, rel=0.02)
    assert rack.ddr_bandwidth * gpus == pytest.approx(14e12)
    assert 2 * 2 * rack.hbm_to_ddr_bandwidth == 900e9  # two GPUs share a CPU's NVLink-C2C


def terms(hardware: Hardware, ranks: int, kind: str) -> list[float]:
    """TorchRec's estimate of a table's exchanges, summed over its shards."""
    at = topology(hardware, ranks)
    tables = [EmbeddingBagConfig(name="t", feature_names=["f"], num_embeddings=10**6, embedding_dim=128)]
    model = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    rules = {"t": ParameterConstraints(sharding_types=[kind], min_partition=64, compute_kernels=["fused"])}
    options = EmbeddingEnumerator(at, 512, rules).enumerate(model, [EmbeddingBagCollectionSharder()])  # type: ignore[list-item]
    perfs = [shard.perf for shard in options[0].shards if shard.perf is not None]
    return [sum(getattr(perf, term) for perf in perfs) for term in ("fwd_comms", "bwd_comms", "input_dist_comms")]


@pytest.mark.parametrize("kind", ["table_wise", "column_wise", "table_row_wise", "grid_shard"])
@pytest.mark.parametrize("ranks", [16, 72, 144])
def test_a_domain_exchanges_as_a_host_of_as_many_ranks(kind: str, ranks: int) -> None:
    """TorchRec by itself would take the network's bandwidth for what leaves a tray."""
    one_host = replace(PRESETS["gb200"], ranks_per_host=72, pod_size=1)
    assert terms(PRESETS["gb200"], ranks, kind) == pytest.approx(terms(one_host, ranks, kind))
    single = replace(PRESETS["gb200"], ranks_per_host=1, pod_size=72)  # as gh200
    assert terms(single, ranks, kind) == pytest.approx(terms(one_host, ranks, kind))


def test_an_all_reduce_inside_a_domain_is_a_ring_over_nvlink() -> None:
    """2 bytes sent for each of the table's, at 900 GB/s, whatever TorchRec multiplies by the hosts."""
    for ranks, over_hosts in ((8, 1.5), (16, 3.0), (72, 3.0)):
        bandwidth = topology(PRESETS["gb200"], ranks).comms_bandwidths.get_bw(4, ranks, CollectiveType.ALL_REDUCE)
        assert over_hosts / bandwidth == pytest.approx(2 / (900e9 / 1000))
    beyond = topology(PRESETS["gb200"], 144).comms_bandwidths.get_bw(4, 144, CollectiveType.ALL_REDUCE)
    assert beyond == 4 * 50e9 / 1000


def test_ranks_fill_their_domains() -> None:
    with pytest.raises(UserError, match=r"100 ranks on gb200: not a multiple of the 72 ranks of an NVLink domain"):
        topology(PRESETS["gb200"], 100)
    assert topology(PRESETS["gb200"], 40).intra_group_size == 40
    assert topology(PRESETS["gh200"], 64).intra_group_size == 1


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("hbm_bytes = -1", "hbm_bytes: expected a whole number >= 1, not -1; correct it, or take th"),
        ("hbm_bytes = 0", "hbm_bytes: expected a whole number >= 1, not 0; correct it, or tak"),
        ("ddr_bytes = 1.5", "ddr_bytes: expected a whole number, not 1.5; correct it, or take t"),
        (
            f"hbm_bytes = {'9' * 18}999",
            f"hbm_bytes: expected a whole number <= 1152921504606846976, not {'9' * 21}; correct",
        ),
        ('hbm_bytes = "1e400 GB"', "hbm_bytes: 1e400 GB: not an amount of memory; write it as 80 GiB"),
        ("ranks_per_host = 65537", "ranks_per_host: expected a whole number <= 65536, not 65537; correct it, "),
        ('source = "\\u0007"', "source: '\\x07' can't be printed; correct it, or take the rest from "),
        ('hbm_bytes = "80 GiB/s"', "hbm_bytes: 80 GiB/s: not an amount of memory; write it as 80 GiB"),
        ('inter_host_bandwidth = "50 GB"', "inter_host_bandwidth: 50 GB: not a bandwidth; write it as 450 GB/s"),
        ("inter_host_bandwidth = nan", "inter_host_bandwidth: expected a number >= 1.0, not nan; correct i"),
        ("inter_host_bandwidth = inf", "inter_host_bandwidth: expected a number <= 1e+30, not inf; correct"),
        ("inter_host_bandwidth = -5.0", "inter_host_bandwidth: expected a number >= 1.0, not -5.0; correct "),
        (
            "inter_host_bandwidth = 1e-300",
            "inter_host_bandwidth: expected a number >= 1.0, not 1e-300; correct it,",
        ),
        (f"inter_host_bandwidth = 1{'0' * 400}", f"inter_host_bandwidth: 1{'0' * 56}... is out of range; correct it"),
        (
            f"inter_host_bandwidth = 0x{'f' * 5000}",
            "inter_host_bandwidth: a number of thousands of digits is out of ra",
        ),
        (f"inter_host_bandwidth = {'9' * 5000}", "not valid TOML (Exceeds the limit"),
        ("inter_host_bandwidth = true", "inter_host_bandwidth: expected a number, not True; correct it, or "),
        ("ranks_per_host = 0", "ranks_per_host: expected a whole number >= 1, not 0; correct it, o"),
        ('compute_device = "tpu"', "compute_device: 'tpu' is not valid; choose one of cuda, cpu (did y"),
        ("inter_bandwidth = 1", "unknown key 'inter_bandwidth'; choose one of name, compute_device,"),
        ("[extra]\nshard_ms = -1", "extra.shard_ms: expected a number >= 0.0, not -1; correct it, or t"),
        (
            "[extra]\nshard_ms = 1e308",
            "extra.shard_ms: expected a number <= 1000000000.0, not 1e+308; correct it, or t",
        ),
        ("[extra]\nshards = 1", "extra: 'shards' is not valid; choose one of step_ms, shard_ms, group_ms (did"),
        ("extra = 3", "extra: expected a table of keys, not 3; correct it, or take the re"),
        ("name = 3", "name: expected text, not 3; correct it, or take the rest from a pr"),
        ('base = "h300"', "hardware 'h300': no such preset; choose one of a100-40, a100-80, h"),
        ("name = ", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_reported_by_its_key(text: str, reported: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text if text.startswith("base") else f'base = "h100"\n{text}\n')
    with pytest.raises(UserError, match=re.escape(f"{path}: {reported}")) as caught:
        read_hardware(str(path))
    assert "\n" not in str(caught.value).strip()


def test_a_file_without_a_base_lacks_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('compute_device = "cuda"\nranks_per_host = 8\n')
    with pytest.raises(UserError, match=r"missing hbm_bytes, ddr_bytes, hbm_bandwidth.*; correct it, or take the rest"):
        read_hardware(str(path))
    path.write_text("")
    with pytest.raises(UserError, match="empty"):
        read_hardware(str(path))


@pytest.mark.parametrize(
    ("name", "reported"),
    [
        ("h10", "no such preset; choose one of a100-40, .* (did you mean 'h100'?)"),
        ("nothing.toml", "no such file"),
        ("", "hardware '': no such preset"),
    ],
)
def test_an_unknown_name_is_reported_with_the_presets(name: str, reported: str) -> None:
    with pytest.raises(UserError, match=reported.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")) as caught:
        read_hardware(name)
    assert "a100-80" in str(caught.value)


def test_ranks_fill_hosts() -> None:
    h100 = PRESETS["h100"]
    assert [h100.local_world_size(ranks) for ranks in (1, 3, 8, 16, 1024)] == [1, 3, 8, 8, 8]
    with pytest.raises(UserError, match=r"12 ranks on h100: not a multiple of the 8 ranks of a host; take 8 or 16"):
        h100.local_world_size(12)
    with pytest.raises(UserError, match="0 ranks: expected 1 to 65,536"):
        h100.local_world_size(0)
