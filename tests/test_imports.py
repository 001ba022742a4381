"""Imports point one way, and what needs no torch loads none. CONTRIBUTING.md draws the same arrows."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "torchrec_deepfm"

BASE = {"errors", "launch.processes", "units", "files", "strict_json", "data.schema", "remote", "remote.names"}
# What each part may import of the package. A module belongs to the longest name here that begins its own; every part
# may import itself. "" is the package's own __init__.
ALLOWED = {
    "": {"inference", "model", "notebook"},  # public names, loaded on first use
    "errors": set(),
    "units": {"errors"},
    "files": {"errors", "units"},
    "console": {"errors", "launch.processes", "units", "remote.names"},
    "doctor": set(),
    "launch.cpu_threads": set(),
    "launch.huge_pages": set(),
    "launch.interrupt": set(),
    "launch.processes": set(),
    "launch.rendezvous": {"errors"},
    "strict_json": {"errors", "files", "units"},
    "deepfm": set(),
    "launch.named_resources": set(),
    "launch.schedulers": {"errors"},
    "launch": {"errors", "launch.cpu_threads", "launch.launcher", "launch.processes"},  # __main__
    "launch.launcher": {"launch.cpu_threads", "errors", "launch.interrupt", "launch.processes", "launch.rendezvous"},
    "launch.torchx_run": {"launch.cpu_threads", "errors", "launch.launcher", "launch.processes", "launch.schedulers"},
    "remote": {"errors", "units", "remote.names"},
    "remote.names": set(),
    "data.schema": {"errors", "files", "units"},
    "model": BASE,
    "data": BASE,
    "report": {"errors", "files", "units"},
    "sharding": BASE | {"report", "model", "data"},
    "distributed": BASE,
    "training": BASE | {"console", "report", "model", "data", "sharding", "distributed"},
    "experiment": BASE
    | {
        "launch.launcher", "console", "report", "model", "data", "sharding", "distributed",
        "training",
    },
    "evaluation": BASE
    | {"console", "report", "model", "data", "sharding", "distributed", "training", "inference"},
    "inference": BASE
    | {"console", "report", "model", "data", "sharding", "distributed", "training"},
    "notebook": BASE
    | {
        "console", "launch.cpu_threads", "launch.huge_pages", "report", "model", "data", "sharding", "distributed",
        "training", "evaluation", "inference",
    },
    "cli": BASE
    | {
        "console", "doctor", "launch.launcher", "report", "model", "data", "sharding", "distributed",
        "training", "evaluation", "experiment", "inference",
    },
    "__main__": {"cli", "launch.cpu_threads", "launch.huge_pages", "launch.interrupt", "launch.processes"},
}  # fmt: skip
WITHOUT_TORCH = [
    "",
    "errors",
    "units",
    "remote.places",
    "report.page",
    "sharding.plan.io",
    "data.schema",
    "training.config",
    "training.recipes",
    "training.recipe_text",
    "training.memory_estimate",
    "training.run.report",
    "report.training_curves",
    "launch.cpu_threads",
    "launch.huge_pages",
    "doctor",
    "launch.launcher",
    "launch.processes",
    "launch.torchx_run",
    "console",
    "experiment.report",
    "sharding.plan.report",
    "files",
    "strict_json",
    "units",
    "sharding.inputs.hardware",
    "sharding.inputs.hardware_toml",
    "sharding.inputs.presets",
    "sharding.inputs.tables",
    "sharding.plan.text",
    "notebook.fit",
    "cli.main",
    "cli.data",
    "cli.train",
    "cli.infer",
    "cli.experiment",
    "cli.plan",
]


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package below `root` by its name inside the package ("" is the package itself)."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def part_of(module: str) -> str:
    return max((p for p in ALLOWED if module == p or (p and module.startswith(f"{p}."))), key=len, default="?")


@cache
def nodes(text: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(text)))


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, module of the package) for every import in a file: lazy ones, those for types, and names in strings."""
    for node in nodes(path.read_text(encoding="utf-8")):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                here = [PACKAGE, *module.split(".")] if module else [PACKAGE]
                up = node.level - (path.name == "__init__.py")
                source = ".".join([*here[: len(here) - up], *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{PACKAGE}."):
            names = [node.value]
        for name in names:
            top, _, inside = name.partition(".")
            if top != PACKAGE:
                continue
            while inside and inside not in known:  # the last word may be a name in a module
                inside = inside.rpartition(".")[0]
            if isinstance(node, ast.Constant) and not inside:
                continue  # a name of the package's own, but no module's: the format of a file
            yield node.lineno, inside


def wrong_imports(root: Path) -> list[str]:
    """Every import below `root` that goes against the table, as "file:line: what it imports"."""
    known = modules(root)
    return [
        f"{path.relative_to(root).as_posix()}:{line}: {target or PACKAGE}"
        for module, path in known.items()
        for line, target in imports(module, path, known)
        if part_of(target) not in ALLOWED.get(part_of(module), set()) | {part_of(module)}
    ]


def loaded_by(groups: list[list[str]], root: Path, first: str = "") -> list[set[str]]:
    """The modules in memory after importing each group of modules of the package below `root`.

    One process imports what the line `first` says, and forks for each group.
    """
    program = f"""
import importlib, json, os, sys
{first}
for group in json.loads(sys.argv[1]):
    if not os.fork():
        for name in group:
            importlib.import_module(name)
        print(json.dumps(sorted(sys.modules)), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, group
"""
    full = [[f"{PACKAGE}.{name}".rstrip(".") for name in group] for group in groups]
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, json.dumps(full)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=root,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return [set(json.loads(line)) for line in process.stdout.splitlines()]


LIBRARIES = "import polars, pyarrow, duckdb, sklearn.metrics, torch.distributed.checkpoint, torchrec"


def wrongly_loaded(parts: list[str], root: Path, first: str = "") -> dict[str, list[str]]:
    """Modules of the package in memory after importing each of these parts, that this part has no arrow to."""
    groups = [[module for module in modules(root) if part_of(module) == part] for part in parts]
    found = {}
    for part, loaded in zip(parts, loaded_by(groups, root, first), strict=True):
        inside = {name.removeprefix(PACKAGE).removeprefix(".") for name in loaded if name.startswith(PACKAGE)}
        # Python loads the packages around a module, such as `training` around `training.config`.
        around = {".".join(module.split(".")[:n]) for module in inside for n in range(module.count(".") + 1)}
        allowed = ALLOWED[part] | {part}
        found[part] = sorted(module for module in inside - around if part_of(module) not in allowed)
    return found


def shared_names(root: Path) -> dict[str, list[str]]:
    """Public classes and functions that two modules define. Components and commands are named after what they run."""
    owners: dict[str, list[str]] = {}
    for module, path in modules(root).items():
        if module not in {"deepfm", "__main__", "launch.__main__", "cli.main", "launch.launcher", "launch.torchx_run"}:
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                    owners.setdefault(node.name, []).append(module)
    return {name: modules for name, modules in owners.items() if len(modules) > 1}


def test_two_things_never_share_a_name() -> None:
    assert shared_names(ROOT) == {}


def test_every_module_belongs_to_a_part() -> None:
    assert [module for module in modules(ROOT) if part_of(module) not in ALLOWED] == []


def test_imports_point_one_way() -> None:
    assert wrong_imports(ROOT) == []


def test_a_part_loads_nothing_above_it() -> None:
    parts = [part for part in ALLOWED if part not in ("", "cli", "__main__")]
    parts = [part for part in parts if any(part_of(module) == part for module in modules(ROOT))]
    assert wrongly_loaded(parts, ROOT, LIBRARIES) == {part: [] for part in parts}


def test_these_load_no_torch() -> None:
    loaded = loaded_by([[module] for module in WITHOUT_TORCH], ROOT)
    assert [module for module, found in zip(WITHOUT_TORCH, loaded, strict=True) if "torch" in found] == []
    overview = loaded[WITHOUT_TORCH.index("cli.main")]  # no command, nor what parses its options
    assert [name for name in overview if name.startswith(("tyro", f"{PACKAGE}.cli."))] == [f"{PACKAGE}.cli.main"]


@pytest.mark.parametrize("path", sorted((ROOT / "apps").glob("*.py")), ids=lambda path: path.name)
def test_components_import_only_torchx_and_the_standard_library(path: Path) -> None:
    tops = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            tops |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            tops.add("a relative import" if node.level else str(node.module).partition(".")[0])
    assert tops - set(sys.stdlib_module_names) <= {"torchx"}


# The checks above would be worth nothing if they could not fail: each finds an import that is put into a copy.


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("model/fm.py", "import torchrec_deepfm.data.prepare.prepare", "data.prepare.prepare"),
        ("model/fm.py", "def later():\n    from torchrec_deepfm.data.prepare import prepare", "data.prepare.prepare"),
        ("model/fm.py", "from ..data.prepare.prepare import prepare", "data.prepare.prepare"),
        ("model/fm.py", "from torchrec_deepfm import DeepFM", PACKAGE),
        ("data/prepare/prepare.py", "from torchrec_deepfm.model.fm import FactorizationMachine", "model.fm"),
        (
            "data/prepare/prepare.py",
            "import importlib; importlib.import_module('torchrec_deepfm.model.fm')",
            "model.fm",
        ),
        ("data/schema/schema.py", "from torchrec_deepfm.data.prepare import prepare", "data.prepare.prepare"),
        ("errors.py", "from . import doctor", "doctor"),
    ],
)
def test_a_wrong_import_is_found(copy: Path, file: str, line: str, found: str) -> None:
    path = copy / PACKAGE / file
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    assert [(one.split(":")[0], one.split(": ")[1]) for one in wrong_imports(copy)] == [(f"{PACKAGE}/{file}", found)]


def test_a_name_that_two_modules_define_is_found(copy: Path) -> None:
    with (copy / PACKAGE / "model/fm.py").open("a") as file:
        file.write("\n\nclass Plan:\n    pass\n\n\nclass UserError:\n    pass\n")
    assert shared_names(copy) == {"UserError": ["errors", "model.fm"]}


def test_a_module_loaded_against_the_arrows_is_found(copy: Path) -> None:
    path = copy / PACKAGE / "errors.py"
    path.write_text(path.read_text(encoding="utf-8") + "\n__import__('torchrec_deepfm.doctor')\n", encoding="utf-8")
    assert wrongly_loaded(["errors"], copy) == {"errors": ["doctor"]}


def test_torch_that_is_loaded_is_found(copy: Path) -> None:
    path = copy / PACKAGE / "errors.py"
    path.write_text(path.read_text(encoding="utf-8") + "\n__import__('torch')\n", encoding="utf-8")
    [loaded] = loaded_by([["errors"]], copy)
    assert "torch" in loaded
