"""Tables whose rows become cards on a narrow screen, and the form and links that choose what is in them.

What is chosen stands in the address, so that it can be kept, sent to somebody, and gone back from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

from aggregator.dashboard.tags import attribute, box, text


@dataclass(frozen=True)
class Cell:
    """What stands in a cell.

    Args:
        words: untrusted.
        href: where it leads, if anywhere.
        state: shown as a chip, if given.
        makes: adds more than words, such as buttons.
    """

    words: str = ""
    href: str = ""
    state: str = ""
    makes: Callable[[], None] | None = None


Row = Sequence[str | Cell]


def table(caption: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """A table.

    Args:
        caption: what it is, for those who do not see it.
        columns: their names.
        rows: a cell for each column.
    """
    with box("table", "cv-table", aria_label=caption):
        with box("thead"), box("tr"):
            for name in columns:
                text("th", name, scope="col")
        with box("tbody"):
            for row in rows:
                with box("tr"):
                    for name, cell in zip(columns, row, strict=True):
                        _cell(name, cell if isinstance(cell, Cell) else Cell(cell))


def _cell(column: str, cell: Cell) -> None:
    about = {"data_label": column}
    if cell.makes is None and not cell.href and not cell.state:
        text("td", cell.words, **about)
        return
    with box("td", **about):
        if cell.href:
            text("a", cell.words, href=cell.href)
        elif cell.state:
            text("span", cell.words, "cv-chip", data_state=cell.state)
        elif cell.words:
            text("span", cell.words)
        if cell.makes is not None:
            cell.makes()


@dataclass(frozen=True)
class Choice:
    """A field of the form.

    Args:
        name: in the address.
        label: for people.
        value: as chosen.
        options: values with their words; none for a text field.
    """

    name: str
    label: str
    value: str
    options: tuple[tuple[str, str], ...] = ()


def chooser(path: str, choices: Sequence[Choice]) -> None:
    """The form that chooses; it works without a connection."""
    with box("form", "cv-choose", method="get", action=path, role="search"):
        for one in choices:
            with box("label", "cv-labelled"):
                text("span", one.label)
                if one.options:
                    with box("select", "cv-field", name=one.name):
                        for value, words in one.options:
                            made = text("option", words, value=value)
                            if value == one.value:
                                attribute(made, "selected", value="selected")
                else:
                    box("input", "cv-field", name=one.name, value=one.value, maxlength="64", autocomplete="off")
        text("button", "Show", "cv-button", type="submit")


def onwards(path: str, choices: Sequence[Choice], *, cursor: str | int | None, is_first: bool) -> None:
    """Links to the first and to the next page of a list."""
    chosen = {one.name: one.value for one in choices if one.value}
    with box("nav", "cv-links", aria_label="Pages of the list"):
        if not is_first:
            text("a", "First page", href=f"{path}?{urlencode(chosen)}")
        if cursor is not None:
            text("a", "Next page", href=f"{path}?{urlencode({**chosen, 'cursor': cursor})}", rel="next")
