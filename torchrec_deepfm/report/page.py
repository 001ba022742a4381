"""A report as one HTML file that needs nothing else: no network, no other file, no script. It loads no torch.

A page is a title and sections; a section is a heading and blocks: paragraphs, code, terms with what they stand for,
tables, pictures that matplotlib has drawn, and data for programs. All text is escaped; a picture becomes an image
inside the file. The page forbids the browser to load anything, by a content security policy. It follows the reader's
choice of a dark or a light screen, and a narrow screen shows pictures one below the other.

Draw with ``matplotlib.figure.Figure`` itself, and not with ``pyplot``, which keeps every figure in a list of its own
and may look for a screen:

Example:
    >>> from matplotlib.figure import Figure
    >>> figure = Figure(figsize=(6, 3), layout="constrained")
    >>> _ = figure.add_subplot().plot([0, 1, 2], [0.69, 0.52, 0.48])
    >>> html = render(
    ...     "Run a",
    ...     [
    ...         Section(
    ...             "Quality",
    ...             Paragraph("Loss <by> step."),
    ...             Picture(figure, alt="The training loss falls from 0.69 to 0.48."),
    ...             PageTable(("split", "AUC"), [("test", 0.80731)], formats={"AUC": ".4f"}),
    ...             Data("losses", [0.69, 0.52, 0.48]),
    ...         )
    ...     ],
    ... )
    >>> "Loss &lt;by&gt; step." in html, "0.8073" in html, "[0.69, 0.52, 0.48]" in html
    (True, True, True)
"""

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cache
from importlib import resources
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTHING = "\N{EN DASH}"  # what a cell without a value shows
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
# Colours of the figures. Okabe and Ito, "Color Universal Design" (2008): distinct with any colour vision, and in grey.
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#8f4f7f"
INK, QUIET, GREY, FAINT = "#1c2430", "#566072", "#6b7280", "#d9dee6"
# What a dark screen shows instead.
_DARK = {
    "#000000": "#e6e9ef", INK: "#e6e9ef", QUIET: "#9aa4b5", GREY: "#9aa4b5", FAINT: "#3a4250",
    BLUE: "#58b4f0", ORANGE: "#ff9248", GREEN: "#37d0a2", PURPLE: "#d79bc8",
}  # fmt: skip


@dataclass(frozen=True)
class Link:
    """A word that leads somewhere.

    Raises ``ValueError``: the address is of another kind, such as ``javascript:``, or has control characters.

    Attributes:
        text: what is shown.
        href: a path relative to the page, a fragment (``#plan``), or an address of ``https``, ``http`` or ``mailto``.
    """

    text: str
    href: str

    def __post_init__(self) -> None:
        """Refuse what a browser would run."""
        if _CONTROL.search(self.href):  # a browser drops some of them, and then sees another scheme
            raise ValueError(f"{self.href!r}: an address has no control characters")
        scheme = _SCHEME.match(self.href.strip())
        if scheme and scheme[0].lower() not in ("https:", "http:", "mailto:"):
            raise ValueError(f"{self.href}: a page links to https, http, mailto, or a file beside it")


Cell = str | int | float | bool | None | Link
"""What a table or a term may hold. None shows as a dash."""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text, or of text and links, joined without anything between them."""

    text: str | Sequence[str | Link]

    @property
    def pieces(self) -> Sequence[str | Link]:
        """The text in pieces."""
        return (self.text,) if isinstance(self.text, str) else self.text


@dataclass(frozen=True)
class Terms:
    """A list of names, each with a value: options, versions, what a run was.

    Attributes:
        items: value by name, shown in their order.
        large: side by side in large print, for the few numbers that come first.
    """

    items: Mapping[str, Cell]
    _: KW_ONLY
    large: bool = False

    @property
    def shown(self) -> list[tuple[str, "_Shown"]]:
        """Names and values, ready to write."""
        return [(name, _shown(value, "")) for name, value in self.items.items()]


@dataclass(frozen=True)
class PageTable:
    """A table. Numbers stand to the right, and so does the head of a column that holds nothing else.

    Raises ``ValueError``: a row has another number of values, or ``formats`` names no column.

    Attributes:
        head: the columns' names.
        rows: one value per column each.
        caption: what the table shows; above it.
        formats: how the numbers of a column are written, by its name, as ``format()`` takes it (``".5f"``, ``",d"``);
            otherwise whole numbers are grouped by thousands and others have four significant digits.
        folded: the reader sees the caption, and the table after a click. Raises ``ValueError`` without a caption.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    _: KW_ONLY
    caption: str = ""
    formats: Mapping[str, str] = field(default_factory=dict)
    folded: bool = False

    def __post_init__(self) -> None:
        """Check that it is a table."""
        if self.folded and not self.caption:
            raise ValueError("a folded table needs a caption, which is all that the reader sees of it")
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"a row has {len(row)} values, the table {len(self.head)} columns: {row}")
        if unknown := set(self.formats) - set(self.head):
            raise ValueError(f"formats names no column: {sorted(unknown)}")

    @property
    def shown_head(self) -> list["_Shown"]:
        """The columns' names, ready to write."""
        return [
            _Shown(text=name, number=all(_is_number(row[column]) or row[column] is None for row in self.rows))
            for column, name in enumerate(self.head)
        ]

    @property
    def shown_rows(self) -> list[list["_Shown"]]:
        """The cells, ready to write."""
        formats = [self.formats.get(name, "") for name in self.head]
        return [[_shown(value, how) for value, how in zip(row, formats, strict=True)] for row in self.rows]


