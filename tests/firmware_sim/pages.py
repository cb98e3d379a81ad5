"""What tests of reports look for in a page: its words, and that no text of a run becomes markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

HOSTILE = "<script>alert('1')</script><img src=x onerror=alert(2)>\"&lt;"


class PageText(HTMLParser):
    """The text of a page, its tags and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def words_of(page: str) -> str:
    """All text of a page on one line."""
    return " ".join(" ".join(PageText(page).text).split())


def check_nothing_becomes_markup(page: str, *, least: int) -> None:
    """The hostile text is there so often, each time as text."""
    parsed = PageText(page)
    assert not {"script", "img", "iframe", "object", "a", "link"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "".join(parsed.text).count(HOSTILE) >= least


def check_loads_nothing(page: str) -> None:
    """It names no other file."""
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"|url\((?!#)|@import', page)
