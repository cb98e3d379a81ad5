"""When a round opens, commits, aborts, and when the task pauses or is done: a pure transition table.

`transition(state, event, now_s)` gives the next state and what to do; it does no I/O. A synchronous round closes at its
goal or at its deadline; it commits with at least the minimum cohort and otherwise aborts, saying why, and the next
round tries again from the same model. An asynchronous round (FedBuff: J. Nguyen et al., arXiv 2106.06639, algorithm
1; the goal is the buffer's size) is never given up for want of updates: its deadline moves until the minimum cohort
is there. Where updates are masked, a round that closes with enough of them is unmasked first: its helpers are asked,
and it is given up if they have not answered in time. The task is finished after the wanted number of committed
rounds. The operator pauses, resumes, aborts and rolls back.

Invariants: numbers, committed rounds and model versions never fall; at most one round is open; fewer updates than the
minimum cohort are never combined; a finished or aborted task opens no round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from aggregator.round_events import (
    AbortAsked,
    AbortRound,
    AnnounceTask,
    Arrived,
    AskHelpers,
    ClockJumped,
    CombineFailed,
    CommitRound,
    ExtendRound,
    FinishTask,
    OpenRound,
    PauseAsked,
    Reachable,
    ResumeAsked,
    RollBack,
    RollbackAsked,
    RoundAction,
    RoundEvent,
    StillMasked,
    Ticked,
    Unmasked,
    Unseen,
)
from aggregator.round_state import Phase, RoundPolicy, RoundState

__all__ = ["Phase", "RoundPolicy", "RoundState", "transition", "why_not"]

RESUME_GRACE_S = 30.0
"""Time an interrupted round has at least, counted from when devices can reach the aggregator again."""

UNSEEN_PART = 0.9
"""Of its duration a round has at least, counted from when devices can see it for the first time."""

PAUSED_BY_OPERATOR = "paused by the operator"


_Step = tuple[RoundState, list[RoundAction]]


def transition(state: RoundState, event: RoundEvent, now_s: float, *, policy: RoundPolicy) -> _Step:
    """The next state and what to do, in order.

    The state can change without anything to do (a pause that waits for the round's close): store it all the same.

    Args:
        state: the task's state.
        event: what happened.
        now_s: Unix seconds.
        policy: how rounds are run.
    """
    rule = _TABLE.get((state.phase, type(event)))
    if rule is None or why_not(state, event):
        return state, []
    return rule(state, event, now_s, policy)


def why_not(state: RoundState, event: RoundEvent) -> str:
    """Why an operator's order has no effect as the task stands; empty when it has one, and for any other event.

    Args:
        state: the task's state.
        event: the order.
    """
    reason = ""
    match event:
        case PauseAsked() | ResumeAsked() | AbortAsked() if state.phase is Phase.FINISHED:
            reason = f"the task is finished: all its {state.committed} rounds are done, and no more are opened"
        case PauseAsked() | ResumeAsked() | AbortAsked() | RollbackAsked() if state.phase is Phase.ABORTED:
            reason = f"the task was aborted for good ({state.reason}); create a new task to go on"
        case PauseAsked() if state.phase is Phase.PAUSED:
            reason = f"the task is paused already: {state.reason}"
        case PauseAsked(at_once=False) if state.pausing:
            reason = f"the task pauses already, when round {state.number} closes; to give that round up, pause at once"
        case ResumeAsked() if state.phase is Phase.IDLE:
            reason = "the task has not begun; its first round opens as soon as the broker can be reached"
        case ResumeAsked() if state.phase in _UNDER_WAY and not state.pausing:
            reason = f"the task is not paused: round {state.number} is {state.phase.value}"
        case RollbackAsked() if not 0 <= event.version <= state.version:
            reason = f"the model has no version {event.version}; its versions are 0 to {state.version}"
        case RollbackAsked() if event.version == state.version:
            reason = f"version {event.version} is the model in force already; name an earlier one"
    return reason


def _open_first(state: RoundState, _event: RoundEvent, now_s: float, policy: RoundPolicy) -> _Step:
    """Begin the task."""
    return _go_on(state, now_s, policy)


def _go_on(state: RoundState, now_s: float, policy: RoundPolicy) -> _Step:
    """With no round open: finish after the last round, pause if that was asked for, or open the next round."""
    if state.committed >= policy.rounds:
        return replace(_standing(state, Phase.FINISHED), version=state.version + policy.makes_models), [FinishTask()]
    if state.pausing:
        return _standing(state, Phase.PAUSED, PAUSED_BY_OPERATOR), [AnnounceTask()]
    if policy.halted:
        return _standing(state, Phase.PAUSED, policy.halted), [AnnounceTask()]
    number, deadline_s = state.number + 1, now_s + policy.duration_s
    opened = replace(
        state, phase=Phase.OPEN, number=number, arrived=0, opened_s=now_s, deadline_s=deadline_s, reason=""
    )
    return opened, [OpenRound(number, now_s, deadline_s)]


def _standing(state: RoundState, phase: Phase, reason: str = "") -> RoundState:
    """The state in a phase without an open round."""
    return replace(state, phase=phase, arrived=0, opened_s=0.0, deadline_s=0.0, pausing=False, reason=reason)


def _count(state: RoundState, event: Arrived, _now_s: float, _policy: RoundPolicy) -> _Step:
    """Take over the database's count; closing waits for the tick that follows."""
    return replace(state, arrived=max(state.arrived, event.total)), []


def _check_open(state: RoundState, _event: RoundEvent, now_s: float, policy: RoundPolicy) -> _Step:
    """Close the round if it has its goal or is out of time."""
    if state.arrived < policy.goal and now_s < state.deadline_s:
        return state, []
    if state.arrived >= policy.minimum_cohort:
        return _commit(state, now_s, policy) if policy.unmasking_s is None else _ask(state, now_s, policy.unmasking_s)
    # A pause that was asked for ends the waiting: without it an empty buffer would put the pause off for ever.
    if policy.mode == "async" and not state.pausing:
        return _move_deadline(state, now_s + policy.duration_s)
    return _after(AbortRound(state.number, _too_few(state, policy)), *_go_on(state, now_s, policy))


def _commit(state: RoundState, now_s: float, policy: RoundPolicy) -> _Step:
    """The round made what comes next."""
    closed = replace(state, committed=state.committed + 1, version=state.version + policy.makes_models, failures=0)
    return _after(CommitRound(state.number), *_go_on(closed, now_s, policy))


def _ask(state: RoundState, now_s: float, unmasking_s: float) -> _Step:
    """Ask helpers, or ask again, with the whole time to answer."""
    until_s = now_s + unmasking_s
    return replace(state, phase=Phase.UNMASKING, deadline_s=until_s), [AskHelpers(state.number, until_s)]


def _ask_again(state: RoundState, event: Reachable | ClockJumped, now_s: float, policy: RoundPolicy) -> _Step:
    """After an outage, or under another clock."""
    if isinstance(event, ClockJumped):
        state = replace(state, opened_s=min(state.opened_s + event.by_s, now_s))
    return _ask(state, now_s, policy.unmasking_s or policy.duration_s)


def _check_unmasking(state: RoundState, event: StillMasked, now_s: float, policy: RoundPolicy) -> _Step:
    """Give a round up whose helpers do not answer."""
    if now_s < state.deadline_s:
        return state, []
    return _give_up(state, CombineFailed(event.missing), now_s, policy)


def _unmask(state: RoundState, _event: Unmasked, now_s: float, policy: RoundPolicy) -> _Step:
    """All helpers have answered."""
    return _commit(state, now_s, policy)


def _after(first: RoundAction, state: RoundState, actions: list[RoundAction]) -> _Step:
    """A step that begins with one more action."""
    return state, [first, *actions]


def _too_few(state: RoundState, policy: RoundPolicy) -> str:
    """Why a round without its minimum cohort was given up, and what helps."""
    return (
        f"{state.arrived} of at least {policy.minimum_cohort} updates had arrived by the deadline, "
        f"{state.deadline_s - state.opened_s:.0f} s after the round opened; the model stays as it was. If this goes "
        "on: make rounds longer, have more devices take part, or lower minimum_cohort"
    )


def _move_deadline(state: RoundState, deadline_s: float) -> _Step:
    """The same round with another deadline."""
    return replace(state, deadline_s=deadline_s), [ExtendRound(state.number, deadline_s)]


def _resume_open(state: RoundState, event: RoundEvent, now_s: float, policy: RoundPolicy) -> _Step:
    """Leave time for the outboxes of an interrupted round: what is in them was charged for and should count."""
    if state.deadline_s > now_s + policy.duration_s:  # opened under a clock that was set back while nobody looked
        return _reset_clock(state, ClockJumped(0.0), now_s, policy)
    deadline_s = now_s + min(RESUME_GRACE_S, policy.duration_s)
    if state.arrived >= policy.goal or deadline_s <= state.deadline_s:
        return _check_open(state, event, now_s, policy)
    return _move_deadline(state, deadline_s)


def _begin_anew(state: RoundState, _event: RoundEvent, now_s: float, policy: RoundPolicy) -> _Step:
    """A round that no device has seen has all its time before it, but for a moment."""
    if now_s + UNSEEN_PART * policy.duration_s <= state.deadline_s:
        return state, []
    return _move_deadline(replace(state, opened_s=now_s), now_s + policy.duration_s)


def _reset_clock(state: RoundState, event: ClockJumped, now_s: float, policy: RoundPolicy) -> _Step:
    """Neither close a round because the clock was set forward, nor keep it open for long because it was set back."""
    # Moved along with the clock, so that what is reckoned from it (how long the round took) stays true.
    state = replace(state, opened_s=min(state.opened_s + event.by_s, now_s))
    earliest_s, latest_s = now_s + min(RESUME_GRACE_S, policy.duration_s), now_s + policy.duration_s
    deadline_s = min(max(state.deadline_s, earliest_s), latest_s)
    return (state, []) if deadline_s == state.deadline_s else _move_deadline(state, deadline_s)


def _give_up(state: RoundState, event: CombineFailed, now_s: float, policy: RoundPolicy) -> _Step:
    """Abort the round that came to nothing, and try again from the same model unless that has been tried enough."""
    what = "made a model that validation rejected" if event.rejected else "could not be combined"
    why = f"the {_updates(state)} of round {state.number} {what}: {event.reason}"
    abort = AbortRound(
        state.number, f"{why}. The model stays as it was", outcome="rejected" if event.rejected else "aborted"
    )
    state = replace(state, failures=state.failures + 1)
    if state.failures < policy.most_failures:
        return _after(abort, *_go_on(state, now_s, policy))
    reason = (
        f"{_counted(state.failures, 'round')} in a row came to nothing. The last: {why}. "
        "Once the cause is found, go on with: covey-aggregator task resume"
    )
    return _standing(state, Phase.PAUSED, reason), [abort, AnnounceTask()]


def _counted(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _updates(state: RoundState) -> str:
    """How many updates the open round has."""
    return _counted(state.arrived, "update")


def _dropped(state: RoundState, why: str) -> AbortRound:
    """Give the open round up because of an order."""
    return AbortRound(state.number, f"{why}. Dropped with the round: {_updates(state)}")


def _pause_open(state: RoundState, event: PauseAsked, now_s: float, policy: RoundPolicy) -> _Step:
    """Pause when the round closes, or give it up and pause."""
    state = replace(state, pausing=True)
    if not event.at_once:
        return state, []
    return _after(
        _dropped(state, f"{PAUSED_BY_OPERATOR} before its deadline; covey-aggregator task resume opens the next round"),
        *_go_on(state, now_s, policy),
    )


def _pause_idle(state: RoundState, _event: RoundEvent, _now_s: float, _policy: RoundPolicy) -> _Step:
    """Pause before the first round."""
    return _standing(state, Phase.PAUSED, PAUSED_BY_OPERATOR), [AnnounceTask()]


def _keep_going(state: RoundState, _event: RoundEvent, _now_s: float, _policy: RoundPolicy) -> _Step:
    """Take back a pause that waits for the round's close."""
    return replace(state, pausing=False), []


def _resume_paused(state: RoundState, _event: RoundEvent, now_s: float, policy: RoundPolicy) -> _Step:
    """Go on after a pause; whoever resumes has looked at the failures, which are counted anew."""
    return _go_on(replace(state, failures=0), now_s, policy)


def _abort_task(state: RoundState, event: AbortAsked, _now_s: float, _policy: RoundPolicy) -> _Step:
    """Give the task up for good, and its open round with it."""
    reason = "the operator aborted the task" + (f": {event.reason}" if event.reason else "")
    closing: list[RoundAction] = [_dropped(state, reason)] if state.phase in _UNDER_WAY else []
    return _standing(state, Phase.ABORTED, reason), [*closing, AnnounceTask()]


def _roll_back_open(state: RoundState, event: RollbackAsked, now_s: float, policy: RoundPolicy) -> _Step:
    """Give the open round up, since its updates belong to the model that is left, and go on from the other one."""
    why = f"the model was rolled back to version {event.version}; the next round starts from it"
    after, actions = _go_on(replace(state, version=state.version + 1), now_s, policy)
    return after, [_dropped(state, why), RollBack(event.version), *actions]


def _roll_back(state: RoundState, event: RollbackAsked, _now_s: float, _policy: RoundPolicy) -> _Step:
    """Put another model in force without opening a round."""
    return replace(state, version=state.version + 1), [RollBack(event.version), AnnounceTask()]


_UNDER_WAY = (Phase.OPEN, Phase.UNMASKING)
_TABLE: dict[tuple[Phase, type], Callable[[RoundState, Any, float, RoundPolicy], _Step]] = {
    (Phase.IDLE, Reachable): _open_first,
    (Phase.IDLE, Ticked): _open_first,  # when the database did not take the first opening
    (Phase.IDLE, PauseAsked): _pause_idle,
    (Phase.IDLE, AbortAsked): _abort_task,
    (Phase.IDLE, RollbackAsked): _roll_back,
    (Phase.OPEN, Reachable): _resume_open,
    (Phase.OPEN, Unseen): _begin_anew,
    (Phase.OPEN, Arrived): _count,
    (Phase.OPEN, Ticked): _check_open,
    (Phase.OPEN, CombineFailed): _give_up,
    (Phase.OPEN, ClockJumped): _reset_clock,
    (Phase.OPEN, PauseAsked): _pause_open,
    (Phase.OPEN, ResumeAsked): _keep_going,
    (Phase.OPEN, AbortAsked): _abort_task,
    (Phase.OPEN, RollbackAsked): _roll_back_open,
    (Phase.UNMASKING, Reachable): _ask_again,
    (Phase.UNMASKING, ClockJumped): _ask_again,
    (Phase.UNMASKING, StillMasked): _check_unmasking,
    (Phase.UNMASKING, Unmasked): _unmask,
    (Phase.UNMASKING, CombineFailed): _give_up,
    (Phase.UNMASKING, PauseAsked): _pause_open,
    (Phase.UNMASKING, ResumeAsked): _keep_going,
    (Phase.UNMASKING, AbortAsked): _abort_task,
    (Phase.UNMASKING, RollbackAsked): _roll_back_open,
    (Phase.PAUSED, ResumeAsked): _resume_paused,
    (Phase.PAUSED, AbortAsked): _abort_task,
    (Phase.PAUSED, RollbackAsked): _roll_back,
    (Phase.FINISHED, RollbackAsked): _roll_back,
}
