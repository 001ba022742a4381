"""HTML pages: they stand alone, show what they were given, and let nothing through that is not text."""

import base64
import json
import math
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.support.pages import embedded_data
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.report.page import (
    BLUE,
    NOTHING,
    Block,
    Code,
    Data,
    Link,
    PageTable,
    Paragraph,
    Picture,
    Pictures,
    Section,
    Terms,
    render,
    write_page,
)

pytestmark = pytest.mark.pictures

EVIL = "</script><script>alert(1)</script><img src=x onerror='a()'> & \"quoted\" {{ 7 * 7 }}"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """The page as a browser reads it: tags with attributes, the text inside each, and whether they are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            self.texts[tag][-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def figure() -> Figure:
    drawn = Figure(figsize=(4, 2))
    axes = drawn.add_subplot()
    axes.plot([0, 1, 2], [3, 1, 2])
    axes.set_title("a < b & c")
    return drawn


def page(*blocks: Block) -> Reader:
    return Reader(render("Title", [Section("Heading", *blocks)]))


EVERYTHING: list[Block] = [
    Paragraph(EVIL),
    Paragraph(["see ", Link(EVIL, "plans/a.json"), "."]),
    Terms({EVIL: EVIL, "link": Link("x", "#section-1")}),
    PageTable([EVIL, "n"], [[EVIL, 1], [Link(EVIL, 'a"b.json'), None]], caption=EVIL),
    Picture(figure(), alt=EVIL, caption=EVIL),
    Picture(figure(), alt="again", kind="png"),
    Pictures([Picture(figure(), alt="small"), Picture(figure(), alt="beside", caption=EVIL)]),
    Terms({EVIL: EVIL}, large=True),
    PageTable([EVIL], [[EVIL]], caption=EVIL, folded=True),
    Code(EVIL),
    Data("all", {"text": EVIL}),
]


def test_nothing_is_loaded_from_elsewhere_and_no_script_runs() -> None:
    read = Reader(render(EVIL, [Section(EVIL, *EVERYTHING)], subtitle=EVIL))
    assert {tag for tag, _ in read.tags} & {"link", "iframe", "object", "embed", "base", "form", "svg"} == set()
    assert [attrs.get("type") for attrs in read.attributes("script")] == ["application/json"]
    for tag, attrs in read.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        for name in ("src", "srcset", "data", "action", "background", "poster"):
            assert (attrs.get(name) or "data:").startswith("data:")
    assert "url(" not in read.texts["style"][0]
    assert "@import" not in read.texts["style"][0]
    [policy] = [a["content"] for a in read.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none';")


def test_text_is_shown_as_it_is() -> None:
    read = Reader(render(EVIL, [Section(EVIL, *EVERYTHING)], subtitle=EVIL))
    for tag in ("title", "h1", "h2", "dt", "th", "caption", "figcaption", "summary", "code"):
        assert read.texts[tag][0] == EVIL, tag
    assert EVIL in read.texts["td"]
    assert read.texts["p"] == [EVIL, EVIL, f"see {EVIL}."]
    assert [a["alt"] for a in read.attributes("img")] == [EVIL, "again", "small", "beside"]
    assert [a["href"] for a in read.attributes("a")] == ["plans/a.json", "#section-1", 'a"b.json']


def test_numbers_stand_to_the_right_as_they_are_to_be_written() -> None:
    table = PageTable(
        ["name", "rows", "auc", "ne", "done"],
        [["a", 1234567, 0.80731, 0.123456789, True], ["b", None, np.float64(0.5), math.nan, False]],
        formats={"auc": ".4f"},
    )
    read = page(table)
    assert read.texts["td"] == ["a", "1,234,567", "0.8073", "0.1235", "yes", "b", NOTHING, "0.5000", "nan", "no"]
    right = [attrs.get("class") == "number" for attrs in read.attributes("td")]
    assert right == [False, True, True, True, False, False, False, True, True, False]
    assert [attrs.get("class") == "number" for attrs in read.attributes("th")] == [False, True, True, True, False]


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_picture_is_inside(kind: str) -> None:
    [image] = page(Picture(figure(), alt="a line", kind="svg" if kind == "svg" else "png")).attributes("img")
    head, _, content = str(image["src"]).partition(",")
    raw = base64.b64decode(content, validate=True)
    assert (image["width"], image["height"], image["alt"]) == ("384", "192", "a line")
    if kind == "svg":
        assert head == "data:image/svg+xml;base64"
        root = ElementTree.fromstring(raw)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        references = [value for one in root.iter() for name, value in one.attrib.items() if name.endswith("href")]
        assert references
        assert all(value.startswith("#") for value in references)
        assert b"purl.org" not in raw
    else:
        assert head == "data:image/png;base64"
        assert raw.startswith(b"\x89PNG")


def test_a_picture_has_colours_for_a_dark_screen() -> None:
    """A colour of the palette has another one there; a picture of other colours is left as it is."""
    drawn = Figure(figsize=(4, 2))
    drawn.add_subplot().plot([0, 1], [0, 1], color=BLUE)
    [image] = page(Picture(drawn, alt="a line")).attributes("img")
    svg = base64.b64decode(str(image["src"]).partition(",")[2]).decode()
    style = ElementTree.fromstring(svg).find(".//{*}style")
    assert style is not None
    assert style.text is not None
    light, _, dark = style.text.partition("@media (prefers-color-scheme:dark)")
    assert f"stroke: {BLUE}" in svg.replace(style.text, "")
    assert BLUE not in light
    assert f'[style*="stroke: {BLUE}"]{{stroke:#58b4f0 !important}}' in dark
    assert "fill: #ffffff" not in svg  # no white ground


def test_a_folded_table_shows_its_caption() -> None:
    read = page(PageTable(["a"], [[1]], caption="One number", folded=True))
    assert (read.texts["summary"], read.texts["td"]) == (["One number"], ["1"])
    assert "caption" not in read.texts
    with pytest.raises(ValueError, match="a folded table needs a caption"):
        PageTable(["a"], [[1]], folded=True)


def test_data_come_back() -> None:
    given = {"text": EVIL, "numbers": [1, 2.5, math.nan, math.inf], "pair": (True, None), "n": np.int64(3)}
    html = render("t", [Section("a", Data("one", given), Paragraph("x")), Section("b", Data("two-2", []))])
    expected = {"text": EVIL, "numbers": [1, 2.5, None, None], "pair": [True, None], "n": 3}
    assert embedded_data(html) == {"one": expected, "two-2": []}
    assert Reader(html).texts["script"][0] == json.dumps(expected).replace("<", "\\u003c").replace(
        ">", "\\u003e"
    ).replace("&", "\\u0026")


def test_a_long_page_has_a_list_of_its_sections() -> None:
    few = Reader(render("t", [Section("a"), Section("b"), Section("c")]))
    many = Reader(render("t", [Section(name) for name in "abcd"]))
    assert few.attributes("nav") == []
    links = [attrs["href"] for attrs in many.attributes("a")]
    assert links == [f"#{attrs['id']}" for attrs in many.attributes("section")]
    assert [text.strip() for text in many.texts["li"]] == ["a", "b", "c", "d"]


def test_what_makes_no_page() -> None:
    with pytest.raises(ValueError, match="a row has 1 values, the table 2 columns"):
        PageTable(["a", "b"], [[1]])
    with pytest.raises(ValueError, match=r"formats names no column: \['c'\]"):
        PageTable(["a"], [[1]], formats={"c": ".3f"})
    with pytest.raises(ValueError, match="a picture needs an alt"):
        Picture(figure(), alt=" ")
    with pytest.raises(ValueError, match="the name of data"):
        Data("a b", 1)
    with pytest.raises(ValueError, match="two Data have the name a"):
        render("t", [Section("x", Data("a", 1)), Section("y", Data("a", 2))])
    for href in ("javascript:alert(1)", " JavaScript:x", "data:text/html,x", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="a page links to"):
            Link("x", href)
    for href in ("java\tscript:alert(1)", "\x01javascript:x", "a\nb", "a\x85b"):
        with pytest.raises(ValueError, match="an address has no control characters"):
            Link("x", href)
    for href in ("https://example.org/a", "plans/a:b.json", "#x", "a.json?b=c"):
        assert Link("x", href).href == href


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_page(path, "first", [Section("a")])
    write_page(path, "second", [Section("a")])
    assert Reader(path.read_text(encoding="utf-8")).texts["h1"] == ["second"]
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(ValueError, match="two Data"):
        write_page(path, "third", [Section("a", Data("x", 1), Data("x", 1))])
    assert "second" in path.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="a text in it is not valid Unicode") as refused:
        write_page(path, "half a pair \ud800", [])
    assert "\n" not in str(refused.value)
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "folder.html").mkdir()
    for bad in (tmp_path / "folder.html", path / "below.html"):
        with pytest.raises(UserError, match="the page can't be written"):
            write_page(bad, "t", [])
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder.html", "new"]
