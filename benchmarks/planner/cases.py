"""The planning tasks of ``search``: tables, hardware and ranks, drawn at random or published."""

import math
import random
from dataclasses import dataclass, replace

from torchrec_deepfm.sharding.inputs.hardware import RESERVED, Hardware
from torchrec_deepfm.sharding.inputs.presets import PRESETS
from torchrec_deepfm.sharding.inputs.tables import Table, criteo_dcnv2_tables, criteo_tables


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task; ``memory`` says how much there is."""

    tables: tuple[Table, ...]
    hardware: Hardware
    ranks: int
    batch_size: int
    name: str
    memory: str


def published_case(name: str, ranks: int) -> Case:
    """Criteo Terabyte (``criteo``: one-hot) or MLPerf's DCNv2 (``dcnv2``: multi-hot), 128 wide."""
    tables = criteo_tables(128) if name == "criteo" else criteo_dcnv2_tables(128)
    return Case(tables=tables, hardware=PRESETS["torchrec"], ranks=ranks, batch_size=8192, name=name, memory="enough")


def power_law_rows(draw: random.Random) -> int:
    """Draw the rows of a table: most are small, the largest have 40 million."""
    return int(min(10 ** min(1.5 + draw.paretovariate(1.1), 8.0), 4e7))


def power_law_pooling(draw: random.Random) -> float:
    """Draw the ids per sample, 1 to 100."""
    return float(min(round(draw.paretovariate(0.8)), 100))


def random_case(draw: random.Random) -> Case:
    """Draw tables (20 to 200, power-law rows), hosts, ranks and memory."""
    per_host = draw.choice([1, 4, 5, 8, 24, 40, 72])
    hosts = draw.choice([each for each in (1, 2, 3, 4, 8, 16, 32, 64, 128) if each * per_host <= 1024])
    ranks = per_host * hosts
    count = draw.choice([20, 20, 26, 26, 40, 60] if ranks > 128 else [20, 20, 26, 26, 26, 40, 40, 60, 100, 200])
    style = draw.choice(["one-hot", "multi-hot"])
    widths = draw.choice([(16,), (64,), (128,), (256,), (16, 64, 128), (12, 36, 100), (48, 96, 192)])
    tables = []
    for number in range(count):
        rows = power_law_rows(draw)
        pooling = 1.0 if style == "one-hot" else power_law_pooling(draw)
        tables.append(
            Table(
                name=f"t{number}",
                num_embeddings=rows,
                embedding_dim=draw.choice(widths),
                pooling_factor=pooling,
                weighted=style == "multi-hot" and draw.random() < 0.1,
            )
        )
    hardware = replace(PRESETS[draw.choice(["torchrec", "h100", "a100-80"])], ranks_per_host=per_host)
    memory = draw.choice(["enough", "enough", "tight", "UVM"])
    weights = sum(table.gib for table in tables) * 2**30
    if memory != "enough":
        per_rank = weights / ranks / (1 - RESERVED) * (1.6 if memory == "tight" else 0.7)
        buffers = 8192 * ranks * 16 * sum(table.embedding_dim for table in tables) / ranks
        hardware = replace(hardware, hbm_bytes=math.ceil(per_rank + buffers + 2**28))
    return Case(tables=tuple(tables), hardware=hardware, ranks=ranks, batch_size=8192, name=style, memory=memory)
