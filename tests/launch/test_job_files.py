"""docs/kubernetes: read by the packages that own the formats; their commands start ranks that meet, on this machine."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from torchrec_deepfm.cli import main as command_line

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "docs" / "kubernetes"
IMAGE = "registry.example/torchrec_deepfm:cuda"


def train_job() -> tuple[dict[str, Any], dict[str, Any]]:
    runtime, job = yaml.safe_load_all((FILES / "trainjob.yaml").read_text(encoding="utf-8"))
    return runtime, job


def skypilot() -> dict[str, Any]:
    task: dict[str, Any] = yaml.safe_load((FILES / "skypilot.yaml").read_text(encoding="utf-8"))
    return task


def commands() -> dict[str, tuple[str, list[dict[str, str]]]]:
    """The shell command of each file and the variables that its two hosts get, with a free port of this machine."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    trainer = train_job()[1]["spec"]["trainer"]
    words = " ".join([*trainer["command"], *trainer["args"]])
    # Kubernetes itself replaces $(NAME) in the words of a container.
    kubeflow = re.sub(r"\$\((\w+)\)", r"$\1", words).replace("python ", f"{sys.executable} ", 1)
    of_all = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": port}
    run = skypilot()["run"].replace("/opt/torchrec_deepfm/.venv/bin/python", sys.executable).replace("29500", port)
    of_sky = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2"}
    return {
        "trainjob.yaml": (kubeflow, [of_all | {"PET_NODE_RANK": rank} for rank in "01"]),
        "skypilot.yaml": (run, [of_sky | {"SKYPILOT_NODE_RANK": rank} for rank in "01"]),
    }


@pytest.mark.parametrize("file", ["trainjob.yaml", "skypilot.yaml"])
def test_its_command_starts_ranks_that_meet(file: str, tmp_path: Path) -> None:
    """In place of the training a program that prints what the ranks know of each other."""
    (tmp_path / "rank.py").write_text('import os; print(os.environ["RANK"], "of", os.environ["WORLD_SIZE"])')
    command, hosts = commands()[file]
    front, training, _ = command.partition("-m torchrec_deepfm train")
    assert training
    base = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launchers = [
        subprocess.Popen(
            ["bash", "-c", f"{front} rank.py"], cwd=tmp_path, env=base | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for variables in hosts
    ]  # fmt: skip
    try:
        ended = [launcher.communicate(timeout=120) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0, 0], ended
    assert sorted(out.strip() for out, _ in ended) == ["0 of 2", "1 of 2"]


@pytest.mark.parametrize("file", ["trainjob.yaml", "skypilot.yaml"])
def test_its_options_are_those_of_train(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All that is wrong on this machine is that there is no /data/prepared."""
    words = commands()[file][0].partition("-m torchrec_deepfm ")[2].split()
    with pytest.raises(SystemExit) as stop:
        command_line.main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: /data/prepared: no such folder")


def test_kubeflow_reads_the_train_job() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs pip install kubeflow-trainer-api")
    runtime, job = train_job()
    # What is misspelt is lost on the way.
    assert models.TrainerV1alpha1TrainingRuntime.from_dict(runtime).to_dict() == runtime
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    job["spec"]["trainer"]["numNode"] = 2
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() != job


def test_each_host_of_the_train_job_has_volume_shared_memory_and_gpus() -> None:
    runtime, job = train_job()
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (hosts,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    template = hosts["template"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    # Trainer fills the job's part into the container of this name; the result is a pod that Kubernetes takes.
    trainer = job["spec"]["trainer"]
    container |= {"resources": trainer["resourcesPerNode"], "command": trainer["command"], "args": trainer["args"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
    kubernetes_validate.validate(pod, "1.30", strict=True)
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": hosts["template"]["spec"]}
    kubernetes_validate.validate(whole, "1.30", strict=True)
    assert (container["name"], container["image"]) == ("node", IMAGE)
    assert hosts["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    volumes = {one["name"]: one for one in template["spec"]["volumes"]}
    mounted = {one["mountPath"]: volumes[one["name"]] for one in container["volumeMounts"]}
    assert mounted["/data"]["persistentVolumeClaim"] == {"claimName": "clicks"}
    assert mounted["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(trainer["numProcPerNode"])  # a rank per GPU


def test_skypilot_reads_its_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sky = pytest.importorskip("sky", reason="needs pip install skypilot, in an environment of its own")
    monkeypatch.setenv("HOME", str(tmp_path))
    task = sky.Task.from_yaml(str(FILES / "skypilot.yaml"))
    (resources,) = task.resources
    assert (task.num_nodes, task.volumes, task.run) == (2, {"/data": "clicks"}, skypilot()["run"])
    assert (resources.accelerators, resources.image_id) == ({"H100": 8}, {None: f"docker:{IMAGE}"})
    assert str(resources.cloud) == "Kubernetes"
