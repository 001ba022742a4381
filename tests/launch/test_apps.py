"""The components of apps/deepfm.py, by TorchX's own validator and by what they start."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
from torchx import specs
from torchx.components.component_test_base import ComponentTestCase
from torchx.specs import AppDef, BindMount
from torchx.specs.builders import materialize_appdef
from torchx.specs.finder import ComponentValidationException

from torchrec_deepfm.launch import named_resources

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "apps" / "deepfm.py"
COMPONENTS = ["evaluate", "experiment", "export", "plan", "predict", "prepare", "serve", "train"]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


deepfm = load(FILE)


class TestAsTorchXSeesThem(ComponentTestCase):
    """TorchX parses a component's types and docstring; what it rejects, `torchx run` rejects."""

    def test_all_components(self) -> None:
        for name in COMPONENTS:
            self.validate(deepfm, name)
            words = ["--cpu", "3", "--memMB", "4000", "--mounts", "type=bind,src=/raw,dst=/data", "--", "--help"]
            (role,) = materialize_appdef(getattr(deepfm, name), words).roles
            assert (role.name, role.resource.cpu, role.resource.memMB) == (name, 3, 4000)
            assert role.args[-1].endswith(f" -m torchrec_deepfm {name} --help")

    def test_the_validator_can_fail(self) -> None:
        broken = Path(self.test_dir) / "broken.py"
        broken.write_text(FILE.read_text(encoding="utf-8").replace("def train(*args: str", "def train(*args"))
        with pytest.raises(ComponentValidationException):
            self.validate(load(broken), "train")


def test_every_component_documents_the_options_it_takes() -> None:
    for name in COMPONENTS:
        component = getattr(deepfm, name)
        described = re.findall(r"^    (\w+): ", component.__doc__.partition("Args:")[2], flags=re.MULTILINE)
        assert described == list(inspect.signature(component).parameters)
        with pytest.raises(TypeError):
            component(no_such_option=1)


def components(path: Path) -> list[str]:
    found = re.findall(r"^def ([a-z]\w*)\(", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return sorted(found)


def test_the_components_are_these_and_train_is_the_default() -> None:
    assert components(FILE) == COMPONENTS
    assert deepfm.DEFAULT_COMPONENT == "train"


def test_the_readme_names_the_components_and_no_others() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md yet")
    named = set(re.findall(r"apps/deepfm\.py:(\w+)", readme.read_text(encoding="utf-8")))
    assert named <= set(COMPONENTS)
    assert named | {deepfm.DEFAULT_COMPONENT} == set(COMPONENTS)


@pytest.mark.parametrize("command", ["train", "evaluate", "experiment", "predict", "prepare"])
def test_ranks_run_the_command_with_the_arguments(command: str) -> None:
    app: AppDef = getattr(deepfm, command)(
        "--data",
        "with a blank",
        j="2x4",
        cpu=8,
        gpu=4,
        memMB=1000,
        image="an-image",
        name="a-name",
        env={"A": "b"},
        max_retries=3,
        mounts=["type=bind", "src=/raw", "dst=/data", "readonly"],
        tracker="tracker.conf",
    )
    (role,) = app.roles
    assert (app.name, role.name, role.image, role.num_replicas, role.max_retries) == (
        "a-name",
        command,
        "an-image",
        2,
        3,
    )
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (8, 4, 1000)
    assert role.env["A"] == "b"
    assert (role.env["TORCHX_TRACKERS"], role.env["TORCHX_TRACKER_FSSPEC_CONFIG"]) == ("fsspec", "tracker.conf")
    assert role.mounts == [BindMount(src_path="/raw", dst_path="/data", read_only=True)]
    assert role.entrypoint == "bash"
    shell_command = role.args[1]
    assert shell_command.startswith("python -m torchrec_deepfm.launch --")
    assert "--nnodes 2 --nproc_per_node 4 " in shell_command
    assert f"--max_restarts {3 if command in ('train', 'predict', 'prepare') else 0} " in shell_command
    assert shell_command.endswith(f" -m torchrec_deepfm {command} --data 'with a blank'")


def test_plan_runs_in_one_process() -> None:
    (role,) = deepfm.plan("--tables", "criteo-terabyte", cpu=3, memMB=1000).roles
    assert (role.name, role.num_replicas, role.resource.cpu, role.resource.memMB) == ("plan", 1, 3, 1000)
    assert "--nnodes 1 --nproc_per_node 1 " in role.args[1]
    assert role.args[1].endswith(" -m torchrec_deepfm plan --tables criteo-terabyte")


@pytest.mark.parametrize(
    ("command", "options", "cpu", "gpu", "gib"),
    [
        ("train", {"j": "2x8"}, 96, 8, 768),
        ("train", {"j": "1x2", "gpu": 0}, 4, 0, 16),
        ("train", {"j": "1x2", "gpu": 0, "cpu": 3, "memMB": 5 * 1024}, 3, 0, 5),
        ("prepare", {"j": "2x4"}, 8, 0, 32),
        ("plan", {}, 2, 0, 8),
        ("train", {"j": "2x8", "h": "deepfm_a100x8"}, 96, 8, 1360),
        ("evaluate", {"h": "deepfm_l4x1"}, 4, 1, 16),
    ],
)
def test_resources_follow_from_the_ranks_or_the_named_host(
    command: str, options: dict[str, object], cpu: int, gpu: int, gib: int
) -> None:
    (role,) = getattr(deepfm, command)(**options).roles
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (cpu, gpu, gib * 1024)


def test_every_named_resource_is_registered() -> None:
    names = [name for name, value in vars(named_resources).items() if callable(value) and re.search(r"x\d+$", name)]
    assert len(names) == 11
    for name in names:
        host = specs.named_resources[f"deepfm_{name}"]
        gpus = 0 if name.startswith("cpu") else int(name.rpartition("x")[2])
        assert (host.gpu, host.cpu > 0, host.memMB >= 16 * 1024) == (gpus, True, True)


def test_an_elastic_range_of_hosts() -> None:
    (role,) = deepfm.train(j="1:2x1", max_restarts=7).roles
    assert (role.num_replicas, role.min_replicas) == (2, 1)
    assert "--nnodes 1:2 --nproc_per_node 1 " in role.args[1]
    assert "--max_restarts 7 " in role.args[1]
