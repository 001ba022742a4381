"""How long planning takes for long lists of tables, and how far from the lower bound its plan is.

    python -m benchmarks.planner.long_lists
    python -m benchmarks.planner.long_lists --tables 1000 --ranks 1024 --seeds 1

Lists as in ``search``: power-law rows, 16 to 128 wide, 1 to 100 ids per sample, hosts of 8, TorchRec's bandwidths,
8,192 samples per rank. Enumeration, both searches (the balanced one and TorchRec's own) and the bound are timed.
"""

import random
import time
from dataclasses import dataclass

import tyro

from torchrec_deepfm import console

console.quiet()

from benchmarks._lib.formatting import markdown, versions, versions_line  # noqa: E402
from benchmarks.planner.cases import power_law_pooling, power_law_rows  # noqa: E402
from torchrec_deepfm.sharding.inputs.presets import PRESETS  # noqa: E402
from torchrec_deepfm.sharding.inputs.tables import Table  # noqa: E402
from torchrec_deepfm.sharding.search.plan_tables import Planning  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to plan."""

    tables: int = 200
    """Tables of a list."""
    ranks: tuple[int, ...] = (16, 64)
    """Numbers of ranks."""
    seeds: tuple[int, ...] = (1, 2)
    """A list for each."""


def long_list(count: int, seed: int) -> list[Table]:
    """Draw a list of tables."""
    draw = random.Random(seed)
    return [
        Table(
            name=f"t{number}",
            num_embeddings=power_law_rows(draw),
            embedding_dim=draw.choice((16, 32, 64, 128)),
            pooling_factor=power_law_pooling(draw),
        )
        for number in range(count)
    ]


def main(options: Options) -> None:
    """Print a table."""
    lines = []
    for ranks in options.ranks:
        for seed in options.seeds:
            started, cpu = time.perf_counter(), time.process_time()
            planning = Planning(long_list(options.tables, seed), PRESETS["torchrec"], ranks, batch_size=8192)
            plan = planning.plan()
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            above = plan.predicted.critical_path_ms / planning.lower_bound_ms - 1
            lines.append((options.tables, ranks, seed, f"{seconds:.1f}", f"{cpu:.1f}", f"{above:.1%}"))
    print(versions_line(versions("torch", "torchrec")))
    print(markdown(("tables", "ranks", "seed", "seconds", "CPU seconds", "above the bound"), lines))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
