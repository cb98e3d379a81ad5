"""Whose word counts for the time: the device's clock and the times a study signed have to agree. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timezone

from fl_protocol.errors import LocalMisuseError

CLOCK_TOLERANCE_S = 86_400.0
"""How far the clock may be outside the times that a study signed."""


@dataclass(frozen=True)
class RoundTimes:
    """What is known of the time when a round is charged, Unix seconds.

    Args:
        now_s: the device's clock.
        earliest_s: signed by the study, and past: the round's opening.
        latest_s: signed by the study, and not past: the round's deadline.
    """

    now_s: float
    earliest_s: float = -math.inf
    latest_s: float = math.inf

    def __post_init__(self) -> None:
        if not math.isfinite(self.now_s):
            raise LocalMisuseError(f"now_s: expected Unix seconds, got {self.now_s}")

    @property
    def agree(self) -> bool:
        """Whether the clock is within what was signed, or not far outside."""
        return self.earliest_s - CLOCK_TOLERANCE_S <= self.now_s <= self.latest_s + CLOCK_TOLERANCE_S

    def ledger_time_s(self, last_s: float | None) -> float:
        """The time that a line gets: never before the last one's, which it stays at where clock and study disagree."""
        if not self.agree:
            return self.now_s if last_s is None else last_s
        time_s = min(self.now_s, self.latest_s)
        return time_s if last_s is None else max(time_s, last_s)


def utc(time_s: float) -> str:
    """Unix seconds for people."""
    try:
        return datetime.fromtimestamp(time_s, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return f"{time_s:g} s"
