"""HTML elements by their own names, with text that stays text, and what is shown of numbers and times.

Security: text goes to Vue as text, and attributes as values: nothing that comes from outside is ever markup.
"""

from __future__ import annotations

from datetime import datetime, timezone

from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement


def text(tag: str, content: str = "", classes: str = "", **attributes: object) -> TextElement:
    """An element with text.

    Args:
        tag: of HTML.
        content: untrusted.
        classes: ours.
        attributes: `aria_label` stands for `aria-label`.
    """
    made = TextElement(tag=tag, text=content)
    _dress(made, classes, attributes)
    return made


def box(tag: str = "div", classes: str = "", **attributes: object) -> Element:
    """An element for others, as a context."""
    made = Element(tag)
    _dress(made, classes, attributes)
    return made


def _dress(made: Element, classes: str, attributes: dict[str, object]) -> None:
    if classes:
        made.classes(classes)
    for name, value in attributes.items():
        made.props[name.replace("_", "-").rstrip("-")] = value


def attribute(element: Element, name: str, value: object) -> None:
    """Set an attribute, and tell the page if it is another."""
    if element.props.get(name) != value:
        element.props[name] = value
        element.update()


def span(seconds: float) -> str:
    """A time span as people read it: `4 s`, `3:20`, `2 h 05 min`, `3 d 4 h`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def moment(at_s: float | None) -> str:
    """A time in UTC, to the minute."""
    if at_s is None:
        return "–"
    return datetime.fromtimestamp(at_s, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def count(number: int) -> str:
    """A number with thin spaces between thousands."""
    return f"{number:,}".replace(",", "\u202f")


def size(number: float) -> str:
    """Bytes, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"
        number /= 1000
    return ""
