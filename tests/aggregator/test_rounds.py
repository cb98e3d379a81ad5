"""The round table: never below the minimum cohort, never a number twice, done after exactly its rounds."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from aggregator.rounds import (
    AbortRound,
    CombineFailed,
    CommitRound,
    ExtendRound,
    FinishTask,
    OpenRound,
    Phase,
    Reachable,
    RoundAction,
    RoundEvent,
    RoundPolicy,
    RoundState,
    Ticked,
    UpdateAccepted,
    transition,
)
from fl_protocol.errors import LocalMisuseError

POLICY = RoundPolicy(rounds=2, goal=3, minimum_cohort=2, duration_s=60.0)


class Task(RuleBasedStateMachine):
    """Any order of events at any time."""

    @initialize(
        rounds=st.integers(1, 4), cohort=st.integers(1, 4), extra=st.integers(0, 3), duration_s=st.floats(1.0, 1e4)
    )
    def begin(self, rounds: int, cohort: int, extra: int, duration_s: float) -> None:
        self.policy = RoundPolicy(rounds, cohort + extra, cohort, duration_s)
        self.state, self.now_s, self.arrived = RoundState(), 1000.0, 0
        self.opened: list[int] = []
        self.closed: list[int] = []
        self.commits = self.finishes = 0

    def tell(self, event: RoundEvent) -> None:
        before = self.state
        self.state, actions = transition(before, event, self.now_s, policy=self.policy)
        for action in actions:
            self.check(action, before, event)
        if self.opened and self.opened[-1] not in self.closed:
            assert self.state.phase is Phase.OPEN

    def check(self, action: RoundAction, before: RoundState, event: RoundEvent) -> None:
        match action:
            case OpenRound():
                assert action.number == before.number + 1
                assert action.number not in self.opened
                assert action.deadline_s == self.now_s + self.policy.duration_s
                self.opened.append(action.number)
                self.arrived = 0
            case CommitRound():
                assert action.number == self.opened[-1]
                assert action.number not in self.closed
                assert self.arrived >= self.policy.minimum_cohort
                assert self.arrived >= self.policy.goal or self.now_s >= before.deadline_s
                self.closed.append(action.number)
                self.commits += 1
            case AbortRound():
                assert action.number == self.opened[-1]
                assert action.number not in self.closed
                assert action.reason
                assert isinstance(event, CombineFailed) or self.arrived < self.policy.minimum_cohort
                self.closed.append(action.number)
            case ExtendRound():
                assert isinstance(event, Reachable)
                assert action.number == self.opened[-1]
                assert self.state.deadline_s == action.deadline_s > before.deadline_s
                assert action.deadline_s <= self.now_s + self.policy.duration_s
            case FinishTask():
                assert self.commits == self.policy.rounds
                self.finishes += 1

    @rule(wait_s=st.floats(0.0, 5000.0))
    def tick(self, wait_s: float) -> None:
        self.now_s += wait_s
        self.tell(Ticked())

    @rule()
    def arrive(self) -> None:
        if self.state.phase is Phase.OPEN:
            self.arrived += 1
        self.tell(UpdateAccepted())

    @rule()
    def start(self) -> None:
        self.tell(Reachable())

    @rule()
    def fail_to_combine(self) -> None:
        self.tell(CombineFailed("not finite"))

    @rule()
    def restart(self) -> None:
        """What a crash leaves: what the database holds."""
        if self.state.phase is not Phase.OPEN:
            self.state = RoundState(self.state.phase, self.state.number, self.state.committed)

    @invariant()
    def counts_agree(self) -> None:
        assert self.state.committed == self.commits <= self.policy.rounds
        assert self.finishes == (self.state.phase is Phase.FINISHED)
        assert self.state.number == len(self.opened)
        if self.state.phase is Phase.OPEN:
            assert self.state.arrived == self.arrived
            assert self.state.model_version == self.commits
        if self.state.phase is Phase.FINISHED:
            assert self.state.model_version == self.policy.rounds + 1


TestTask = Task.TestCase
TestTask.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def after(*events: tuple[RoundEvent, float], state: RoundState | None = None) -> tuple[RoundState, list[RoundAction]]:
    current, done = state if state is not None else RoundState(), list[RoundAction]()
    for event, now_s in events:
        current, actions = transition(current, event, now_s, policy=POLICY)
        done += actions
    return current, done


def test_a_round_closes_at_its_goal_and_the_task_finishes() -> None:
    arrivals = [(UpdateAccepted(), 1.0)] * 3
    state, actions = after((Reachable(), 0.0), *arrivals, (Ticked(), 1.0), *arrivals, (Ticked(), 2.0))
    assert [type(action) for action in actions] == [OpenRound, CommitRound, OpenRound, CommitRound, FinishTask]
    assert (state.phase, state.committed, state.number) == (Phase.FINISHED, 2, 2)
    assert after((Reachable(), 9.0), (Ticked(), 1e9), (UpdateAccepted(), 9.0), state=state) == (state, [])


def test_a_deadline_with_too_few_says_how_many_came() -> None:
    _, actions = after((Reachable(), 0.0), (UpdateAccepted(), 1.0), (Ticked(), 59.9), (Ticked(), 60.0))
    assert actions[1] == AbortRound(1, "1 of at least 2 updates had arrived by the deadline")
    assert actions[2] == OpenRound(2, 60.0, 120.0)


def test_a_deadline_with_the_minimum_cohort_commits() -> None:
    _, actions = after((Reachable(), 0.0), *[(UpdateAccepted(), 1.0)] * 2, (Ticked(), 60.0))
    assert actions[1] == CommitRound(1)


def test_a_first_round_that_could_not_be_opened_is_opened_by_the_next_tick() -> None:
    assert after((Ticked(), 5.0))[1] == [OpenRound(1, 5.0, 65.0)]


def test_a_round_interrupted_past_its_deadline_leaves_time_for_the_outboxes() -> None:
    state = RoundState(Phase.OPEN, 1, 0, arrived=2, opened_s=0.0, deadline_s=60.0)
    later, actions = after((Reachable(), 1000.0), (Ticked(), 1029.9), state=state)
    assert actions == [ExtendRound(1, 1030.0)]
    assert after((Ticked(), 1030.0), state=later)[1][0] == CommitRound(1)
    assert after((UpdateAccepted(), 1001.0), (Ticked(), 1001.0), state=later)[1][0] == CommitRound(1)


def test_a_round_interrupted_with_time_left_keeps_its_deadline() -> None:
    state = RoundState(Phase.OPEN, 1, 0, arrived=0, opened_s=0.0, deadline_s=60.0)
    assert after((Reachable(), 20.0), state=state) == (state, [])


def test_a_restart_with_the_goal_reached_closes_at_once() -> None:
    state = RoundState(Phase.OPEN, 1, 0, arrived=3, opened_s=0.0, deadline_s=60.0)
    assert after((Reachable(), 1000.0), state=state)[1][0] == CommitRound(1)


@pytest.mark.parametrize(
    "arguments", [(1, 1, 2, 60.0), (1, 1, 0, 60.0), (0, 1, 1, 60.0), (1, 1, 1, 0.0), (1, 1, 1, float("nan"))]
)
def test_policies_that_make_no_sense_are_refused(arguments: tuple[int, int, int, float]) -> None:
    with pytest.raises(LocalMisuseError, match="expected"):
        RoundPolicy(*arguments)
