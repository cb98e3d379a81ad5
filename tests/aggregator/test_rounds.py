"""The round table: never below the minimum cohort, never a number twice, done after exactly its rounds."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import Phase as HypothesisPhase
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from aggregator import rounds
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
    RoundOrder,
    StillMasked,
    Ticked,
    Unmasked,
    Unseen,
)
from aggregator.rounds import RESUME_GRACE_S, Phase, RoundPolicy, RoundState, transition, why_not
from fl_protocol.errors import LocalMisuseError

POLICY = RoundPolicy(rounds=2, goal=3, minimum_cohort=2, duration_s=60.0)
BUFFERED = RoundPolicy(rounds=2, goal=3, minimum_cohort=2, duration_s=60.0, mode="async", maximum_staleness=4)
MASKED = RoundPolicy(rounds=2, goal=3, minimum_cohort=2, duration_s=60.0, unmasking_s=20.0)
FINAL = (Phase.FINISHED, Phase.ABORTED)


UNDER_WAY = (Phase.OPEN, Phase.UNMASKING)


class Task(RuleBasedStateMachine):
    """Any order of events and orders at any time; `held` is what an operator and a database may rely on."""

    @initialize(
        rounds=st.integers(1, 4),
        cohort=st.integers(1, 4),
        extra=st.integers(0, 3),
        duration_s=st.floats(1.0, 1e4),
        buffered=st.booleans(),
        most_failures=st.integers(1, 3),
        masked=st.booleans(),
    )
    def begin(
        self,
        rounds: int,
        cohort: int,
        extra: int,
        *,
        duration_s: float,
        buffered: bool,
        most_failures: int,
        masked: bool,
    ) -> None:
        mode, staleness = ("async", 3) if buffered else ("sync", 0)
        self.policy = RoundPolicy(
            rounds,
            cohort + extra,
            cohort,
            duration_s,
            mode,  # type: ignore[arg-type]
            staleness,
            most_failures,
            unmasking_s=20.0 if masked and not buffered else None,
        )
        self.asked = 0
        self.state, self.now_s, self.arrived = RoundState(), 1e6, 0
        self.opened: list[int] = []
        self.closed: list[int] = []
        self.commits = self.finishes = self.versions = 0

    def tell(self, event: RoundEvent) -> None:
        before, refused = self.state, why_not(self.state, event)
        self.state, actions = transition(before, event, self.now_s, policy=self.policy)
        if isinstance(event, RoundOrder):
            assert bool(refused) == (self.state == before and not actions), (before, event)
        else:
            assert not refused
        for action in actions:
            self.check(action, before, event)
        assert (self.state.phase in UNDER_WAY) == (self.opened != self.closed)
        assert self.state.number >= before.number
        assert self.state.committed >= before.committed
        assert self.state.version >= before.version
        if before.phase in FINAL:
            assert self.state.phase is before.phase
            documented = isinstance(event, RollbackAsked) and before.phase is Phase.FINISHED
            assert documented or not actions

    def check(self, action: RoundAction, before: RoundState, event: RoundEvent) -> None:
        match action:
            case OpenRound():
                assert self.opened == self.closed
                assert action.number == before.number + 1
                assert action.deadline_s == self.now_s + self.policy.duration_s
                self.opened.append(action.number)
                self.arrived = 0
            case CommitRound():
                self.close(action.number)
                assert self.arrived >= self.policy.minimum_cohort
                if self.policy.unmasking_s is None:
                    assert self.arrived >= self.policy.goal or self.now_s >= before.deadline_s
                else:
                    assert self.asked == action.number
                    assert isinstance(event, Unmasked)
                self.commits, self.versions = self.commits + 1, self.versions + 1
            case AskHelpers():
                self.check_asking(action, before)
            case AbortRound():
                self.close(action.number)
                assert action.reason
                assert (action.outcome == "rejected") == (isinstance(event, CombineFailed) and event.rejected)
                if isinstance(event, StillMasked):
                    assert self.now_s >= before.deadline_s
                if isinstance(event, Ticked | Reachable):
                    assert self.arrived < self.policy.minimum_cohort
                    assert self.policy.mode == "sync" or before.pausing
            case ExtendRound():
                assert action.number == self.opened[-1]
                assert self.state.deadline_s == action.deadline_s != before.deadline_s
                assert self.now_s < action.deadline_s <= self.now_s + self.policy.duration_s
            case FinishTask():
                self.finishes, self.versions = self.finishes + 1, self.versions + 1
            case RollBack():
                assert 0 <= action.version < before.version
                self.versions += 1
            case AnnounceTask():
                assert self.state.phase not in UNDER_WAY

    def check_asking(self, action: AskHelpers, before: RoundState) -> None:
        assert self.policy.unmasking_s is not None
        assert action.number == self.opened[-1]
        assert self.arrived >= self.policy.minimum_cohort
        assert action.until_s == self.state.deadline_s == self.now_s + self.policy.unmasking_s
        if before.phase is Phase.OPEN:
            assert self.arrived >= self.policy.goal or self.now_s >= before.deadline_s
        self.asked = action.number

    def close(self, number: int) -> None:
        self.closed.append(number)
        assert self.opened == self.closed

    @rule(wait_s=st.floats(0.0, 5000.0))
    def tick(self, wait_s: float) -> None:
        self.now_s += wait_s
        self.tell(Ticked())

    @rule(more=st.integers(0, 3), lag=st.integers(0, 2))
    def arrive(self, more: int, lag: int) -> None:
        if self.state.phase is Phase.OPEN:
            self.arrived += more
        self.tell(Arrived(self.arrived))
        self.tell(Arrived(max(0, self.arrived - lag)))

    @rule()
    def fill_the_round(self) -> None:
        if self.state.phase is Phase.OPEN:
            self.arrived = max(self.arrived, self.policy.goal)
        self.tell(Arrived(self.arrived))
        self.tell(Ticked())

    @rule()
    def let_the_deadline_pass(self) -> None:
        """A wait of any length rarely does, with few updates there."""
        if self.state.phase is Phase.OPEN:
            self.now_s = self.state.deadline_s
        self.tell(Ticked())

    @rule(was_unseen=st.booleans())
    def start(self, was_unseen: bool) -> None:
        if was_unseen and self.state.phase is Phase.OPEN and not self.arrived:
            self.tell(Unseen())
            assert self.state.deadline_s - self.now_s >= 0.89 * self.policy.duration_s
        else:
            self.tell(Reachable())

    @rule(late=st.booleans())
    def wait_for_helpers(self, late: bool) -> None:
        if self.state.phase is Phase.UNMASKING and late:
            self.now_s = self.state.deadline_s
        self.tell(StillMasked("helper-b has not answered"))

    @rule()
    def hear_all_helpers(self) -> None:
        self.tell(Unmasked())

    @rule(rejected=st.booleans())
    def fail_to_combine(self, rejected: bool) -> None:
        self.tell(CombineFailed("not finite", rejected=rejected))

    @rule(by_s=st.floats(-9e5, 1e6))
    def set_the_clock(self, by_s: float) -> None:
        was_open, arrived = self.state.phase is Phase.OPEN, self.arrived
        was_unmasking = self.state.phase is Phase.UNMASKING
        self.now_s = max(1.0, self.now_s + by_s)
        self.tell(ClockJumped(by_s))
        if was_open:
            left_s = self.state.deadline_s - self.now_s
            assert min(RESUME_GRACE_S, self.policy.duration_s) * 0.999 <= left_s <= self.policy.duration_s * 1.001
            assert (self.state.phase, self.arrived) == (Phase.OPEN, arrived)
        if was_unmasking:
            assert (self.state.phase, self.state.deadline_s) == (Phase.UNMASKING, self.now_s + 20.0)

    @rule(at_once=st.booleans())
    def pause(self, at_once: bool) -> None:
        self.tell(PauseAsked(at_once=at_once))

    @rule()
    def resume(self) -> None:
        self.tell(ResumeAsked())

    @rule(chance=st.integers(0, 9))
    def abort(self, chance: int) -> None:
        if chance == 0:
            self.tell(AbortAsked("wrong protocol"))

    @rule(back=st.sampled_from([1, 2, 4, 0, -1]))
    def roll_back(self, back: int) -> None:
        self.tell(RollbackAsked(self.state.version - back))

    @invariant()
    def counts_agree(self) -> None:
        assert self.state.committed == self.commits <= self.policy.rounds
        assert self.state.version == self.versions
        assert self.state.number == len(self.opened)
        finished = self.state.phase is Phase.FINISHED
        assert finished == (self.commits == self.policy.rounds) == (self.finishes == 1)

    @invariant()
    def an_open_round_has_time_and_a_count(self) -> None:
        if self.state.phase in UNDER_WAY:
            longest_s = self.policy.duration_s if self.state.phase is Phase.OPEN else 20.0
            assert self.state.deadline_s > self.state.opened_s
            assert self.state.deadline_s <= self.now_s + longest_s
            assert self.state.arrived == self.arrived
        else:
            assert (self.state.arrived, self.state.deadline_s, self.state.pausing) == (0, 0.0, False)

    @invariant()
    def a_halt_has_a_reason(self) -> None:
        assert bool(self.state.reason) == (self.state.phase in (Phase.PAUSED, Phase.ABORTED))
        assert self.state.failures <= self.policy.most_failures


TestTask = Task.TestCase
TestTask.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


MOST_SEQUENCES = 800


def keeps_its_promises() -> bool:
    """Whether no sequence of events that hypothesis tries breaks one.

    Which sequences those are depends on what else this process has imported, so there have to be enough of them.
    """
    tries = settings(
        max_examples=MOST_SEQUENCES,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[HypothesisPhase.generate],
        print_blob=False,
        report_multiple_bugs=False,
    )
    try:
        run_state_machine_as_test(Task, settings=tries)
    except AssertionError:
        return False
    return True


def careless_about_the_cohort(
    state: RoundState, event: RoundEvent, now_s: float, policy: RoundPolicy
) -> tuple[RoundState, list[RoundAction]]:
    return rounds._check_open(state, event, now_s, replace(policy, minimum_cohort=1))


def forgetful_of_numbers(
    state: RoundState, event: RoundEvent, now_s: float, policy: RoundPolicy
) -> tuple[RoundState, list[RoundAction]]:
    after_, actions = rounds._give_up(state, event, now_s, policy)  # type: ignore[arg-type]
    return replace(after_, number=state.number), actions


def blind_to_jumps(
    state: RoundState, _event: RoundEvent, _now_s: float, _policy: RoundPolicy
) -> tuple[RoundState, list[RoundAction]]:
    return state, []


def leaving_the_round_open(
    state: RoundState, event: RoundEvent, now_s: float, policy: RoundPolicy
) -> tuple[RoundState, list[RoundAction]]:
    after_, actions = rounds._pause_open(state, event, now_s, policy)  # type: ignore[arg-type]
    return after_, [action for action in actions if not isinstance(action, AbortRound)]


def not_waiting_for_helpers(
    state: RoundState, event: RoundEvent, now_s: float, policy: RoundPolicy
) -> tuple[RoundState, list[RoundAction]]:
    return rounds._check_open(state, event, now_s, replace(policy, unmasking_s=None))


def forgetting_the_round(
    state: RoundState, event: RoundEvent, now_s: float, policy: RoundPolicy
) -> tuple[RoundState, list[RoundAction]]:
    return rounds._go_on(state, now_s, policy)


def rolling_back_the_count(
    state: RoundState, event: RoundEvent, now_s: float, policy: RoundPolicy
) -> tuple[RoundState, list[RoundAction]]:
    after_, actions = rounds._roll_back_open(state, event, now_s, policy)  # type: ignore[arg-type]
    return replace(after_, version=event.version), actions  # type: ignore[union-attr]


def test_the_table_keeps_its_promises() -> None:
    assert keeps_its_promises()


@pytest.mark.parametrize(
    ("place", "broken"),
    [
        ((Phase.OPEN, Ticked), careless_about_the_cohort),
        ((Phase.OPEN, CombineFailed), forgetful_of_numbers),
        ((Phase.OPEN, ClockJumped), blind_to_jumps),
        ((Phase.OPEN, PauseAsked), leaving_the_round_open),
        ((Phase.OPEN, RollbackAsked), rolling_back_the_count),
        ((Phase.ABORTED, Ticked), rounds._open_first),
        ((Phase.OPEN, Ticked), not_waiting_for_helpers),
        ((Phase.UNMASKING, StillMasked), forgetting_the_round),
        ((Phase.UNMASKING, ClockJumped), blind_to_jumps),
        ((Phase.UNMASKING, PauseAsked), leaving_the_round_open),
    ],
)
def test_a_table_with_one_broken_rule_is_noticed(
    place: tuple[Phase, type], broken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rounds._TABLE, place, broken)
    assert not keeps_its_promises()


def after(
    *events: tuple[RoundEvent, float], state: RoundState | None = None, policy: RoundPolicy = POLICY
) -> tuple[RoundState, list[RoundAction]]:
    current, done = state if state is not None else RoundState(), list[RoundAction]()
    for event, now_s in events:
        current, actions = transition(current, event, now_s, policy=policy)
        done += actions
    return current, done


def open_round(number: int = 1, *, arrived: int = 0, version: int = 0, pausing: bool = False) -> RoundState:
    return RoundState(Phase.OPEN, number, version, version, arrived, 0.0, 60.0, pausing)


FINISHED = RoundState(Phase.FINISHED, 2, 2, 3)


def test_a_round_closes_at_its_goal_and_the_task_finishes() -> None:
    one_round: list[tuple[RoundEvent, float]] = [(Arrived(3), 1.0), (Ticked(), 1.0)]
    state, actions = after((Reachable(), 0.0), *one_round, *one_round)
    assert [type(action) for action in actions] == [OpenRound, CommitRound, OpenRound, CommitRound, FinishTask]
    assert state == FINISHED
    assert after((Reachable(), 9.0), (Ticked(), 1e9), (Arrived(9), 9.0), state=state) == (state, [])


def test_a_deadline_with_too_few_says_what_happened_and_what_helps() -> None:
    _, actions = after((Reachable(), 0.0), (Arrived(1), 1.0), (Ticked(), 59.9), (Ticked(), 60.0))
    assert actions[1] == AbortRound(
        1,
        "1 of at least 2 updates had arrived by the deadline, 60 s after the round opened; the model stays as it was. "
        "If this goes on: make rounds longer, have more devices take part, or lower minimum_cohort",
    )
    assert actions[2] == OpenRound(2, 60.0, 120.0)


def test_a_deadline_with_the_minimum_cohort_commits() -> None:
    for policy in (POLICY, BUFFERED):
        _, actions = after((Reachable(), 0.0), (Arrived(2), 1.0), (Ticked(), 60.0), policy=policy)
        assert actions[1] == CommitRound(1)


def test_a_round_that_no_device_could_see_has_its_whole_time_when_they_can() -> None:
    state, actions = after((Reachable(), 0.0), (Unseen(), 6.0), policy=MASKED)
    assert actions == [OpenRound(1, 0.0, 60.0)]
    state, actions = after((Unseen(), 500.0), (Unseen(), 500.0), state=state, policy=MASKED)
    assert actions == [ExtendRound(1, 560.0)]
    assert (state.opened_s, state.deadline_s) == (500.0, 560.0)


def test_a_masked_round_waits_for_its_helpers() -> None:
    state, actions = after((Reachable(), 0.0), (Arrived(3), 1.0), (Ticked(), 1.0), policy=MASKED)
    assert actions[1:] == [AskHelpers(1, 21.0)]
    assert (state.phase, state.arrived) == (Phase.UNMASKING, 3)
    assert after((Ticked(), 1e9), (Arrived(9), 9.0), (StillMasked("b"), 20.9), state=state, policy=MASKED)[1] == []
    _, actions = after((Unmasked(), 5.0), state=state, policy=MASKED)
    assert actions == [CommitRound(1), OpenRound(2, 5.0, 65.0)]


def test_a_helper_that_does_not_answer_is_named_and_the_task_pauses_in_the_end() -> None:
    state, said = RoundState(), []
    for _ in range(MASKED.most_failures):
        state, actions = after(
            (Reachable(), 0.0), (Arrived(3), 1.0), (Ticked(), 1.0), (StillMasked("no answer of helper-b"), 21.0),
            state=state, policy=MASKED,
        )  # fmt: skip
        said += [action.reason for action in actions if isinstance(action, AbortRound)]
    assert [reason.split(":")[0] for reason in said] == [
        f"the 3 updates of round {number} could not be combined" for number in (1, 2, 3)
    ]
    assert all("no answer of helper-b" in reason for reason in said)
    assert (state.phase, "no answer of helper-b" in state.reason) == (Phase.PAUSED, True)


def test_a_garbage_sum_gives_the_round_up() -> None:
    state, _ = after((Reachable(), 0.0), (Arrived(3), 1.0), (Ticked(), 1.0), policy=MASKED)
    _, actions = after((CombineFailed("a helper's sum is wrong"), 2.0), state=state, policy=MASKED)
    assert isinstance(actions[0], AbortRound)
    assert actions[1] == OpenRound(2, 2.0, 62.0)


@pytest.mark.parametrize("changes", [{"mode": "async"}, {"unmasking_s": 0.0}, {"unmasking_s": float("inf")}])
def test_time_for_helpers_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(LocalMisuseError, match="unmasking_s"):
        replace(MASKED, **changes)  # type: ignore[arg-type]


def test_a_buffer_that_is_not_full_enough_is_waited_for() -> None:
    state, actions = after((Ticked(), 60.0), (Ticked(), 500.0), state=open_round(arrived=1), policy=BUFFERED)
    assert actions == [ExtendRound(1, 120.0), ExtendRound(1, 560.0)]
    assert after((Arrived(3), 501.0), (Ticked(), 501.0), state=state, policy=BUFFERED)[1][0] == CommitRound(1)


def test_a_pause_ends_the_wait_for_a_buffer_at_its_deadline() -> None:
    state, actions = after((Ticked(), 60.0), state=open_round(arrived=1, pausing=True), policy=BUFFERED)
    assert [type(action) for action in actions] == [AbortRound, AnnounceTask]
    assert state.phase is Phase.PAUSED


def test_a_count_that_lags_behind_lowers_nothing() -> None:
    assert after((Arrived(2), 1.0), (Arrived(1), 2.0), state=open_round())[0].arrived == 2


def test_a_first_round_that_could_not_be_opened_is_opened_by_the_next_tick() -> None:
    assert after((Ticked(), 5.0))[1] == [OpenRound(1, 5.0, 65.0)]


def test_a_round_interrupted_past_its_deadline_leaves_time_for_the_outboxes() -> None:
    later, actions = after((Reachable(), 1000.0), (Ticked(), 1029.9), state=open_round(arrived=2))
    assert actions == [ExtendRound(1, 1030.0)]
    assert after((Ticked(), 1030.0), state=later)[1][0] == CommitRound(1)
    assert after((Arrived(3), 1001.0), (Ticked(), 1001.0), state=later)[1][0] == CommitRound(1)


def test_a_round_interrupted_with_time_left_keeps_its_deadline() -> None:
    assert after((Reachable(), 20.0), state=open_round()) == (open_round(), [])


def test_a_restart_with_the_goal_reached_closes_at_once() -> None:
    assert after((Reachable(), 1000.0), state=open_round(arrived=3))[1][0] == CommitRound(1)


def test_a_clock_set_forward_leaves_the_grace_and_one_set_back_the_duration() -> None:
    state, actions = after((ClockJumped(3600.0), 3610.0), state=open_round())
    assert actions == [ExtendRound(1, 3640.0)]
    assert state.opened_s == 3600.0  # ten seconds ago, as before the jump
    early = RoundState(Phase.OPEN, 1, opened_s=5000.0, deadline_s=5060.0)
    state, actions = after((ClockJumped(-4000.0), 1010.0), state=early)
    assert actions == [ExtendRound(1, 1070.0)]
    assert state.opened_s == 1000.0
    assert after((ClockJumped(1.0), 11.0), state=open_round())[1] == []


def test_a_pause_waits_for_the_round_and_a_resumption_opens_the_next() -> None:
    pausing, actions = after((PauseAsked(at_once=False), 5.0), state=open_round())
    assert (pausing, actions) == (open_round(pausing=True), [])
    paused, actions = after((Arrived(3), 6.0), (Ticked(), 6.0), state=pausing)
    assert actions == [CommitRound(1), AnnounceTask()]
    assert paused == RoundState(Phase.PAUSED, 1, 1, 1, reason="paused by the operator")
    assert after((Ticked(), 1e6), (Reachable(), 1e6), state=paused) == (paused, [])
    resumed, actions = after((ResumeAsked(), 100.0), state=paused)
    assert actions == [OpenRound(2, 100.0, 160.0)]
    assert resumed.reason == ""


def test_a_pause_can_be_taken_back_before_it_begins() -> None:
    assert after((ResumeAsked(), 5.0), state=open_round(pausing=True)) == (open_round(), [])


def test_a_pause_at_once_gives_the_round_up() -> None:
    for pausing in (False, True):
        state, actions = after((PauseAsked(at_once=True), 5.0), state=open_round(arrived=1, pausing=pausing))
        assert state.phase is Phase.PAUSED
        aborted, announced = actions
        assert isinstance(aborted, AbortRound)
        assert aborted.reason == (
            "paused by the operator before its deadline; covey-aggregator task resume opens the next round. "
            "Dropped with the round: 1 update"
        )
        assert announced == AnnounceTask()


def test_a_pause_before_the_first_round_holds_it_back() -> None:
    state, actions = after((PauseAsked(at_once=False), 1.0), (Reachable(), 2.0), (Ticked(), 3.0))
    assert (state.phase, actions) == (Phase.PAUSED, [AnnounceTask()])
    assert after((ResumeAsked(), 4.0), state=state)[1] == [OpenRound(1, 4.0, 64.0)]


def test_a_pause_during_the_last_round_still_finishes_the_task() -> None:
    last = open_round(2, arrived=3, version=1, pausing=True)
    assert after((Ticked(), 5.0), state=last) == (FINISHED, [CommitRound(2), FinishTask()])


def test_an_aborted_task_opens_no_round_again() -> None:
    state, actions = after((AbortAsked("wrong sampling rate"), 5.0), state=open_round(arrived=2))
    assert actions == [
        AbortRound(1, "the operator aborted the task: wrong sampling rate. Dropped with the round: 2 updates"),
        AnnounceTask(),
    ]
    everything: list[RoundEvent] = [
        Reachable(),
        Ticked(),
        ResumeAsked(),
        PauseAsked(at_once=True),
        RollbackAsked(0),
        CombineFailed("x"),
    ]
    assert after(*[(event, 1e9) for event in everything], state=state) == (state, [])
    assert state.reason == "the operator aborted the task: wrong sampling rate"


@pytest.mark.parametrize("phase", [Phase.IDLE, Phase.PAUSED])
def test_a_task_without_an_open_round_can_be_aborted(phase: Phase) -> None:
    state, actions = after((AbortAsked(""), 5.0), state=RoundState(phase))
    assert (state.phase, actions) == (Phase.ABORTED, [AnnounceTask()])


def test_a_rollback_drops_updates_for_the_model_that_is_left() -> None:
    state, actions = after((RollbackAsked(0), 5.0), state=open_round(2, arrived=1, version=1))
    assert actions == [
        AbortRound(
            2,
            "the model was rolled back to version 0; the next round starts from it. Dropped with the round: 1 update",
        ),
        RollBack(0),
        OpenRound(3, 5.0, 65.0),
    ]
    assert (state.version, state.committed) == (2, 1)


def test_a_rollback_leaves_a_paused_task_paused_and_a_finished_one_finished() -> None:
    for state in (RoundState(Phase.PAUSED, 1, 1, 1, reason="paused by the operator"), FINISHED):
        rolled_back, actions = after((RollbackAsked(0), 5.0), state=state)
        assert actions == [RollBack(0), AnnounceTask()]
        assert rolled_back == replace(state, version=state.version + 1)


def test_rounds_that_come_to_nothing_in_a_row_pause_the_task_and_say_why() -> None:
    worse, broken = CombineFailed("loss 0.9 instead of 0.5", rejected=True), CombineFailed("not finite")
    state, actions = after((broken, 5.0), (worse, 6.0), (worse, 7.0), state=open_round(arrived=3))
    assert [type(action) for action in actions] == [
        *(AbortRound, OpenRound),
        *(AbortRound, OpenRound),
        *(AbortRound, AnnounceTask),
    ]
    assert actions[0] == AbortRound(
        1, "the 3 updates of round 1 could not be combined: not finite. The model stays as it was"
    )
    assert isinstance(actions[2], AbortRound)
    assert actions[2].outcome == "rejected"
    assert state == RoundState(
        Phase.PAUSED,
        3,
        failures=3,
        reason="3 rounds in a row came to nothing. The last: the 0 updates of round 3 made a model that validation "
        "rejected: loss 0.9 instead of 0.5. Once the cause is found, go on with: covey-aggregator task resume",
    )
    assert after((ResumeAsked(), 9.0), state=state)[0].failures == 0


def test_a_commit_ends_the_row_of_failures() -> None:
    state, _ = after((CombineFailed("x"), 5.0), (Arrived(3), 6.0), state=open_round(arrived=3))
    assert state.failures == 1
    assert after((Ticked(), 6.0), state=state)[0].failures == 0


PAUSED = RoundState(Phase.PAUSED, reason="paused by the operator")
ABORTED = RoundState(Phase.ABORTED, reason="the operator aborted the task")


@pytest.mark.parametrize(
    ("state", "order", "answer"),
    [
        (FINISHED, PauseAsked(at_once=True), "the task is finished: all its 2 rounds are done, and no more are opened"),
        (FINISHED, AbortAsked("x"), "finished"),
        (FINISHED, ResumeAsked(), "finished"),
        (ABORTED, RollbackAsked(0), "aborted for good .the operator aborted the task.; create a new task"),
        (ABORTED, ResumeAsked(), "aborted for good"),
        (PAUSED, PauseAsked(at_once=True), "paused already: paused by the operator"),
        (open_round(pausing=True), PauseAsked(at_once=False), "when round 1 closes"),
        (RoundState(), ResumeAsked(), "not begun"),
        (open_round(), ResumeAsked(), "not paused: round 1 is open"),
        (open_round(3, version=2), RollbackAsked(3), "no version 3; its versions are 0 to 2"),
        (open_round(3, version=2), RollbackAsked(-1), "no version -1"),
        (open_round(3, version=2), RollbackAsked(2), "version 2 is the model in force already"),
    ],
)
def test_an_order_without_effect_is_answered(state: RoundState, order: RoundOrder, answer: str) -> None:
    assert re.search(answer, why_not(state, order))
    assert transition(state, order, 5.0, policy=POLICY) == (state, [])


@pytest.mark.parametrize(
    "broken",
    [
        {"goal": 1, "minimum_cohort": 2},
        {"minimum_cohort": 0},
        {"rounds": 0},
        {"duration_s": 0.0},
        {"duration_s": float("nan")},
        {"duration_s": float("inf")},
        {"mode": "buffered"},
        {"mode": "sync", "maximum_staleness": 1},
        {"mode": "async", "maximum_staleness": -1},
        {"most_failures": 0},
    ],
)
def test_policies_that_make_no_sense_are_refused(broken: dict[str, object]) -> None:
    with pytest.raises(LocalMisuseError, match="expected"):
        replace(POLICY, **broken)  # type: ignore[arg-type]


def test_events_that_cannot_have_been_are_refused() -> None:
    with pytest.raises(LocalMisuseError, match="at least 0 updates, got -1"):
        Arrived(-1)
    with pytest.raises(LocalMisuseError, match="finite number of seconds, got nan"):
        ClockJumped(float("nan"))
