"""A rank of the tests of faults: the command line as it is, with a log of the rows it trains on, and faults on demand.

    python -m torch.distributed.run ... -m tests.faults.rank --data ... --output ...

FAULTS_LOG     folder for the rows that this rank trains on, a line per step
FAULTS_SLEEP   seconds to sleep in each step, so that kills have something to hit
FAULTS_HOLD    a file: while it exists, a rank waits after its fifth step, unless it is asked to stop
FAULTS         JSON list of {"at": PHASE, "rank": R, "step": N, "do": DEED}; each happens once in FAULTS_LOG's lifetime
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.faults.runs import rows_of
from tests.support.fork import LAUNCHER
from tests.support.pictures import undrawn
from torchrec_deepfm import __main__ as command_line
from torchrec_deepfm.training import loop
from torchrec_deepfm.training.checkpoint import dcp, manager, store

HELD_AFTER = 5
_step = _steps_done = 0


def log_folder() -> Path:
    return Path(os.environ["FAULTS_LOG"])


def my_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def fault(at: str, step: int) -> None:
    """Do what is asked for at this place, the first time that this rank gets here at this step."""
    for number, each in enumerate(json.loads(os.environ.get("FAULTS", "[]"))):
        if each["at"] != at or each["rank"] != my_rank() or each["step"] != step:
            continue
        done = log_folder() / f"fault_{number}"
        if done.exists():
            continue
        done.touch()
        match each["do"]:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill once saved":  # a save continues beside the steps
                _checkpoints.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                _checkpoints.wait()
                os.kill(os.getpid(), signal.SIGSTOP)
            case "term":
                os.kill(os.getpid(), signal.SIGTERM)
            case "term parent":
                os.kill(int(os.environ[LAUNCHER]), signal.SIGTERM)
            case "nan":
                with torch.no_grad():
                    _loop._model.state_dict()["model.bias"].fill_(torch.nan)
            case "memory":
                torch.empty(2**45)
            case "busy":
                _checkpoints.wait()
                time.sleep(3600)
            case "fill":
                _checkpoints.wait()
                fill(Path(each["path"]) / "filling")
            case "read-only":
                _checkpoints.wait()
                subprocess.run(["mount", "-o", "remount,ro", each["path"]], check=True)
            case "limit":
                _checkpoints.wait()
                resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
            case "shrink":
                for path in Path(each["path"]).glob("train*.npy"):
                    os.truncate(path, path.stat().st_size // 2)
                for path in Path(each["path"]).glob("day_0*.npy"):
                    os.truncate(path, path.stat().st_size // 2)
            case "vanish":
                for path in Path(each["path"]).glob("*.npy"):
                    path.unlink()
            case deed:
                raise AssertionError(deed)


_loop: Any = None
_checkpoints: Any = None
_fed: dict[int, list[int]] = {}  # the rows of each batch that was read, by its step


def fill(path: Path) -> None:
    """Leave no room on a file system."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def before(owner: Any, name: str, call: Callable[..., None]) -> None:
    """Let something happen before a function of the package."""
    inner = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call(*args, **kwargs)
        return inner(*args, **kwargs)

    setattr(owner, name, wrapped)


def after(owner: Any, name: str, call: Callable[..., None]) -> None:
    """Let something happen after a function of the package."""
    inner = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        call(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)


def count(self: Any, *_: Any) -> None:
    global _step, _loop
    _loop, _step = self, self.position.step + 1
    fault("step", _step)


def save(self: Any, step: int, *_: Any, **__: Any) -> None:
    global _checkpoints
    _checkpoints = self
    fault("before the save", step)


def feed(inner: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
    """Let the rows of each batch be kept until its step."""

    def batches(self: Any) -> Iterator[Any]:
        for step, batch in enumerate(inner(self), self.position.step + 1):
            _fed[step] = rows_of(batch.dense_features)
            yield batch

    return batches


def log(self: Any, *_: Any) -> None:
    step = self.position.step
    with (log_folder() / f"rank_{my_rank()}_{os.getpid()}").open("a") as file:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        entry = {"at": time.time(), "step": step, "rank": my_rank(), "ranks": ranks, "rows": _fed.pop(step)}
        entry["epoch"] = self.position.epoch
        file.write(json.dumps(entry) + "\n")
    time.sleep(float(os.environ.get("FAULTS_SLEEP", "0")))
    hold(self)


def hold(self: Any) -> None:
    global _steps_done
    _steps_done += 1
    path = Path(os.environ.get("FAULTS_HOLD", os.devnull))
    while path.is_file() and _steps_done >= HELD_AFTER and not self._context.requests.signum:
        time.sleep(0.02)


def step_of(folder: os.PathLike[str] | str) -> int:
    """The step of a checkpoint's folder, -1 of any other."""
    name = Path(folder).name
    return int(name.split("_")[1].split(".")[0]) if name.startswith("step_") else -1


def main() -> None:
    before(loop.Loop, "_step", count)
    after(loop.Loop, "_step", log)
    loop.Loop._batches = feed(loop.Loop._batches)  # type: ignore[method-assign]
    before(loop.Loop, "check_between_steps", lambda self: fault("evaluation", self.position.step))
    before(manager.Checkpoints, "save", save)
    before(dcp.CpuStager, "stage", lambda *_: fault("the copy", _step))
    # The files of this rank are written; the others' may not be.
    after(dcp.Writer, "write_data", lambda self, *_, **__: fault("between ranks", step_of(self.path)))
    before(store.Store, "commit", lambda self, step, *_: fault("before the manifest", step))
    after(store.Store, "commit", lambda self, step, *_: fault("after the rename", step))
    sync = store._sync_folder

    def sync_and_fail(folder: Path) -> None:
        sync(folder)
        if folder.name.endswith(".partial"):
            fault("before the rename", step_of(folder))

    store._sync_folder = sync_and_fail
    sys.argv = ["torchrec_deepfm", "train", *sys.argv[1:]]
    with undrawn():
        code = command_line.run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
