"""A rank of ``two_ranks.py``: the step of ``step_ours.py``, as many steps on all ranks.

    RANK=0 WORLD_SIZE=2 ... python -m benchmarks.training.steps.step_ranks --core 0 --precision bf16

Rank 0 answers the controller, and the others follow it. ``--no-all-reduce`` leaves out that of the dense gradients:
the ranks' weights then differ; only the time is of use.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks._lib.windows import serve
from benchmarks.training.criteo_rows import CATEGORICAL, arguments
from benchmarks.training.steps.step_ours import deepfm, pipelined

STEPS = 8  # between two messages of rank 0
REPEATS = 50


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--core", type=int, required=True)
    parser.add_argument("--no-all-reduce", action="store_true")
    options = arguments(parser)
    os.sched_setaffinity(0, {options.core})

    def make(options: Any, device: Any) -> tuple[Any, Any]:
        import torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        def keep(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            own: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            own.set_result(bucket.buffer())
            return own

        model, optimizer = deepfm(options, device)
        replicated = model._dmp_wrapped_module
        assert isinstance(replicated, DistributedDataParallel)
        if options.no_all_reduce:
            replicated.register_comm_hook(None, keep)
        return model, optimizer

    def lead(step: Callable[[], int], about: dict[str, Any], wait: Callable[[], object] | None) -> None:
        import torch
        import torch.distributed as dist

        ranks, go = dist.get_world_size(), torch.ones(1)
        if ranks > 1:
            about |= collectives_alone(options)

        def steps() -> int:
            dist.broadcast(go, 0)
            return ranks * sum(step() for _ in range(STEPS))

        if dist.get_rank() == 0:
            serve(steps, about, wait)
            dist.broadcast(go.zero_(), 0)
        else:
            while True:
                dist.broadcast(go, 0)
                if not go:
                    break
                for _ in range(STEPS):
                    step()

    pipelined(options, make, lead)


def collectives_alone(options: Any) -> dict[str, float]:
    """Milliseconds of a step's collectives with nothing around them, medians: what a core each allows."""
    import torch
    import torch.distributed as dist

    from benchmarks.training.floors import layers

    ranks = dist.get_world_size()
    rows = torch.zeros(options.batch_size * CATEGORICAL * (options.factor_dim + 1))
    ids = torch.zeros(options.batch_size * CATEGORICAL, dtype=torch.int32)
    gradients = torch.zeros(sum(n * m for n, m in layers(options.factor_dim, dlrm=False)))
    into = {id(one): torch.empty_like(one) for one in (rows, ids)}
    assert rows.numel() % ranks == ids.numel() % ranks == 0

    def milliseconds(*work: Callable[[], object]) -> float:
        times = []
        for _ in range(REPEATS):
            dist.barrier()
            start = time.perf_counter()
            for one in work:
                one()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def exchange(what: torch.Tensor) -> Callable[[], object]:
        return lambda: dist.all_to_all_single(into[id(what)], what)

    return {
        # pooled rows and their gradients; ids and lengths
        "all-to-all alone, ms": milliseconds(*[exchange(one) for one in (rows, rows, ids, ids)]),
        "all-reduce alone, ms": milliseconds(lambda: dist.all_reduce(gradients)),
    }


if __name__ == "__main__":
    main()
