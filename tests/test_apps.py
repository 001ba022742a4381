"""The components of apps/deepfm.py, by TorchX's own validator and by what they start."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from torchx.components.component_test_base import ComponentTestCase
from torchx.specs import AppDef
from torchx.specs.finder import ComponentValidationException

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "apps" / "deepfm.py"
COMPONENTS = ["evaluate", "experiment", "plan", "predict", "prepare", "train"]


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

    def test_train(self) -> None:
        self.validate(deepfm, "train")

    def test_predict(self) -> None:
        self.validate(deepfm, "predict")

    def test_evaluate(self) -> None:
        self.validate(deepfm, "evaluate")

    def test_experiment(self) -> None:
        self.validate(deepfm, "experiment")

    def test_plan(self) -> None:
        self.validate(deepfm, "plan")

    def test_prepare(self) -> None:
        self.validate(deepfm, "prepare")

    def test_the_validator_can_fail(self) -> None:
        broken = Path(self.test_dir) / "broken.py"
        broken.write_text(FILE.read_text(encoding="utf-8").replace("memMB: int = 8192", "memMB: int | None = 8192"))
        with pytest.raises((AttributeError, ComponentValidationException)):  # 0.7 has no better answer than the first
            self.validate(load(broken), "train")


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
    assert role.entrypoint == "bash"
    shell_command = role.args[1]
    assert shell_command.startswith("python -m torchrec_deepfm.launch --")
    assert "--nnodes 2 --nproc_per_node 4 " in shell_command
    assert f"--max_restarts {0 if command in ('evaluate', 'experiment') else 3} " in shell_command
    assert shell_command.endswith(f" -m torchrec_deepfm {command} --data 'with a blank'")


def test_plan_runs_in_one_process() -> None:
    (role,) = deepfm.plan("--tables", "criteo-terabyte", cpu=3, memMB=1000).roles
    assert (role.name, role.num_replicas, role.resource.cpu, role.resource.memMB) == ("plan", 1, 3, 1000)
    assert "--nnodes 1 --nproc_per_node 1 " in role.args[1]
    assert role.args[1].endswith(" -m torchrec_deepfm plan --tables criteo-terabyte")


def test_an_elastic_range_of_hosts() -> None:
    (role,) = deepfm.train(j="1:2x1", max_restarts=7).roles
    assert (role.num_replicas, role.min_replicas) == (2, 1)
    assert "--nnodes 1:2 --nproc_per_node 1 " in role.args[1]
    assert "--max_restarts 7 " in role.args[1]
