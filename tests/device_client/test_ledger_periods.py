"""Periods and shares: each period has its own budget, no clock and no study alone opens a new one, shares hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client.errors import BudgetSpentError
from device_client.ledger import Budget, Counter, LogStore, PrivacyLedger, cost_of
from device_client.ledger.filters import RenyiFilter, common_order_index
from device_client.ledger.times import RoundTimes, widest_window_s
from fl_protocol.renyi import rdp_to_epsilon
from tests.device_client.ledger_ports import DAY_S, OTHER, START_S, TASK, MemoryCounter, Open, opened, reserve
from tests.device_client.ports import MemoryStore, make_plan

MONTH_S = 30 * DAY_S
MONTHLY = Budget(3.0, 1e-5, period_s=MONTH_S)
SHARED = Budget(3.0, 1e-5, period_s=MONTH_S, per_task={TASK: 1.5})
COST = cost_of(make_plan())
YEARS_S = 3652 * DAY_S


def fresh(open_ledger: Open, budget: Budget = MONTHLY) -> PrivacyLedger:
    return open_ledger(MemoryStore(), MemoryCounter(), budget)


def spend_all(ledger: PrivacyLedger, *, now_s: float, task: str = TASK, **signed: Any) -> int:
    """Take part until the ledger refuses; returns how often that was."""
    for count in range(1000):
        try:
            reserve(ledger, ledger.last_round(task) + 1, task=task, now_s=now_s, **signed)
        except BudgetSpentError:
            return count
    pytest.fail("the budget was never spent")


def test_each_period_has_the_whole_budget_and_what_was_spent_ever_is_told() -> None:
    ledger = opened(MONTHLY)
    counts = [spend_all(ledger, now_s=START_S + month * MONTH_S) for month in range(3)]
    assert counts[0] == counts[1] == counts[2] == opened(MONTHLY).remaining_participations(COST)
    assert ledger.spent_epsilon == rdp_to_epsilon(counts[2] * COST, 1e-5)
    assert ledger.spent_epsilon_ever == pytest.approx(rdp_to_epsilon(sum(counts) * COST, 1e-5))
    assert ledger.spent_epsilon <= 3.0 < ledger.spent_epsilon_ever <= 9.0
    assert (ledger.period_begins_s, ledger.period_ends_s) == (START_S + 2 * MONTH_S, START_S + 3 * MONTH_S)


def test_a_period_begins_and_ends_on_the_second() -> None:
    ledger = opened(MONTHLY)
    assert spend_all(ledger, now_s=START_S)
    assert spend_all(ledger, now_s=math.nextafter(START_S + MONTH_S, 0)) == 0
    assert spend_all(ledger, now_s=START_S + MONTH_S) > 0


@given(length_s=st.floats(1.0, 1e9), first_s=st.floats(-1e9, 1e10), after=st.floats(0.0, 1e3))
@settings(max_examples=200, deadline=None)
def test_the_time_that_is_told_is_the_time_from_which_it_is_not_refused(
    length_s: float, first_s: float, after: float
) -> None:
    ledger = opened(Budget(1.2, 1e-5, period_s=length_s))  # for one participation
    reserve(ledger, 1, now_s=first_s)
    now_s = first_s + after * length_s
    wanted: dict[str, Any] = {"task": TASK, "cost": COST}
    until_s = ledger.refuses_until_s(now_s=now_s, **wanted)
    if until_s is None:
        return
    assert now_s < until_s
    assert ledger.refuses_until_s(now_s=math.nextafter(until_s, -math.inf), **wanted) == until_s
    assert ledger.refuses_until_s(now_s=until_s, **wanted) is None
    with pytest.raises(BudgetSpentError):
        reserve(ledger, 2, now_s=math.nextafter(until_s, -math.inf))
    reserve(ledger, 2, now_s=until_s)


def test_a_period_without_rounds_leaves_nothing_behind() -> None:
    ledger = opened(MONTHLY)
    each = spend_all(ledger, now_s=START_S)
    assert spend_all(ledger, now_s=START_S + 7.5 * MONTH_S) == each
    assert ledger.period_begins_s == START_S + 7 * MONTH_S
    assert spend_all(ledger, now_s=START_S + 7.9 * MONTH_S) == 0


def test_the_order_is_fixed_anew_in_each_period() -> None:
    ledger = opened(Budget(8.0, 1e-5, period_s=MONTH_S))
    orders = []
    for month, plan in enumerate(
        (make_plan(noise_multiplier=20.0), make_plan(sampling_rate=0.05, noise_multiplier=0.7))
    ):
        reserve(ledger, month + 1, plan=plan, now_s=START_S + month * MONTH_S)
        orders.append(ledger.order)
    assert orders[0] != orders[1]


def test_periods_and_shares_are_the_same_after_a_restart() -> None:
    store, counter = MemoryStore(), MemoryCounter()
    ledger = PrivacyLedger(store, counter, SHARED)
    for number in range(1, 30):
        for task in (TASK, OTHER):
            try:
                reserve(ledger, number, task=task, now_s=START_S + number * 5 * DAY_S)
            except BudgetSpentError:
                continue
    again = PrivacyLedger(store.after_restart(), counter.after_restart(), SHARED)
    for one in (TASK, OTHER):
        assert again.spent_on(one) == ledger.spent_on(one) > 0
        assert again.spent_on_ever(one) == ledger.spent_on_ever(one) > ledger.spent_on(one)
    assert again.spent_epsilon == ledger.spent_epsilon
    assert again.spent_epsilon_ever == ledger.spent_epsilon_ever
    assert (again.order, again.period_ends_s) == (ledger.order, ledger.period_ends_s)


# --- whose word counts for the time -----------------------------------------------------------------------------------


class ClockLedger(PrivacyLedger):
    """Broken: believes the device's clock."""

    def reserve(self, **wanted: Any) -> float:
        return super().reserve(**{**wanted, "latest_s": math.inf, "earliest_s": -math.inf})


