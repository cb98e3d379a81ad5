"""How old a recording is when the clock cannot be trusted. Pure.

A small device's clock starts at 1970, or years ahead, until a network tells it the time; it may also be set by hand.
So age is not a difference of two readings. It is time that was seen to pass: each reading adds what passed since the
reading before, but a step backwards adds nothing and a leap forward at most `LONGEST_STEP_S`. A clock that jumps ten
years therefore erases no more than a week's worth of recordings, and a recording stored under a clock ten years ahead
ages like every other. The price: a device that was off for a month takes that for a week, so recordings may outlive
their limit by the time it was off, though never their limit in time that it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from fl_protocol.errors import LocalMisuseError

LONGEST_STEP_S = 7 * 86_400.0


@dataclass(frozen=True)
class Retention:
    """What is kept.

    Args:
        maximum_count: records; the oldest go first.
        maximum_age_s: how long a record is kept, from when it was stored.
    """

    maximum_count: int
    maximum_age_s: float

    def __post_init__(self) -> None:
        if self.maximum_count < 1 or not self.maximum_age_s > 0:
            raise LocalMisuseError(
                "retention: expected at least one record and an age above 0 s, "
                f"got {self.maximum_count} records and {self.maximum_age_s} s"
            )


@dataclass(frozen=True)
class SeenTime:
    """Time that was seen to pass.

    Args:
        passed_s: seconds since the first reading; never less than before.
        latest_s: the last reading, Unix seconds.
        highest_s: the highest reading, Unix seconds.
    """

    passed_s: float
    latest_s: float
    highest_s: float

    @classmethod
    def begin(cls, now_s: float) -> SeenTime:
        """The first reading."""
        return cls(0.0, now_s, now_s)

    def at(self, now_s: float) -> SeenTime:
        """After another reading, Unix seconds."""
        step_s = now_s - self.latest_s
        if step_s > LONGEST_STEP_S:
            # Coming back from a clock that was far behind is not a leap: what counts is what is new.
            step_s = min(now_s - self.highest_s, LONGEST_STEP_S)
        return SeenTime(self.passed_s + max(step_s, 0.0), now_s, max(self.highest_s, now_s))
