"""``python -m torchrec_deepfm <command>``, and the command ``torchrec-deepfm``."""

import os
import signal
import sys
from typing import NoReturn

from torchrec_deepfm.launch.interrupt import Interrupt
from torchrec_deepfm.launch.processes import UNDER_LAUNCHER, end_with_parent, local_world_size


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    interrupt = Interrupt()  # before the imports, which take a second
    code = 1
    try:
        try:
            from torchrec_deepfm.cli.main import load

            load(sys.argv[1:])
        except ModuleNotFoundError as error:
            remedy = "run `make setup` and `source .venv/bin/activate` in the clone"
            sys.stderr.write(f"torchrec_deepfm: {sys.executable} lacks the package {error.name!r}; {remedy}\n")
            sys.exit(2)
        interrupt.imported()
        code = run()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        if not interrupt.pressed:
            raise
    if interrupt.pressed and code != 0:
        interrupt.leave()
    if "RANK" in os.environ:
        # DistributedDataParallel keeps gloo's threads alive past destroy_process_group, and while the interpreter is
        # taken down around them a rank that has done all its work now and then dies of SIGABRT ("terminate called
        # without an active exception"). Everything is written and closed by now: leave without that.
        os._exit(code)
    sys.exit(code)


def run() -> int:
    """Run the command line and give back its exit code."""
    from torchrec_deepfm.cli.main import main as run_command
    from torchrec_deepfm.launch.cpu_threads import choose_threads
    from torchrec_deepfm.launch.huge_pages import use_huge_pages

    end_with_parent(os.environ.get(UNDER_LAUNCHER), signal.SIGKILL)
    choose_threads(local_world_size())
    use_huge_pages()
    try:
        run_command()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        # Who reads has enough, such as head. What is not yet written goes nowhere, or Python would try it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports a program that SIGPIPE ended
    return 0


if __name__ == "__main__":
    main()
