"""All benchmark scripts: their imports, their options, and the commands that the pages give for them."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import tyro

from benchmarks._lib.commands import ROOT

MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted((ROOT / "benchmarks").glob("*/*.py"))
    if path.stem != "__init__"
}


def test_imports_of_the_repository_exist() -> None:
    """Inside functions too, and in the modules that need a peer's environment."""
    missing = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and re.match(r"(torchrec_deepfm|benchmarks)\b", node.module or ""):
                source = importlib.import_module(str(node.module))
                for name in node.names:
                    try:
                        known = hasattr(source, name.name) or importlib.import_module(f"{node.module}.{name.name}")
                    except ModuleNotFoundError:
                        known = False
                    if not known:
                        missing.append(f"{module}: {node.module}.{name.name}")
    assert missing == []
