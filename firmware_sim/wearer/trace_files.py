"""Recorded traces from files; `firmware_sim.wearer.traces` says what is in them."""

from __future__ import annotations

from pathlib import Path

from firmware_sim.errors import TraceError
from firmware_sim.wearer.traces import Trace, parse_traces


def load_traces(path: Path) -> dict[str, Trace]:
    """Read a CSV file of traces; see the module.

    Args:
        path: of the file, UTF-8.

    Returns:
        Traces by device, in the order of their first lines.

    Raises:
        TraceError: it cannot be read, or a line is not as described; the text names the line and what is expected.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return parse_traces(file, where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"trace {path}: expected a CSV file in UTF-8 that can be read: {error}") from error
