"""`torchx run`, as a user types it: real processes, from the repository's root."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torchx.schedulers import get_scheduler_factories

from torchrec_deepfm.cli.main import parse
from torchrec_deepfm.cli.train import Train

ROOT = Path(__file__).resolve().parents[2]
TORCHX = Path(sys.executable).parent / "torchx"


def torchx(*words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    # As without an activated environment: the plugin has to find the ranks' python by itself.
    environment = os.environ | {"PATH": os.defpath} | env
    environment.pop("VIRTUAL_ENV", None)
    return subprocess.run(
        [TORCHX, *words], capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("component", "command"),
    [
        ("apps/deepfm.py", "train"),
        ("apps/deepfm.py:train", "train"),
        ("apps/deepfm.py:evaluate", "evaluate"),
        (str(ROOT / "apps" / "deepfm.py"), "train"),
        ("torchrec_deepfm.deepfm:evaluate", "evaluate"),
    ],
)
def test_a_file_needs_no_component(component: str, command: str) -> None:
    # Without -s: .torchxconfig makes local_cwd the default here.
    run = torchx("run", "--dryrun", component, "-j", "1x3", "--", "--batch-size", "2048")
    assert run.returncode == 0, run.stderr
    request = re.sub(r"""['"]\s*\n\s*['"]""", "", run.stdout)  # printed broken into lines
    assert "--nproc_per_node 3" in request
    assert f"-m torchrec_deepfm {command} --batch-size 2048" in request
    assert "local_cwd" in run.stdout


def test_an_option_of_the_command_may_come_more_than_once() -> None:
    rules = ["--constraint", "C1=row_wise", "--constraint", "C2=table_wise", ">1e6=column_wise"]
    run = torchx("run", "--dryrun", "apps/deepfm.py", "--", "--seed", "3", *rules)
    assert run.returncode == 0, run.stderr
    request = re.sub(r"""['"]\s*\n\s*['"]""", "", run.stdout)
    words = re.search(r"-m torchrec_deepfm train (.*?)[\"\]]", request)
    assert words is not None
    command = parse(["train", *shlex.split(words[1])])
    assert isinstance(command, Train)
    assert command.options.rules == (rules[1], *rules[3:])
    assert command.config.seed == 3


def test_jobs_of_several_hosts_meet_at_ports_of_their_own() -> None:
    run = torchx("run", "--dryrun", "apps/deepfm.py", "-j", "2x1", "--rdzv_port", "29777")
    assert run.returncode == 0, run.stderr
    assert "TORCHX_RANK0_HOST:=localhost}:29777 " in re.sub(r"""['"]\s*\n\s*['"]""", "", run.stdout)


def test_the_scheduler_can_be_named() -> None:
    run = torchx("run", "-s", "slurm", "--dryrun", "apps/deepfm.py", "-j", "2x8", "--gpu", "8")
    assert run.returncode == 0, run.stderr
    assert "sbatch" in run.stdout
    assert "--nproc_per_node 8" in run.stdout.replace("'", "")


def test_from_any_folder_the_components_run_on_this_machine(tmp_path: Path) -> None:
    run = torchx("run", "--dryrun", "torchrec_deepfm.deepfm", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "PopenRequest" in run.stdout or "local_cwd" in run.stdout
    assert "-m torchrec_deepfm train" in re.sub(r"""['"]\s*\n\s*['"]""", "", run.stdout)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ("aws_sagemaker", "its Python packages are not installed; run: pip install "),
        ("ray", "its Python packages are not installed; run: pip install 'torchx[ray]'"),
        ("lsf", "bhosts is not on this machine; submit from a node of the cluster, or add --dryrun"),
    ],
)
def test_what_a_scheduler_lacks_is_one_line(scheduler: str, words: str) -> None:
    if scheduler not in get_scheduler_factories():
        pytest.skip(f"this TorchX has no scheduler {scheduler}")
    run = torchx("run", "-s", scheduler, "apps/deepfm.py", PATH=os.defpath)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith(f"error: -s {scheduler}: {words}")
    assert "Traceback" not in run.stderr


def test_builtins_stay_reachable() -> None:
    run = torchx("run", "utils.echo", "--msg", "hello there")
    assert run.returncode == 0, run.stderr
    assert "echo/0 hello there" in run.stderr
    run = torchx("run", "--dryrun", "dist.ddp", "-j", "1x2", "--script", "main.py")
    assert run.returncode == 0, run.stderr
    assert "torchrun" in run.stdout


