"""torchrun, with the failure of a rank reported in one line.

When a rank fails, `torchrun` prints its own traceback and a box of some thirty lines, which hide the one line that the
user needs. This launcher runs the same `torch.distributed.run`, and:

- a `UserError` of a rank is passed up (`exit_with`) and printed once, as the last line;
- after any other failure, which the rank's own output explains, one line names the rank;
- every rank gets its share of this machine's threads, where torchrun gives each one thread and a warning;
- ranks are killed when this process is, and under `torchx run -s local_cwd` it stops them when torchx is killed;
- a job on one host listens on the loopback address only, whatever the rendezvous options say (`rendezvous.py`).

    python -m torchrec_deepfm.launch --nproc_per_node 2 -m torchrec_deepfm train --batch-size 2048
"""

import json
import logging
import os
import signal
import sys
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from torchrec_deepfm.errors import USER_ERROR_EXIT_CODES, UserError
from torchrec_deepfm.launch.cpu_threads import choose_threads
from torchrec_deepfm.launch.processes import UNDER_LAUNCHER, UNDER_TORCHX, end_with_parent, import_frozen

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# Start time of the launcher, for the ranks: a restarted rank finds its run by it.
STARTED = "TORCHREC_DEEPFM_STARTED"

# Exit codes of ranks that were asked to stop, and have saved their state: 128 + SIGINT, 128 + SIGTERM.
_STOPPED = (130, 143)
# A rank that was asked to stop before it could take the request.
_ENDED = -signal.SIGTERM

_HINTS = {
    "SIGKILL": "; often the machine ran out of memory",
    "SIGBUS": "; often a data file has shrunk, or its disk was lost, while it was read",
}


def exit_with(error: UserError) -> NoReturn:
    """Ends this process after a `UserError`: one line on standard error and the error's exit code.

    The line also goes into torchelastic's error file, where there is one. As a rank below this launcher it goes only
    there: the launcher prints it, so that the user reads it once and not once per rank.

    Raises ``SystemExit``: always, with ``error.exit_code``.
    """
    line = " ".join(str(error).splitlines())  # a name from a file may contain line breaks
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        reply = {
            "message": {
                "message": line,
                "errorCode": error.exit_code,
                "extraInfo": {"timestamp": str(int(time.time()))},
            }
        }
        Path(error_file).write_text(json.dumps(reply), encoding="utf-8")
    if not error_file or os.environ.get(UNDER_LAUNCHER) in (None, str(os.getpid())):
        sys.stderr.write(f"error: {line}\n")
    sys.exit(error.exit_code)


def explain_failure(failed: "ChildFailedError") -> tuple[str, int]:
    """Explains in one line why the ranks stopped.

    Returns the line, and the exit code to end with: 2 or 3 for a `UserError`, 130 or 143 for a rank that was asked to
    stop, 1 for anything else.
    """
    for failure in failed.failures.values():
        if failure.exitcode in USER_ERROR_EXIT_CODES and isinstance(failure.message, dict):
            return str(failure.message["message"]), failure.exitcode
    rank, failure = failed.get_first_failure()
    if failure.exitcode in _STOPPED:
        name = signal.Signals(failure.exitcode - 128).name
        return f"rank {rank} was stopped by {name}; its state is saved", failure.exitcode
    if failure.exitcode == _ENDED:
        return (
            f"rank {rank} was ended by SIGTERM before it could save; run the same command again",
            128 + signal.SIGTERM,
        )
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = _HINTS.get(name, "")
        return f"rank {rank} was killed by {name}{hint}", 1
    return f"rank {rank} ended with exit code {failure.exitcode}; see its output above", 1


def main(argv: list[str] | None = None) -> None:
    """Runs `torch.distributed.run` with its own command line.

    ``argv``: the arguments of torchrun; those of this process if left out. Raises ``SystemExit``: with code 2 or 3
    after a `UserError` in a rank, with 1 if a rank failed otherwise, with 128 + n if signal n stopped it.
    """
    end_with_parent(os.environ.pop(UNDER_TORCHX, None), signal.SIGTERM)
    try:
        _launch(argv)
    except KeyboardInterrupt:  # before torchelastic takes signals
        sys.stderr.write("Interrupted\n")
        sys.exit(128 + signal.SIGINT)


def _launch(argv: list[str] | None) -> None:
    import_frozen("torch.distributed.run")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    from torchrec_deepfm.launch import rendezvous

    # These log stopped and failed ranks, error files and signals, which the one line replaces.
    for name in ("multiprocessing.api", "multiprocessing.errors.error_handler", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    parser = run.get_args_parser()
    parser.allow_abbrev = False  # or it reads the command's --run as an abbreviation of its own --run-path
    options = parser.parse_args(argv)
    ranks = run.determine_local_world_size(options.nproc_per_node)
    choose_threads(ranks)
    os.environ[UNDER_LAUNCHER] = str(os.getpid())
    os.environ.setdefault(STARTED, f"{datetime.now(UTC):%Y%m%d-%H%M%S}")
    _restart_only_failures()
    rendezvous.harden()
    try:
        if run.parse_min_max_nnodes(options.nnodes)[1] == 1:
            options.rdzv_backend, options.rdzv_endpoint = rendezvous.ONE_HOST, rendezvous.LOOPBACK
            if options.standalone or options.rdzv_id == "none":
                options.rdzv_id = str(uuid.uuid4())
            options.standalone = False
        elif options.rdzv_backend == "c10d":
            rendezvous.wait_for_name(options.rdzv_endpoint)
            rendezvous.refuse_another_program(options.rdzv_endpoint)
        record(run.run)(options)
    except UserError as error:
        exit_with(error)
    except RendezvousError as error:
        exit_with(UserError(rendezvous.explain_rendezvous(error), where=f"--rdzv_endpoint {options.rdzv_endpoint}"))
    except ChildFailedError as failed:
        line, code = explain_failure(failed)
        sys.stderr.write(f"error: {line}\n")
        sys.exit(code)
    except SignalException as stop:  # the ranks are stopped by now
        sys.exit(128 + stop.sigval)


def _restart_only_failures() -> None:
    """Disable restarts after a `UserError`, which the ranks would raise again, and after a requested stop."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    monitor, close = LocalElasticAgent._monitor_workers, SubprocessContext._close
    ended_here: set[int] = set()

    def close_and_remember(self: SubprocessContext, death_sig: signal.Signals, timeout: int = 30) -> None:
        # Torchelastic ends these by SIGTERM, since another rank has failed: nobody asked them to stop.
        ended_here.update(one.proc.pid for one in self.subprocess_handlers.values() if one.proc.poll() is None)
        close(self, death_sig, timeout)

    def monitor_and_give_up(self: LocalElasticAgent, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = monitor(self, worker_group)
        for failure in result.failures.values():
            asked = failure.exitcode in (*_STOPPED, _ENDED) and failure.pid not in ended_here
            if asked or failure.exitcode in USER_ERROR_EXIT_CODES:
                self._remaining_restarts = 0
        return result

    SubprocessContext._close = close_and_remember  # type: ignore[method-assign]
    LocalElasticAgent._monitor_workers = monitor_and_give_up  # type: ignore[method-assign]
