"""Numbers as people read them, with their units; for reports, where every figure is rounded the same way."""

from __future__ import annotations

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_DAY_S = 86_400.0


def number(value: float) -> str:
    """Three digits, or all of an integer part: 0.0123, 4.57, 12,346."""
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def count(amount: int, noun: str, plural: str = "") -> str:
    """1 device, 2 devices."""
    return f"{amount:,} {noun if amount == 1 else plural or noun + 's'}"


def amount(size_bytes: float) -> str:
    """Bytes in decimal units: 12.3 MB."""
    for unit, length in _UNITS:
        if abs(size_bytes) >= length:
            return f"{number(size_bytes / length)} {unit}"
    return f"{number(size_bytes)} B"


def duration(seconds: float) -> str:
    """The largest unit of which there is at least one and a half: 5.2 days, 37 minutes."""
    for noun, length_s in (("day", _DAY_S), ("hour", 3600.0), ("minute", 60.0)):
        if seconds >= 1.5 * length_s:
            return f"{number(round(seconds / length_s, 1))} {noun}s"
    return f"{number(round(seconds, 1))} seconds"
