"""When a round opens, commits, aborts, and when the task is done: a pure transition table.

`transition(state, event, now_s)` gives the next state and what to do; it does no I/O. A round closes at its goal or at
its deadline; it commits with at least the minimum cohort and otherwise aborts, saying why, and the next round tries
again from the same model. The task is finished after the wanted number of committed rounds.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace

from fl_protocol.errors import LocalMisuseError

RESUME_GRACE_S = 30.0
"""Time an interrupted round has at least, counted from when devices can reach the aggregator again."""


class Phase(str, enum.Enum):
    """Where a task stands."""

    IDLE = "idle"
    OPEN = "open"
    FINISHED = "finished"


@dataclass(frozen=True)
class RoundPolicy:
    """How a task's rounds are run.

    Args:
        rounds: committed rounds that finish the task.
        goal: updates at which a round closes early.
        minimum_cohort: fewest updates that are combined.
        duration_s: seconds from opening to deadline.
    """

    rounds: int
    goal: int
    minimum_cohort: int
    duration_s: float

    def __post_init__(self) -> None:
        if not 1 <= self.minimum_cohort <= self.goal:
            raise LocalMisuseError(f"minimum_cohort: expected 1 to goal ({self.goal}), got {self.minimum_cohort}")
        if self.rounds < 1 or not self.duration_s > 0:
            raise LocalMisuseError(
                f"rounds {self.rounds} and duration_s {self.duration_s}: expected at least 1 and above 0"
            )


@dataclass(frozen=True)
class RoundState:
    """A task's state: all that must be stored to go on after a crash.

    Args:
        number: the newest round's number; aborted rounds have numbers too. 0 before the first.
        committed: committed rounds, which is also the version of the model that an open round trains.
        arrived: updates accepted in the open round.
    """

    phase: Phase = Phase.IDLE
    number: int = 0
    committed: int = 0
    arrived: int = 0
    opened_s: float = 0.0
    deadline_s: float = 0.0

    @property
    def model_version(self) -> int:
        """Version of the model that the task's manifest names: the finished model is a version of its own."""
        return self.committed + 1 if self.phase is Phase.FINISHED else self.committed


@dataclass(frozen=True)
class Reachable:
    """Devices can reach the aggregator: after its start, or after an outage of the broker."""


@dataclass(frozen=True)
class UpdateAccepted:
    """An update of the open round is about to be committed to the database."""


@dataclass(frozen=True)
class Ticked:
    """Time has passed."""


@dataclass(frozen=True)
class CombineFailed:
    """The round's updates could not be combined."""

    reason: str


@dataclass(frozen=True)
class CommitRound:
    """Combine the round's updates into the next model."""

    number: int


@dataclass(frozen=True)
class AbortRound:
    """Throw the round's updates away; the model stays."""

    number: int
    reason: str


@dataclass(frozen=True)
class OpenRound:
    """Open a round with a fresh recipient key."""

    number: int
    opened_s: float
    deadline_s: float


@dataclass(frozen=True)
class ExtendRound:
    """Move the open round's deadline: devices could not reach the aggregator before it."""

    number: int
    deadline_s: float


@dataclass(frozen=True)
class FinishTask:
    """Make and announce the finished model: version `committed` + 1."""


RoundEvent = Reachable | UpdateAccepted | Ticked | CombineFailed
RoundAction = CommitRound | AbortRound | OpenRound | ExtendRound | FinishTask
_Step = tuple[RoundState, list[RoundAction]]


def transition(state: RoundState, event: RoundEvent, now_s: float, *, policy: RoundPolicy) -> _Step:
    """The next state and what to do, in order.

    Args:
        state: the task's state.
        event: what happened.
        now_s: Unix seconds.
        policy: how rounds are run.
    """
    rule = _TABLE.get((state.phase, type(event)))
    return (state, []) if rule is None else rule(state, event, now_s, policy)


def _open_first(state: RoundState, _event: RoundEvent, now_s: float, policy: RoundPolicy) -> _Step:
    """Begin the task."""
    return _open_next(state, now_s, policy)


def _open_next(state: RoundState, now_s: float, policy: RoundPolicy) -> _Step:
    """Open the next round, or finish after the last."""
    if state.committed >= policy.rounds:
        return replace(state, phase=Phase.FINISHED, arrived=0, opened_s=0.0, deadline_s=0.0), [FinishTask()]
    number, deadline_s = state.number + 1, now_s + policy.duration_s
    opened = replace(state, phase=Phase.OPEN, number=number, arrived=0, opened_s=now_s, deadline_s=deadline_s)
    return opened, [OpenRound(number, now_s, deadline_s)]


def _count(state: RoundState, _event: RoundEvent, _now_s: float, _policy: RoundPolicy) -> _Step:
    """Count an arrival; closing waits for the tick that follows, after the update's commit."""
    return replace(state, arrived=state.arrived + 1), []


def _check_open(state: RoundState, _event: RoundEvent, now_s: float, policy: RoundPolicy) -> _Step:
    """Close the round if it has its goal or is out of time."""
    if state.arrived < policy.goal and now_s < state.deadline_s:
        return state, []
    if state.arrived >= policy.minimum_cohort:
        closing: RoundAction = CommitRound(state.number)
        state = replace(state, committed=state.committed + 1)
    else:
        closing = AbortRound(
            state.number,
            f"{state.arrived} of at least {policy.minimum_cohort} updates had arrived by the deadline",
        )
    after, actions = _open_next(state, now_s, policy)
    return after, [closing, *actions]


def _resume(state: RoundState, event: RoundEvent, now_s: float, policy: RoundPolicy) -> _Step:
    """Leave time for the outboxes of an interrupted round: what is in them was charged for and should count."""
    deadline_s = now_s + min(RESUME_GRACE_S, policy.duration_s)
    if state.arrived >= policy.goal or deadline_s <= state.deadline_s:
        return _check_open(state, event, now_s, policy)
    return replace(state, deadline_s=deadline_s), [ExtendRound(state.number, deadline_s)]


def _abort(state: RoundState, event: RoundEvent, now_s: float, policy: RoundPolicy) -> _Step:
    """Give the round up and try again from the same model."""
    reason = event.reason if isinstance(event, CombineFailed) else ""
    after, actions = _open_next(state, now_s, policy)
    return after, [AbortRound(state.number, reason), *actions]


_TABLE: dict[tuple[Phase, type], Callable[[RoundState, RoundEvent, float, RoundPolicy], _Step]] = {
    (Phase.IDLE, Reachable): _open_first,
    (Phase.IDLE, Ticked): _open_first,  # when the database did not take the first opening
    (Phase.OPEN, Reachable): _resume,
    (Phase.OPEN, UpdateAccepted): _count,
    (Phase.OPEN, Ticked): _check_open,
    (Phase.OPEN, CombineFailed): _abort,
}