class StudyLedger(PrivacyLedger):
    """Broken: believes the study."""

    def reserve(self, **wanted: Any) -> float:
        return super().reserve(**{**wanted, "now_s": wanted["latest_s"]})


class WideLedger(PrivacyLedger):
    """Broken: a clock anywhere within what was signed will do, however much that is."""

    def _times(self, now_s: float, earliest_s: float, latest_s: float) -> RoundTimes:
        return RoundTimes(now_s, earliest_s, latest_s)


class ReopeningLedger(PrivacyLedger):
    """Broken: a period that is over may be opened again by setting the clock back."""

    def reserve(self, **wanted: Any) -> float:
        if self._spending.at_s is not None and wanted["now_s"] < self._spending.at_s:
            self._spending.at_s, self._spending.period = None, None
        return super().reserve(**wanted)


def check_a_clock_alone_opens_no_period(open_ledger: Open) -> None:
    for clock_s in (START_S + YEARS_S, START_S - YEARS_S):
        ledger = fresh(open_ledger)
        assert spend_all(ledger, now_s=START_S, earliest_s=START_S - 60, latest_s=START_S + 3600)
        for step in range(1, 50):
            day_s = START_S + step * DAY_S / 2
            now_s = clock_s + step * MONTH_S  # even if it is set forwards by a month every day
            assert spend_all(ledger, now_s=now_s, earliest_s=day_s - 60, latest_s=day_s + 3600) == 0


def check_a_study_alone_opens_no_period(open_ledger: Open) -> None:
    for signed_s in (START_S + YEARS_S, START_S - YEARS_S):
        ledger = fresh(open_ledger)
        assert spend_all(ledger, now_s=START_S, earliest_s=START_S - 60, latest_s=START_S + 3600)
        for step in range(1, 50):
            round_s = signed_s + step * MONTH_S
            now_s = START_S + step * DAY_S / 2
            assert spend_all(ledger, now_s=now_s, earliest_s=round_s - 60, latest_s=round_s + 3600) == 0
            assert spend_all(ledger, now_s=now_s, latest_s=round_s) == 0


def check_a_study_that_signs_all_of_time_leaves_no_period_to_the_clock(open_ledger: Open) -> None:
    for window_s in (15 * DAY_S + 1, 1e11):  # half a period is the most
        ledger = fresh(open_ledger)
        assert spend_all(ledger, now_s=START_S, earliest_s=START_S - 60, latest_s=START_S + 3600)
        for month in range(1, 13):
            now_s = START_S + month * MONTH_S
            around: dict[str, Any] = {"earliest_s": now_s - window_s / 2, "latest_s": now_s + window_s / 2}
            assert spend_all(ledger, now_s=now_s, **around) == 0
        assert ledger.period_ends_s == START_S + MONTH_S  # nor does one leap of the clock end the device's time


def check_an_old_period_is_not_opened_again(open_ledger: Open) -> None:
    ledger = fresh(open_ledger)
    assert spend_all(ledger, now_s=START_S)
    assert spend_all(ledger, now_s=START_S + MONTH_S)
    for now_s in (START_S, START_S - YEARS_S, START_S + MONTH_S):
        assert spend_all(ledger, now_s=now_s) == 0
    times_s = [entry.at_s for entry in ledger.reservations]
    assert times_s == sorted(times_s)


