"""What TorchX asks Kubernetes for on behalf of the components, without a cluster, against Kubernetes' own schemas."""

from typing import Any

import kubernetes_validate
import pytest
from kubernetes.client import ApiClient
from torchx.schedulers.kubernetes_scheduler import create_scheduler

from tests.launch.test_apps import deepfm

VERSION = "1.30"


def request(**options: Any) -> dict[str, Any]:
    """The Volcano job as it is sent."""
    app = deepfm.train("--data", "/data/prepared", "--output", "/data/run", **options)
    config = {"queue": "research", "namespace": "ml", "service_account": "trainer"}
    dry_run = create_scheduler("test").submit_dryrun(app, config)
    job: dict[str, Any] = ApiClient().sanitize_for_serialization(dry_run.request.resource)
    return job


def test_two_hosts_of_eight_gpus() -> None:
    job = request(
        j="2x8",
        h="deepfm_h100x8",
        image="registry.example/deepfm:1",
        mounts=["type=volume", "src=clicks", "dst=/data"],
        env={"NCCL_DEBUG": "WARN"},
        max_retries=2,
    )
    assert (job["kind"], job["spec"]["queue"], job["spec"]["maxRetry"]) == ("Job", "research", 2)
    first, second = job["spec"]["tasks"]
    for number, task in enumerate((first, second)):
        assert (task["name"], task["replicas"], task["maxRetry"]) == (f"train-{number}", 1, 2)
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": task["template"]["spec"]}
        kubernetes_validate.validate(pod, VERSION, strict=True)
        (container,) = pod["spec"]["containers"]
        assert container["image"] == "registry.example/deepfm:1"
        assert container["resources"]["limits"] == {
            "cpu": "208000m",
            "memory": f"{1872 * 1024}M",
            "nvidia.com/gpu": "8",
        }
        assert {"name": "NCCL_DEBUG", "value": "WARN"} in container["env"]
        assert {(one["mountPath"], one["name"]) for one in container["volumeMounts"]} == {
            ("/dev/shm", "dshm"),
            ("/data", "mount-0"),
        }
        volumes = {one.pop("name"): one for one in pod["spec"]["volumes"]}
        assert volumes == {  # shared memory, for the ranks of a host
            "dshm": {"emptyDir": {"medium": "Memory"}},
            "mount-0": {"persistentVolumeClaim": {"claimName": "clicks"}},
        }
        assert (pod["spec"]["serviceAccountName"], pod["spec"]["restartPolicy"]) == ("trainer", "Never")
        command = container["command"][-1]
        assert "--nnodes 2 --nproc_per_node 8 " in command
        assert command.endswith("-m torchrec_deepfm train --data /data/prepared --output /data/run")
    assert "${TORCHX_RANK0_HOST:=localhost}:29500" in first["template"]["spec"]["containers"][0]["command"][-1]
    assert "${VC_TRAIN_0_HOSTS:=localhost}:29500" in second["template"]["spec"]["containers"][0]["command"][-1]


def test_the_schema_can_refuse() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [{"name": 3}]}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, VERSION, strict=True)
