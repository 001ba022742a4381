"""Starts single-rank jobs in a fraction of a second: everything is imported once, and each job is a fork of that.

The jobs are processes of their own like any other, to be killed and waited for. One JSON request a line on standard
input, one JSON answer a line on standard output: {"start": {"argv", "env", "out", "err"}} -> {"pid"},
{"wait": pid, "block": bool} -> {"code": exit code or null}.
"""

import json
import os
import sys
from typing import Any

from tests.faults import rank


def start(job: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        for number, (path, flags) in enumerate(
            [
                ("/dev/null", os.O_RDONLY),
                *[(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("out", "err")],
            ]
        ):
            os.dup2(os.open(path, flags, 0o644), number)
        os.environ.clear()
        os.environ.update(job["env"])
        sys.argv = ["rank", *job["argv"]]
        rank.main()
    finally:
        os._exit(70)  # main does not return


def wait(pid: int, block: bool) -> int | None:
    found, status = os.waitpid(pid, 0 if block else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: dict[str, Any] = {"pid": start(request["start"])}
        else:
            answer = {"code": wait(request["wait"], request["block"])}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
