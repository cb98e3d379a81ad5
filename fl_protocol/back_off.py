"""When to connect to a broker again. Pure."""

from __future__ import annotations

import math

LASTING_S = 60.0
"""A connection that lived shorter counts as a failed one: who accepts and hangs up is asked ever more rarely."""


class BackOff:
    """How long to wait before connecting again: ever longer while connections fail or die young.

    Args:
        longest_s: most to wait.
    """

    def __init__(self, longest_s: int) -> None:
        self._longest_s, self._failures, self._since_s = longest_s, 0, math.inf

    def connected(self, now_s: float) -> None:
        """A broker accepted the connection."""
        self._since_s = now_s

    def ended(self, now_s: float) -> int:
        """The connection ended, or was refused; seconds to wait, 1 after one that lasted."""
        lasted, self._since_s = now_s - self._since_s >= LASTING_S, math.inf
        self._failures = 1 if lasted else self._failures + 1
        return int(min(self._longest_s, 2 ** min(self._failures - 1, 30)))
