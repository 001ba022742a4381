"""Every example in Python of README and docs/ runs, and what the pages name exists."""

import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchrec_deepfm
from tests.support.ranks import run_module

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_public_classes_have_examples() -> None:
    """pytest runs them with all examples of docstrings (`--doctest-modules`); one that is left out could not fail."""
    finder = doctest.DocTestFinder(recurse=False)
    for name in ("DeepFM", "DeepFMTrain", "FactorizationMachine", "embedding_tables"):
        [found] = finder.find(getattr(torchrec_deepfm, name), name)
        assert found.examples, name


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, number) for page in PAGES for number, _ in enumerate(blocks(page, "python"))],
    ids=lambda value: value.name if isinstance(value, Path) else str(value),
)
def test_python_examples_of_the_pages(page: Path, number: int, tmp_path: Path) -> None:
    """Each in a process of its own: they make process groups."""
    (tmp_path / "example.py").write_text(list(blocks(page, "python"))[number], encoding="utf-8")
    done = run_module(["example.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_make_target_that_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"train", "test", "setup", "lint"} <= named & targets


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_function_that_contributing_names_exists() -> None:
    """`file.py:name` is a file of the package or of tests/, and a class, function or constant in it."""
    named = re.findall(r"`([\w/]+\.py)(?::(\w+))?`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    for file, name in named:
        path = next((root / file for root in (ROOT / "torchrec_deepfm", ROOT) if (root / file).is_file()), None)
        assert path, file
        defined = re.findall(r"^(?:class|def) (\w+)|^(\w+)(?:: .*)? = ", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not name or name in {one or other for one, other in defined}, f"{file}:{name}"


def test_the_map_names_every_module() -> None:
    """CONTRIBUTING.md's map is true: no module is missing from it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "torchrec_deepfm").rglob("*.py")
        if not path.name.startswith("__") and path.name not in text
    ]
    assert missing == []
    for name in re.findall(r"\b[a-z_]+\.py\b", text):
        assert any(found.is_file() for found in ROOT.rglob(name) if ".venv" not in found.parts), name
