"""One JSON object a line on standard output: what a daemon did, for journald, for jq and for the fleet runner."""

from __future__ import annotations

import sys
from typing import Any, Protocol, TextIO

import msgspec


class Journal(Protocol):
    """Where a daemon tells what happened; fields are JSON values, never recordings, keys or updates."""

    def write(self, event: str, /, *, at_s: float, **fields: Any) -> None:
        """Record that `event` happened at `at_s` (Unix seconds)."""


class JsonLines:
    """A journal that writes JSON lines to a stream."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout

    def write(self, event: str, /, *, at_s: float, **fields: Any) -> None:
        """Write and flush one line; neither a reader that went away nor a full disk stops a daemon."""
        line = msgspec.json.encode({"event": event, "at_s": round(at_s, 3), **fields}).decode()
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: the stream is closed
            return
