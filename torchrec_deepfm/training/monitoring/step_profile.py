"""``train --profile N``: where the time of N steps goes, by torch's profiler."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Protocol

import torch
from torch.profiler import ProfilerActivity

from torchrec_deepfm.distributed.disk_errors import refused
from torchrec_deepfm.files import write_bytes

# The first steps draw memory, fill the pipeline and start threads.
WARM_UP: Final = 10
_ROWS: Final = 20


class Operator(Protocol):
    """What of ``torch.autograd.profiler_util.FunctionEventAvg`` is shown; times in microseconds."""

    key: str
    count: int
    self_cpu_time_total: float
    self_device_time_total: float


class StepProfiler:
    """Profiles some steps of this rank, after the first ten of this start; 0 for none.

    It writes ``rank_R.json``, a trace that https://ui.perfetto.dev opens, and ``rank_R.txt``, a table of the operators.
    On a GPU its kernels are recorded too.
    """

    def __init__(self, steps: int, folder: Path, rank: int, device: torch.device, say: Callable[[str], None]) -> None:
        self._steps, self._folder, self._rank = steps, folder, rank
        self._say = say if rank == 0 else lambda line: None
        self._on_gpu = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._profile = torch.profiler.profile(activities=activities) if steps else None
        self._done = 0

    def after_step(self) -> None:
        """Count a step; start after the last of the warm-up, write after the last that is profiled."""
        if self._profile is None:
            return
        self._done += 1
        if self._done == WARM_UP:
            self._profile.start()
        elif self._done == WARM_UP + self._steps:
            self._write(self._steps)

    def close(self, *, wrote: bool = True) -> None:
        """End a profile that is not written yet; ``wrote``: with what it has, else without."""
        if self._profile is None:
            return
        steps = self._done - WARM_UP
        if steps > 0 and wrote:
            self._write(steps)
        elif steps >= 0:
            self._profile.stop()
        elif wrote:
            self._say(f"--profile {self._steps}: this start had {self._done} steps; it needs more than {WARM_UP}")
        self._profile = None

    def _write(self, steps: int) -> None:
        profile, self._profile = self._profile, None
        assert profile is not None
        profile.stop()
        table = operator_table(profile.key_averages(), steps, on_gpu=self._on_gpu)
        path = self._folder / f"rank_{self._rank}.json"
        try:
            self._folder.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder, path.name)
                profile.export_chrome_trace(str(trace))
                write_bytes(path, trace.read_bytes())
            write_bytes(path.with_suffix(".txt"), f"{table}\n".encode())
        except OSError as error:
            raise refused(path, error, "run the same command without --profile") from error
        self._say(f"{table}\nwrote {path} (open it in https://ui.perfetto.dev) and {path.with_suffix('.txt')}")


def operator_table(operators: Iterable[Operator], steps: int, *, on_gpu: bool) -> str:
    """Format the operators with the most time of their own, the largest first.

    ``operators``: averages over all ``steps``. ``on_gpu``: whether the time counts that kernels take there, or that of
    the CPU. Returns lines: milliseconds and calls per step, share of the time of all operators.
    """
    times = {one: one.self_device_time_total if on_gpu else one.self_cpu_time_total for one in operators}
    total = sum(times.values()) or 1.0
    lines = [
        f"{'ms per step':>12}{'share':>8}{'calls':>8}  operator, by its own time on the {'GPU' if on_gpu else 'CPU'}"
    ]
    for one in sorted(times, key=lambda one: -times[one])[:_ROWS]:
        each, calls = times[one] / 1000 / steps, one.count / steps
        lines.append(f"{each:>12.3f}{times[one] / total:>8.1%}{calls:>8.1f}  {one.key}")
    lines.append(f"{total / 1000 / steps:>12.3f}{1:>8.1%}{'':>8}  all operators")
    return "\n".join(lines)
