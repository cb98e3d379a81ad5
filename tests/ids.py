"""What tests are called by their values: a name is sent between processes and written down many times."""

from __future__ import annotations

LONGEST_ID = 100


def short_id(value: object) -> str:
    """A value as text; its beginning and its length where it is long."""
    text = str(value)
    return text if len(text) <= LONGEST_ID else f"{text[: LONGEST_ID - 20]}... ({len(text)})"