@dataclass(frozen=True)
class Picture:
    """What matplotlib has drawn.

    Raises ``ValueError``: ``alt`` is empty.

    Attributes:
        figure: made by ``matplotlib.figure.Figure(...)``.
        alt: the content of the picture in a sentence, for those who can't see it.
        caption: what it shows; below it.
        kind: ``svg`` stays sharp; ``png`` is smaller where there are many thousands of marks or cells.
        dpi: dots per inch of a ``png``.
    """

    figure: "Figure"
    _: KW_ONLY
    alt: str
    caption: str = ""
    kind: Literal["svg", "png"] = "svg"
    dpi: int = 150

    def __post_init__(self) -> None:
        """Check that it is described."""
        if not self.alt.strip():
            raise ValueError("a picture needs an alt: its content in a sentence")

    @property
    def address(self) -> str:
        """The picture as a ``data:`` address."""
        file = io.BytesIO()
        # matplotlib would write the date and addresses of vocabularies into an SVG.
        no_date = dict.fromkeys(("Date", "Creator", "Format", "Type")) if self.kind == "svg" else {}
        self.figure.savefig(file, format=self.kind, dpi=self.dpi, metadata=no_date, transparent=self.kind == "svg")
        mime = {"svg": "image/svg+xml", "png": "image/png"}[self.kind]
        content = _for_dark_screens(file.getvalue()) if self.kind == "svg" else file.getvalue()
        return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"

    @property
    def width(self) -> int:
        """Width in CSS pixels, 96 to the inch."""
        return round(96 * self.figure.get_figwidth())

    @property
    def height(self) -> int:
        """Height in CSS pixels."""
        return round(96 * self.figure.get_figheight())


@dataclass(frozen=True)
class Pictures:
    """Small pictures, about 4.5 inches wide, side by side, on a narrow screen one below the other."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Code:
    """Text to copy, such as a command."""

    text: str


@dataclass(frozen=True)
class Data:
    """Data for programs: in the file as JSON, in a ``script`` element with this name as its ``id``; not shown.

    Raises ``ValueError``: the name has other characters.

    Attributes:
        name: its name, unique in the page: letters, digits, ``-`` and ``_``.
        value: what ``json`` can write, and numpy's numbers; one that is not finite becomes null, and a tuple a list.
    """

    name: str
    value: Any

    def __post_init__(self) -> None:
        """Check the name."""
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", self.name) is None:
            raise ValueError(f"{self.name!r}: the name of data has letters, digits, - and _, a letter first")

    @property
    def json(self) -> str:
        """The data as JSON in which nothing looks like HTML."""
        text = json.dumps(_finite(self.value), allow_nan=False)
        return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


Block = Paragraph | Terms | PageTable | Picture | Pictures | Code | Data


@dataclass(frozen=True, init=False)
class Section:
    """A heading and what stands below it: ``Section("Plans", Paragraph(...), PageTable(...))``."""

    heading: str
    blocks: tuple[Block, ...]

    def __init__(self, heading: str, *blocks: Block) -> None:
        object.__setattr__(self, "heading", heading)
        object.__setattr__(self, "blocks", blocks)


def render(title: str, sections: Iterable[Section], *, subtitle: str = "") -> str:
    """Make a page; from four sections on there is a list of them at the top.

    Two ``Data`` of a name are a ``ValueError``.
    """
    sections = list(sections)
    names = [block.name for section in sections for block in section.blocks if isinstance(block, Data)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two Data have the name {sorted(twice)[0]}")
    blocks = [[(type(block).__name__, block) for block in section.blocks] for section in sections]
    return _template().render(
        title=title, subtitle=subtitle, sections=list(zip([one.heading for one in sections], blocks, strict=True))
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["link"] = lambda value: isinstance(value, Link)
    return environment.from_string(resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8"))


def write_page(path: Path, title: str, sections: Iterable[Section], *, subtitle: str = "") -> None:
    """Write a page, complete or not at all; arguments and errors as in ``render``. Missing folders are created."""
    html = render(title, sections, subtitle=subtitle)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, html, what="page")
    except OSError as error:
        raise UserError(
            f"the page can't be written ({error.strerror})", where=path, remedy="name another file"
        ) from error
    except UnicodeError as error:  # half of a surrogate pair, from JSON or from a file name of other bytes than UTF-8
        raise UserError(
            f"the page can't be written (a text in it is not valid Unicode: {error})", where=path
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """A cell as the template takes it: its text, where it leads, whether it is a number."""

    text: str
    href: str | None = None
    number: bool = False


def _shown(value: Cell, how: str) -> _Shown:
    if isinstance(value, Link):
        return _Shown(text=value.text, href=value.href)
    if value is None:
        return _Shown(text=NOTHING)
    if isinstance(value, bool):
        return _Shown(text="yes" if value else "no")
    if isinstance(value, str):
        return _Shown(text=value)
    return _Shown(text=format(value, how or (",d" if isinstance(value, Integral) else ".4g")), number=True)


def _for_dark_screens(svg: bytes) -> bytes:
    """Give an SVG of matplotlib other colours on a dark screen.

    Inside a page an image follows the page's colour scheme. matplotlib writes colours into style attributes, which only
    an important rule overrides.
    """
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark} !important}}'
        for light, dark in _DARK.items()
        for kind in ("fill", "stroke")
    )
    rules += f"svg{{fill:{_DARK[INK]}}}"  # black text has no style
    return svg.replace(b"</style>", b"@media (prefers-color-scheme:dark){%s}</style>" % rules.encode(), 1)


def _is_number(value: Cell) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)  # numpy's numbers are Real as well


def _finite(value: Any) -> Any:
    if isinstance(value, Real) and not isinstance(value, bool):
        if isinstance(value, Integral):
            return int(value)
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
