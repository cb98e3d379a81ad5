"""Whether a process's loop goes round: a thread that answers while the loop hangs must not say that all is well."""

from __future__ import annotations

from collections.abc import Callable

LONGEST_TURN_S = 120.0
"""A turn of the loop takes milliseconds; one that makes a large model of many updates, up to a minute."""


class Heartbeat:
    """See the module docstring.

    Args:
        monotonic_s: seconds that no clock setting moves.
    """

    def __init__(self, monotonic_s: Callable[[], float]) -> None:
        self._monotonic_s = monotonic_s
        self._beat_s = monotonic_s()

    def beat(self) -> None:
        """The loop has gone round."""
        self._beat_s = self._monotonic_s()

    def why_not_alive(self) -> str:
        """Since when the loop hangs, in words; empty if it does not."""
        silent_s = self._monotonic_s() - self._beat_s
        return "" if silent_s < LONGEST_TURN_S else f"the loop has not gone round for {silent_s:.0f} s"