class ShareIgnoringLedger(PrivacyLedger):
    """Broken: whoever comes first may spend all."""

    def __init__(self, store: LogStore, counter: Counter, budget: Budget) -> None:
        super().__init__(store, counter, Budget(budget.epsilon, budget.delta, period_s=budget.period_s))


class OnlyShareLedger(PrivacyLedger):
    """Broken: a study with a share is not counted on the device's budget."""

    def reserve(self, **wanted: Any) -> float:
        spent = super().reserve(**wanted)
        if wanted["task"] in self.budget.per_task and self._spending.period is not None:
            self._spending.period.device.total = self._spending.period.device.total - COST
        return spent


def check_a_study_stays_within_its_share_and_all_within_the_device(open_ledger: Open) -> None:
    ledger = fresh(open_ledger, SHARED)
    share = spend_all(ledger, now_s=START_S)
    assert share == opened(Budget(1.5, 1e-5)).remaining_participations(COST)
    assert 0 < ledger.spent_on(TASK) <= 1.5
    rest = spend_all(ledger, now_s=START_S, task=OTHER)
    assert share + rest == RenyiFilter(3.0, 1e-5).remaining(COST, common_order_index(3.0, 1e-5))
    assert ledger.spent_epsilon <= 3.0
    assert rdp_to_epsilon((share + rest) * COST, 1e-5) <= 3.0


CHECKS = [
    (check_a_clock_alone_opens_no_period, ClockLedger),
    (check_a_study_alone_opens_no_period, StudyLedger),
    (check_a_study_that_signs_all_of_time_leaves_no_period_to_the_clock, WideLedger),
    (check_an_old_period_is_not_opened_again, ReopeningLedger),
    (check_a_study_stays_within_its_share_and_all_within_the_device, ShareIgnoringLedger),
    (check_a_study_stays_within_its_share_and_all_within_the_device, OnlyShareLedger),
]


@pytest.mark.parametrize(("check", "broken"), CHECKS)
def test_the_ledger_passes(check: Callable[[Open], None], broken: Open) -> None:
    del broken
    check(PrivacyLedger)


@pytest.mark.parametrize(("check", "broken"), CHECKS)
def test_a_broken_ledger_is_caught(check: Callable[[Open], None], broken: Open) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(broken)


@given(
    clocks=st.lists(st.floats(-YEARS_S, YEARS_S), min_size=1, max_size=40),
    length_s=st.floats(60.0, 40 * DAY_S),
)
@settings(max_examples=100, deadline=None)
def test_under_an_honest_study_no_clock_opens_more_periods_than_went_by(clocks: list[float], length_s: float) -> None:
    ledger = opened(MONTHLY)
    opened_periods = set()
    for step, clock_s in enumerate(clocks):
        true_s = START_S + step * 5 * DAY_S
        try:
            reserve(
                ledger,
                step + 1,
                now_s=START_S + clock_s,
                earliest_s=true_s,
                latest_s=true_s + length_s,
                plan=make_plan(noise_multiplier=100.0),
            )
        except BudgetSpentError:
            continue
        opened_periods.add(ledger.period_begins_s)
        spread_s = length_s + 2 * DAY_S  # a round and the tolerance for clocks
        assert len(opened_periods) <= 1 + math.floor((true_s - START_S + spread_s) / MONTH_S)


def test_a_first_period_does_not_begin_at_a_time_that_is_not_agreed_on() -> None:
    ledger = opened(MONTHLY)
    signed: dict[str, Any] = {"earliest_s": START_S - 60, "latest_s": START_S + 60}
    for now_s in (START_S + YEARS_S, START_S - YEARS_S):
        with pytest.raises(
            BudgetSpentError, match=r"the device's clock says 20\d\d-.* from 2027-01-15 .* set the clock"
        ):
            reserve(ledger, 1, now_s=now_s, **signed)
        assert ledger.refuses_until_s(task=TASK, cost=COST, now_s=now_s, **signed) == max(now_s, START_S - 60)
    reserve(ledger, 1, now_s=START_S, **signed)


def test_how_long_a_round_may_be_open_to_begin_a_period() -> None:
    periods_s = [DAY_S, 30 * DAY_S, 365 * DAY_S, None]
    assert [widest_window_s(period_s) for period_s in periods_s] == [DAY_S, 15 * DAY_S, 31 * DAY_S, math.inf]


def test_a_round_that_is_open_too_long_begins_no_period_and_is_told_why() -> None:
    wide: dict[str, Any] = {"earliest_s": START_S - 60, "latest_s": START_S + 16 * DAY_S}
    ledger = opened(MONTHLY)
    with pytest.raises(
        BudgetSpentError, match=r"cannot begin: round 1 of .* is open from .* at most 15 days are wanted"
    ):
        reserve(ledger, 1, now_s=START_S, **wide)
    assert ledger.refuses_until_s(task=TASK, cost=COST, now_s=START_S, **wide) == math.inf
    reserve(ledger, 1, now_s=START_S, earliest_s=START_S - 60, latest_s=START_S + 14 * DAY_S)
    reserve(ledger, 2, now_s=START_S + 1, **wide)  # within a period no time is needed
    assert [entry.at_s for entry in ledger.reservations] == [START_S, START_S]
    spend_all(ledger, now_s=START_S)
    text = refusal_of(ledger, now_s=START_S, **wide)
    assert text.endswith("from 2027-02-14 08:00 UTC on, in a round that is open for at most 15 days")


@pytest.mark.parametrize("clock_s", [-YEARS_S, YEARS_S])
def test_with_one_period_for_ever_and_within_a_period_a_wrong_clock_refuses_nothing(clock_s: float) -> None:
    signed: dict[str, Any] = {"earliest_s": START_S - 60, "latest_s": START_S + 60}
    reserve(opened(), 1, now_s=START_S + clock_s, **signed)
    ledger = opened(MONTHLY)
    reserve(ledger, 1, now_s=START_S, **signed)
    reserve(ledger, 2, now_s=START_S + clock_s, **signed)
    assert {entry.at_s for entry in ledger.reservations} == {START_S}


def test_a_clock_a_little_ahead_does_not_carry_the_ledger_beyond_what_was_signed() -> None:
    ledger = opened(MONTHLY)
    reserve(ledger, 1, now_s=START_S + DAY_S / 2, latest_s=START_S, earliest_s=START_S - 60)
    assert ledger.reservations[0].at_s == START_S


# --- what a refusal says ----------------------------------------------------------------------------------------------


def refusal_of(ledger: PrivacyLedger, **wanted: Any) -> str:
    with pytest.raises(BudgetSpentError) as refusal:
        reserve(ledger, 99, **wanted)
    return str(refusal.value)


def test_a_refusal_says_which_budget_and_from_when_on_not() -> None:
    ledger = opened(SHARED)
    spend_all(ledger, now_s=START_S)
    assert ledger.refuses_until_s(task=TASK, cost=COST, now_s=START_S) == START_S + MONTH_S
    assert ledger.refuses_until_s(task=OTHER, cost=COST, now_s=START_S) is None
    text = refusal_of(ledger, now_s=START_S)
    assert text.startswith("the privacy budget is spent: round 99 of clinic/watch would bring epsilon to 1.")
    assert "of the 1.5 of the share of clinic/watch (delta 1e-05)" in text
    assert text.endswith("it will not be refused from 2027-02-14 08:00 UTC on")
    spend_all(ledger, now_s=START_S, task=OTHER)
    assert "of the 3 of this device" in refusal_of(ledger, now_s=START_S, task=OTHER)


def test_a_refusal_under_a_wrong_clock_names_the_clock() -> None:
    ledger = opened(MONTHLY)
    spend_all(ledger, now_s=START_S)
    text = refusal_of(ledger, now_s=START_S + YEARS_S, latest_s=START_S + 60, earliest_s=START_S - 60)
    assert "from 2027-02-14 08:00 UTC on, once the clock, which says 2037-" in text


def test_what_costs_more_than_a_whole_period_is_never_admitted() -> None:
    plan = make_plan(noise_multiplier=0.5)
    ledger = opened(MONTHLY)
    assert ledger.refuses_until_s(task=TASK, cost=cost_of(plan), now_s=START_S) == math.inf
    assert refusal_of(ledger, plan=plan).endswith("more than a whole period has, so it will always be refused")


def test_what_remains_is_the_lesser_of_share_and_device() -> None:
    ledger = opened(SHARED)
    share = ledger.remaining_participations(COST, task=TASK)
    device = ledger.remaining_participations(COST)
    assert (share, device) == tuple(opened(Budget(e, 1e-5)).remaining_participations(COST) for e in (1.5, 3.0))
    assert ledger.remaining_participations(COST, task=OTHER) == device
    spend_all(ledger, now_s=START_S, task=OTHER)
    assert ledger.remaining_participations(COST, task=TASK) == 0
    assert ledger.remaining_participations(COST, task=TASK, now_s=START_S + MONTH_S) == share


def test_a_share_may_be_finite_where_the_device_claims_nothing() -> None:
    ledger = opened(Budget(math.inf, 1e-5, per_task={TASK: 1.5}))
    assert spend_all(ledger, now_s=START_S) == opened(Budget(1.5, 1e-5)).remaining_participations(COST)
    reserve(ledger, 1, task=OTHER, plan=make_plan(noise_multiplier=0.0))
