"""What `make setup` relies on: the pins cover what is asked for, and nothing is said twice."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ON_DEMAND = ("mlflow", "wandb")  # .ci/setup.py: neither installed nor pinned
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([^#\s=]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
}


def asked_for() -> list[Requirement]:
    project = PROJECT["project"]
    extras = [some for name, some in project["optional-dependencies"].items() if name not in ON_DEMAND]
    lists = [project["dependencies"], *extras, PROJECT["build-system"]["requires"]]
    return [Requirement(one) for some in lists for one in some]


def test_every_requirement_has_a_pin_within_its_range() -> None:
    unpinned = [str(one) for one in asked_for() if canonicalize_name(one.name) not in PINS]
    assert unpinned == []
    outside = [str(one) for one in asked_for() if not one.specifier.contains(PINS[canonicalize_name(one.name)])]
    assert outside == []


def test_every_requirement_of_those_has_a_pin_too() -> None:
    todo = [canonicalize_name(one.name) for one in asked_for()]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen or name == "fbgemm-gpu" or name.startswith(("nvidia-", "cuda-", "triton")):
            continue  # pinned by torch's own CUDA build
        seen.add(name)
        needs = [Requirement(one) for one in metadata.requires(name) or []]
        todo += [
            canonicalize_name(one.name) for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})
        ]
    assert seen - set(PINS) == set()


def test_the_three_that_have_to_fit_are_pinned_together() -> None:
    minor = {name: PINS[name].split(".")[1] for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")}
    assert int(minor["torch"]) - 5 == int(minor["torchrec"]) == int(minor["fbgemm-gpu"]) == int(minor["fbgemm-gpu-cpu"])
    assert PINS["fbgemm-gpu"] == PINS["fbgemm-gpu-cpu"]
    assert "+" not in PINS["torch"]  # a build's name would shut out the other builds


def test_pins_stand_in_one_place() -> None:
    for name in ("pyproject.toml", "Makefile", ".ci/setup.py", ".ci/run", ".pre-commit-config.yaml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"\w==\d", text), f"{name} pins a version; constraints.txt is the place"