def test_a_file_with_one_component_needs_no_default(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from torchx import specs\n"
        "def greet(msg: str = 'hi') -> specs.AppDef:\n"
        '    """Greets.\n\n    Args:\n        msg: what to say\n    """\n'
        "    return specs.AppDef('greet', roles=[specs.Role('greet', '', entrypoint='echo', args=[msg])])\n"
    )
    run = torchx("run", str(file), "--msg", "good day")
    assert run.returncode == 0, run.stderr
    assert "greet/0 good day" in run.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["apps/nothing.py"],
            "error: apps/nothing.py: cannot be read (No such file or directory); name a file of TorchX components",
        ),
        (
            ["apps/nothing.py:train"],
            "error: apps/nothing.py: cannot be read (No such file or directory); name a file of TorchX components",
        ),
        (
            ["apps/deepfm.py:nothing"],
            (
                "error: apps/deepfm.py: has no component 'nothing'; write apps/deepfm.py:evaluate or "
                "apps/deepfm.py:experiment or apps/deepfm.py:export or apps/deepfm.py:plan or "
                "apps/deepfm.py:predict or apps/deepfm.py:prepare or apps/deepfm.py:serve or "
                "apps/deepfm.py:train"
            ),
        ),
        (
            ["tests/launch/test_torchx.py"],
            (
                "error: tests/launch/test_torchx.py: has no TorchX component, that is, no function with the return "
                "type specs.AppDef"
            ),
        ),
        (
            ["README.md.py"],
            "error: README.md.py: cannot be read (No such file or directory); name a file of TorchX components",
        ),
    ],
)
def test_a_wrong_name_is_reported_in_one_line(words: list[str], line: str) -> None:
    run = torchx("run", *words)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", f"{line}\n")


def test_several_components_and_no_default(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def b() -> AppDef: ...\ndef a() -> AppDef: ...\ndef _c() -> AppDef: ...\n")
    run = torchx("run", str(file))
    assert run.returncode == 2
    assert run.stderr == f"error: {file}: has several components and no DEFAULT_COMPONENT; write {file}:a or {file}:b\n"


def test_options_of_the_command_before_the_dashes() -> None:
    run = torchx("run", "apps/deepfm.py", "--batch-size", "2048")
    assert run.returncode == 2
    *_, complaint, hint = run.stderr.splitlines()
    assert "unrecognized arguments: --batch-size" in complaint
    assert hint == "Options of the command itself come after `--`: torchx run apps/deepfm.py -- OPTIONS"


@pytest.fixture
def job(tmp_path: Path) -> str:
    """A component whose only process, of this Python, stops over what its argument says."""
    file = tmp_path / "job.py"
    file.write_text(
        "from torchx import specs\n"
        "def job(program: str) -> specs.AppDef:\n"
        '    """Runs a program.\n\n    Args:\n        program: in Python\n    """\n'
        "    role = specs.Role('job', '', entrypoint='python', args=['-c', program])\n"
        "    return specs.AppDef('job', roles=[role])\n"
    )
    return str(file)


def test_a_users_mistake_in_a_job_is_the_last_line(job: str) -> None:
    program = (
        "from torchrec_deepfm.errors import UserError; from torchrec_deepfm.launch.launcher import exit_with; "
        "exit_with(UserError('--data x: no such folder'))"
    )
    run = torchx("run", job, "--program", program)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].endswith("ERROR    --data x: no such folder")
    assert "AppStatus" not in run.stderr


@pytest.mark.campaign
def test_a_users_mistake_on_two_ranks_is_reported_once_by_them_and_last_by_torchx(tmp_path: Path) -> None:
    output = tmp_path / "never"
    run = torchx("run", "apps/deepfm.py", "-j", "1x2", "--", "--data", "nowhere", "--output", str(output))
    assert run.returncode == 2
    reported = [line for line in run.stderr.splitlines() if "nowhere: no such folder; make it with prepare" in line]
    assert len(reported) == 2
    assert reported[0].startswith("train/0 error: ")
    assert reported[1] == run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stdout + run.stderr
    assert "CUDA_VISIBLE_DEVICES" not in run.stderr  # TorchX's advice: here the ranks divide the GPUs themselves
    assert not output.exists()


def test_any_other_failure_of_a_job_is_reported_as_torchx_does(job: str) -> None:
    run = torchx("run", job, "--program", "raise SystemExit(2)")
    assert run.returncode == 1
    assert "AppStatus" in run.stderr


def test_the_job_runs_on_the_python_of_torchx(job: str) -> None:
    run = torchx("run", job, "--program", "import sys; print('prefix', sys.prefix)")
    assert run.returncode == 0, run.stderr
    assert f"job/0 prefix {sys.prefix}\n" in run.stderr


def test_ctrl_c_stops_the_job_without_a_traceback(job: str) -> None:
    process = subprocess.Popen(
        [TORCHX, "run", job, "--program", "import time; print('started', flush=True); time.sleep(60)"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stderr is not None
    seen = ""
    deadline = time.monotonic() + 60
    while "started" not in seen and time.monotonic() < deadline:
        seen += process.stderr.readline()
    process.send_signal(2)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest
