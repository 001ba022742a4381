"""All benchmark scripts: their imports, and the commands that the pages give for them."""

import ast
import importlib
import re
import shlex

import tyro

from benchmarks._lib.commands import ROOT

MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted((ROOT / "benchmarks").glob("**/*.py"))
    if path.stem != "__init__"
}
# They run in the environment of a peer, or are started by another script.
STARTED = re.compile(r"\.(peer_|train_|step_)")
COMMAND = re.compile(r"python -m (benchmarks\.[\w.]+)([^`|\n#]*)")


def test_imports_of_the_repository_exist() -> None:
    """Inside functions too, and in the modules that need a peer's environment."""
    missing = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and re.match(r"(torchrec_deepfm|benchmarks)\b", node.module or ""):
                if node.module in MODULES and STARTED.search(node.module):  # only a peer's environment can import it
                    body = ast.parse(MODULES[node.module].read_text(encoding="utf-8")).body
                    names = {one.name for one in body if isinstance(one, ast.ClassDef | ast.FunctionDef)}
                    missing += [f"{module}: {name.name}" for name in node.names if name.name not in names]
                    continue
                source = importlib.import_module(str(node.module))
                for name in node.names:
                    try:
                        known = hasattr(source, name.name) or importlib.import_module(f"{node.module}.{name.name}")
                    except ModuleNotFoundError:
                        known = False
                    if not known:
                        missing.append(f"{module}: {node.module}.{name.name}")
    assert missing == []


def test_commands_of_the_pages_parse() -> None:
    """Every module exists and takes the options that README, docs/ and the scripts themselves show."""
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    shown = set()
    for page in [*pages, *MODULES.values()]:
        for module, words in COMMAND.findall(page.read_text(encoding="utf-8")):
            assert module in MODULES, f"{page.name}: {module}"
            script = None if STARTED.search(module) else importlib.import_module(module)
            if hasattr(script, "Options"):
                tyro.cli(script.Options, args=shlex.split(words.replace("DIR", "folder")))
            shown.add(module)
    helpers = {name for name in MODULES if "__main__" not in MODULES[name].read_text(encoding="utf-8")}
    assert set(MODULES) - helpers <= shown
    listed = COMMAND.findall((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"))
    runnable = {
        name
        for name in set(MODULES) - helpers
        if not re.search(r"\.(peer_|train_|step_)|engine_cases|big_log|echo_server", name)
    }
    assert runnable <= {module for module, _ in listed}
