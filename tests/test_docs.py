"""Every example in Python of README and docs/ runs, and what the pages name exists."""

import ast
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


def anchors(page: Path) -> set[str]:
    """What a link may name in a page, by GitHub's rule for headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_to_headings_lead_somewhere() -> None:
    pages = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md"]
    links = [
        (page, target, anchor)
        for page in pages
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 30
    for page, target, anchor in links:
        found = anchors((page.parent / target).resolve() if target else page)
        assert anchor in found, f"{page.name}: {target}#{anchor}"


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


LAUNCH_PATH = [
    *sorted((ROOT / "torchrec_deepfm/launch").glob("*.py")),
    *(ROOT / f"torchrec_deepfm/distributed/{name}.py" for name in ("disk_errors", "health", "process_group")),
    *(ROOT / f"torchrec_deepfm/distributed/{name}.py" for name in ("run_lock", "time_limit")),
    ROOT / "torchrec_deepfm/__main__.py",
]


def parts(text: ast.AST) -> list[ast.expr]:
    """The literals and values that a text in the code is put together from."""
    return text.values if isinstance(text, ast.JoinedStr) else [text]


def lines_of(file: Path) -> Iterator[re.Pattern[str]]:
    """A pattern for each line that a file prints when something fails: its literal parts up to the remedy."""
    module = ast.parse(file.read_text(encoding="utf-8"))
    constants = {
        node.targets[0].id: node.value.value
        for node in module.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    found: list[ast.AST] = []
    for node in ast.walk(module):
        match node:
            case ast.Call(func=ast.Name(id="UserError" | "LostPeer" | "RendezvousStateError"), args=[what, *_]):
                given = {each.arg: parts(each.value) for each in node.keywords}
                where = [*given["where"], ast.Constant(": ")] if "where" in given else []
                remedy = [ast.Constant("; "), *given["remedy"]] if "remedy" in given else []
                found.append(ast.JoinedStr([*where, *parts(what), *remedy]))
            case ast.Call(func=ast.Attribute(attr="write"), args=[*_, ast.Call(func=ast.Attribute(value=text))]):
                found.append(text)  # os.write(2, "...".encode())
            case ast.Call(func=ast.Attribute(attr="write"), args=[text]):
                found.append(text)
            case ast.Assign(targets=[ast.Name(id="reason")], value=text):
                found.append(text)
            case ast.FunctionDef(name="explain_failure" | "explain_rendezvous" | "_describe"):
                for inner in ast.walk(node):
                    match inner:
                        case ast.Return(value=ast.Tuple(elts=[text, *_])) | ast.Return(value=text):
                            found.append(text)
    for text in found:
        words = ""
        for part in parts(text):
            match part:
                case ast.Constant(value=str(literal)):
                    words += literal
                case ast.FormattedValue(value=ast.Name(id=name)) if name in constants:
                    words += constants[name]
                case _:
                    words += "\0"
        words = words.replace("`", "").strip("\n")
        fault = words.partition(";")[0]
        if len(re.findall("[A-Za-z_]{2,}", fault)) < 2:
            fault = words
        if "\0" not in fault or len(re.findall("[A-Za-z_]{2,}", fault)) > 1:  # else another message, passed on
            yield re.compile(re.escape(fault).replace("\0", ".*?"))


def test_every_error_of_the_launch_path_has_its_cure() -> None:
    """docs/troubleshooting.md has each line that the launch path prints, and no line that it does not print."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| .{10,} \|$", page, re.MULTILINE)
    patterns = {pattern: file.name for file in LAUNCH_PATH for pattern in lines_of(file)}
    assert len(patterns) > 35
    missing = [f"{name}: {each.pattern}" for each, name in patterns.items() if not any(map(each.search, rows))]
    assert missing == []
    assert [row for row in rows if not any(each.search(row) for each in patterns)] == []
