"""What a report's page holds for programs."""

import json
from html.parser import HTMLParser
from typing import Any


def embedded_data(html: str) -> dict[str, Any]:
    """Read the values of the ``Data`` of a page back, by name."""
    reader = _DataReader()
    reader.feed(html)
    reader.close()
    return {name: json.loads(text) for name, text in reader.found.items()}


class _DataReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._name: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "script" and given.get("type") == "application/json":
            self._name = given.get("id")

    def handle_data(self, data: str) -> None:
        if self._name is not None:
            self.found[self._name] = self.found.get(self._name, "") + data

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._name = None
