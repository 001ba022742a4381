"""What is seen when ranks fail below torchrec_deepfm.launch: real ranks, started by it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import run_module
from torchrec_deepfm.launch.cpu_threads import SPIN_COUNT

MISTAKE = (
    "from torchrec_deepfm.errors import UserError; from torchrec_deepfm.launch.launcher import exit_with; "
    "exit_with(UserError('day_0 row 3: label 7'))"
)


def ranks(tmp_path: Path, program: str, options: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "program.py"
    script.write_text(f"import os, sys, time\nrank = int(os.environ['RANK'])\n{program}\n")
    return run_module(["torchrec_deepfm.launch", "--standalone", "--nproc_per_node", "2", *options, str(script)], **env)


@pytest.mark.parametrize("program", [MISTAKE, f"if rank == 1:\n    {MISTAKE}\ntime.sleep(60)"], ids=["both", "one"])
def test_a_users_mistake_is_reported_once(tmp_path: Path, program: str) -> None:
    run = ranks(tmp_path, program)
    assert (run.returncode, run.stderr) == (2, "error: day_0 row 3: label 7\n")


def test_it_is_reported_although_another_rank_fails_over_it(tmp_path: Path) -> None:
    # Rank 0 loses its peer and fails at once, before rank 1's mistake is known.
    run = ranks(tmp_path, f"if rank == 0:\n    sys.exit(1)\n{MISTAKE}")
    assert run.returncode in (1, 2)
    assert run.stderr.splitlines()[-1].startswith("error: ")
    assert len(run.stderr.splitlines()) == 1


def test_of_a_crash_the_rank_tells_the_cause(tmp_path: Path) -> None:
    run = ranks(tmp_path, "if rank == 1:\n    raise RuntimeError('boom')\ntime.sleep(60)")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-2:] == [
        "RuntimeError: boom",
        "error: rank 1 ended with exit code 1; see its output above",
    ]


def test_of_a_killed_rank_the_signal_is_named(tmp_path: Path) -> None:
    run = ranks(tmp_path, "if rank == 1:\n    os.kill(os.getpid(), 9)\ntime.sleep(60)")
    expected = "error: rank 1 was killed by SIGKILL; often the machine ran out of memory\n"
    assert (run.returncode, run.stderr) == (1, expected)


def test_a_killed_rank_is_started_again_with_one_that_torchelastic_ended_over_it(tmp_path: Path) -> None:
    """The other rank ends by torchelastic's SIGTERM, which is no request of the user's."""
    first = f"first = not os.path.exists('{tmp_path}/life')\nif first and rank == 1:\n    time.sleep(1)"
    first += f"\n    open('{tmp_path}/life', 'w').close()\n    os.kill(os.getpid(), 9)\nif first:\n    time.sleep(60)"
    run = ranks(tmp_path, first, options=("--max_restarts", "1"))
    assert (run.returncode, run.stderr) == (0, "")


def test_a_rank_that_sigterm_ends_is_not_started_again(tmp_path: Path) -> None:
    """While it is still being imported: afterwards it would save its state and end with 143 by itself."""
    program = (
        f"open('{tmp_path}/life', 'a').write(str(rank))\nif rank == 1:\n    os.kill(os.getpid(), 15)\ntime.sleep(60)"
    )
    run = ranks(tmp_path, program, options=("--max_restarts", "3"))
    assert (run.returncode, run.stderr) == (
        143,
        "error: rank 1 was ended by SIGTERM before it could save; run the same command again\n",
    )
    assert sorted((tmp_path / "life").read_text()) == ["0", "1"]


def test_threads_are_shared_out(tmp_path: Path) -> None:
    """In a Python of its own: torch learns how many threads it may have when it is loaded."""
    script = tmp_path / "program.py"
    script.write_text("import os, sys; sys.stdout.write('{OMP_NUM_THREADS} {GOMP_SPINCOUNT}\\n'.format(**os.environ))")
    # scikit-learn, imported by other tests of this process, sets a KMP_ variable.
    env = {name: value for name, value in os.environ.items() if "OMP_" not in name and not name.startswith("KMP_")}
    default, run = (
        subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, check=True)
        for words in (
            ["-c", "import torch; print(torch.get_num_threads())"],
            ["-m", "torchrec_deepfm.launch", "--standalone", "--nproc_per_node", "2", str(script)],
        )
    )
    share = str(max(1, int(default.stdout) // 2))
    # Nothing on standard error: torchrun would warn that it sets one thread for each rank.
    assert (run.stdout.split(), run.stderr) == ([share, str(SPIN_COUNT)] * 2, "")


def test_threads_that_the_user_has_set_stay(tmp_path: Path) -> None:
    program = "sys.stdout.write(os.environ['OMP_NUM_THREADS'] + os.environ.get('GOMP_SPINCOUNT', '-') + chr(10))"
    run = ranks(tmp_path, program, OMP_NUM_THREADS="3", OMP_WAIT_POLICY="PASSIVE")
    assert run.stdout.split() == ["3-", "3-"]


def test_without_the_launcher_the_line_is_printed() -> None:
    run = subprocess.run([sys.executable, "-c", MISTAKE], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (2, "error: day_0 row 3: label 7\n")


IMPORTS = """
import gc, pathlib, sys
from torchrec_deepfm.launch.processes import import_frozen
pathlib.Path("large.py").write_text("import gc; collected, kept = gc.isenabled(), [[] for _ in range(1000)]")
before = gc.get_freeze_count()
import_frozen("large")
frozen = gc.get_freeze_count()
import_frozen("large")
try:
    import_frozen("missing")
except ModuleNotFoundError:
    print(sys.modules["large"].collected, frozen > before + 1000, gc.get_freeze_count() == frozen, gc.isenabled())
"""


def test_a_library_is_imported_without_collection_and_left_out_of_later_ones(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(IMPORTS)
    done = run_module(["program.py"], cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("False True False True\n", "")
