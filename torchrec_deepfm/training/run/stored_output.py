"""A run at an address: its files are written on the local disk and stored at each checkpoint and at the end.

Checkpoints go to ``checkpoints/`` there themselves. A start fetches the other files first, so that a run resumes on any
host. ``summary.json`` is stored last: a run without it is not finished, as on a disk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from torchrec_deepfm.distributed.process_group import is_main, on_main
from torchrec_deepfm.remote.address import address_of
from torchrec_deepfm.remote.places import Output, fetched
from torchrec_deepfm.training.run import folder as run_folder

_SMALL: Final = (
    run_folder.CONFIG, run_folder.SUMMARY, run_folder.SAVED, run_folder.PLAN, run_folder.DATA, "metrics.jsonl",
    "calibration.json", "curves.json", "importance.json",
)  # fmt: skip


class RunOutput(Output):
    """The folder of a run."""

    def begin(self) -> None:
        """Fetch what an earlier start has stored."""
        if self.hold():
            self.kept = False  # checkpoints are at the address, and so is all that they need
            self.fetch(_outside_checkpoints)

    def publish(self) -> None:
        """Store what the next start needs."""
        if self.address is not None:
            later = (f"{run_folder.CHECKPOINTS}/", run_folder.SUMMARY, "tensorboard/", "profile/")
            self.store(lambda name: not name.startswith(later))

    def finish(self) -> None:
        """Store everything."""
        if self.address is not None:
            self.store(_outside_checkpoints, last=[run_folder.SUMMARY])


@contextmanager
def run_output(path: Path) -> Iterator[RunOutput]:
    """Give the folder of a run, which is stored at the end if its path is an address; a collective.

    Raises ``UserError``: the address can't be reached, or another process of this host is writing it.
    """
    output = RunOutput(path)
    try:
        on_main(output.begin)
        yield output
        on_main(output.finish)
    finally:
        if is_main():
            output.close(done=True)


def fetch_run(path: Path) -> Path:
    """Return a local folder with what a run's commands read; a local path is returned as it is."""
    return fetched(
        path,
        lambda name: name in _SMALL or name.startswith(("encoder/", "checkpoint/", "checkpoint_")),
        also=lambda name: name.startswith("evaluate") and name.endswith(".json"),
    )


def fetch_records(path: Path) -> Path:
    """Return a local folder with the small files of the runs in a folder; a local path is returned as it is."""
    return fetched(path, lambda name: name.rpartition("/")[2] in _SMALL and "/checkpoint" not in f"/{name}")


def is_remote(path: Path) -> bool:
    """Whether a path is an address."""
    return address_of(path) is not None


def _outside_checkpoints(name: str) -> bool:
    return not name.startswith(f"{run_folder.CHECKPOINTS}/")
