"""What can happen to a task's rounds, and what is to be done then; `aggregator.rounds` is the table between. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fl_protocol.errors import LocalMisuseError


@dataclass(frozen=True)
class Reachable:
    """Devices can reach the aggregator: after its start, or after an outage of the broker."""


@dataclass(frozen=True)
class Arrived:
    """The database counts this many updates in the open round; a count that lags behind changes nothing."""

    total: int

    def __post_init__(self) -> None:
        if self.total < 0:
            raise LocalMisuseError(f"total: expected at least 0 updates, got {self.total}")


@dataclass(frozen=True)
class Ticked:
    """Time has passed."""


@dataclass(frozen=True)
class Unmasked:
    """Every helper has answered about the round that is being unmasked."""


@dataclass(frozen=True)
class StillMasked:
    """Time has passed, and helpers have not answered.

    Args:
        missing: which ones, and what they said, in words.
    """

    missing: str


@dataclass(frozen=True)
class CombineFailed:
    """The round's updates could not be combined, or (`rejected`) made a model that the validation set finds worse.

    It comes while the round's commit is carried out, so it is for the state before that commit.
    """

    reason: str
    rejected: bool = False


@dataclass(frozen=True)
class Unseen:
    """No device could see the open round until now: its manifest waited for keys of its helpers."""


@dataclass(frozen=True)
class PauseAsked:
    """The operator pauses the task: when the open round closes, or at once, which gives that round up."""

    at_once: bool


@dataclass(frozen=True)
class ResumeAsked:
    """The operator lets a paused task go on, or takes back a pause that has not begun."""


@dataclass(frozen=True)
class AbortAsked:
    """The operator gives the task up for good."""

    reason: str


@dataclass(frozen=True)
class RollbackAsked:
    """The operator wants an earlier version of the model back."""

    version: int


@dataclass(frozen=True)
class ClockJumped:
    """The clock was set forward (above 0) or back by so many seconds; `now_s` is the time after it."""

    by_s: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.by_s):
            raise LocalMisuseError(f"by_s: expected a finite number of seconds, got {self.by_s}")


@dataclass(frozen=True)
class CommitRound:
    """Combine the round's updates into the next version of the model."""

    number: int


@dataclass(frozen=True)
class AskHelpers:
    """Take no more updates into the round, and ask its helpers for the sums of their masks; or ask them again.

    Args:
        until_s: Unix seconds, by when they should have answered.
    """

    number: int
    until_s: float


@dataclass(frozen=True)
class AbortRound:
    """Throw the round's updates away; the model stays. Rejected: the validation set found the next model worse."""

    number: int
    reason: str
    outcome: Literal["aborted", "rejected"] = "aborted"


@dataclass(frozen=True)
class OpenRound:
    """Open a round with a fresh recipient key, and publish its manifest."""

    number: int
    opened_s: float
    deadline_s: float


@dataclass(frozen=True)
class ExtendRound:
    """Move the open round's deadline, and publish its manifest again. Earlier only after the clock was set back."""

    number: int
    deadline_s: float


@dataclass(frozen=True)
class FinishTask:
    """Make the finished model, a version of its own after the last round's, and publish it."""


@dataclass(frozen=True)
class AnnounceTask:
    """Publish the manifest again: what it says has changed though no round opened."""


@dataclass(frozen=True)
class RollBack:
    """Make the next version of the model from the parameters of an earlier one."""

    version: int


RoundOrder = PauseAsked | ResumeAsked | AbortAsked | RollbackAsked
RoundEvent = Reachable | Arrived | Ticked | Unseen | Unmasked | StillMasked | CombineFailed | ClockJumped | RoundOrder
RoundAction = AskHelpers | CommitRound | AbortRound | OpenRound | ExtendRound | FinishTask | AnnounceTask | RollBack
