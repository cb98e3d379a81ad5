"""Whose word counts for the time: the device's clock and the times a study signed have to agree. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timezone

from fl_protocol.errors import LocalMisuseError

CLOCK_TOLERANCE_S = 86_400.0
"""How far the clock may be outside the times that a study signed."""
_WIDEST_S = 31 * 86_400.0


def widest_window_s(period_s: float | None) -> float:
    """How long a round may be open at most for its times to say anything about when it is.

    A clock may be wherever the window is, so that a study which signs all of time would leave it to the clock alone.
    Within half a period (and a month) the clock can be off by no more than that, and cannot be moved on further. A day
    is always allowed: the clock may be off by one in any case.
    """
    return math.inf if period_s is None else min(_WIDEST_S, max(CLOCK_TOLERANCE_S, period_s / 2))


@dataclass(frozen=True)
class RoundTimes:
    """What is known of the time when a round is charged, Unix seconds.

    Args:
        now_s: the device's clock.
        earliest_s: signed by the study, and past: the round's opening.
        latest_s: signed by the study, and not past: the round's deadline.
        widest_s: `widest_window_s`; without it any window will do.
    """

    now_s: float
    earliest_s: float = -math.inf
    latest_s: float = math.inf
    widest_s: float = math.inf

    def __post_init__(self) -> None:
        if not math.isfinite(self.now_s):
            raise LocalMisuseError(f"now_s: expected Unix seconds, got {self.now_s}")

    @property
    def is_too_wide(self) -> bool:
        """Whether a time was signed, but one that leaves the clock too much room."""
        is_signed = math.isfinite(self.earliest_s) or math.isfinite(self.latest_s)
        return is_signed and self.latest_s - self.earliest_s > self.widest_s

    @property
    def agree(self) -> bool:
        """Whether the clock is within what was signed, or not far outside; and what was signed is narrow enough."""
        if self.is_too_wide:
            return False
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


def disagreement(what: str, times: RoundTimes) -> str:
    """Why it is not known when it is, for people."""
    window = f"from {utc(times.earliest_s)} to {utc(times.latest_s)}"
    if times.is_too_wide:
        return (
            f"{what} is open {window}, which says little about when it is: at most {_days(times.widest_s)} are wanted"
        )
    return f"the device's clock says {utc(times.now_s)}, but {what} is {window}; set the clock"


def proviso(times: RoundTimes) -> str:
    """What else is needed for the next period."""
    if times.agree:
        return ""
    if times.is_too_wide:
        return f", in a round that is open for at most {_days(times.widest_s)}"
    return f", once the clock, which says {utc(times.now_s)}, agrees with the study's"


def _days(length_s: float) -> str:
    """A length of time for people."""
    return f"{length_s / 86_400:.3g} days"
