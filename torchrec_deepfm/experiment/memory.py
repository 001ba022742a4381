"""The most memory that a piece of work needs in this process."""

from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """Follows the memory of this process from now on.

    On a GPU it is what PyTorch allocates there. On a CPU it is the resident memory as Linux keeps it, with its highest
    mark set back at the start.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
            return
        try:
            _CLEAR_REFS.write_text("5", encoding="ascii")  # proc(5): sets VmHWM back to what is resident now
            self._before = _resident("VmRSS:")
        except OSError:  # not Linux, or a sandbox that forbids it
            self._before = None

    def bytes(self) -> int | None:
        """Return the peak since the start in bytes above the value at the start; None where the system has none."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device)) - self._before
        return max(_resident("VmHWM:") - self._before, 0)


def _resident(key: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} does not report {key}")
