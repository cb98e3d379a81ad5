"""Who fixes the order of a filter: the plan, not the count before it; and nobody who may spend only a share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_client.errors import BudgetSpentError
from device_client.ledger import LOG_NAME, Budget, PrivacyLedger, cost_of, cost_of_count
from device_client.ledger.filters import LEAST_LEFT_TO_GAUSSIANS, RenyiFilter, common_order_index
from device_client.ledger.lines import Reservation, decode_line
from device_client.ledger.spending import Period
from fl_protocol.messages import TrainingPlanMsg
from fl_protocol.renyi import ORDERS, Vector, filter_order_index
from tests.device_client.ledger_ports import BUDGET, OTHER, START_S, TASK, MemoryCounter, Open, opened, reserve
from tests.device_client.ports import MemoryStore, make_plan

SHARED = Budget(3.0, 1e-5, per_task={OTHER: 0.05})
PLAIN = make_plan(noise_multiplier=11.5664)
SAMPLED = make_plan(sampling_rate=0.05, noise_multiplier=1.0)
RARE = make_plan(sampling_rate=0.01, noise_multiplier=0.8)
ODD = [
    make_plan(noise_multiplier=100.0),
    make_plan(sampling_rate=0.1, noise_multiplier=1e100),
    make_plan(sampling_rate=1e-100, noise_multiplier=1e100),
]
ALONE = {60: PLAIN, 40: SAMPLED, 507: RARE}


def rounds_of(ledger: PrivacyLedger, plan: TrainingPlanMsg) -> int:
    """How often a study can take part."""
    for count in range(1000):
        try:
            reserve(ledger, count + 1, plan=plan)
        except BudgetSpentError:
            return count
    pytest.fail("the budget was never spent")


def count_of(ledger: PrivacyLedger, plan: TrainingPlanMsg, number: int = 1, **changes: Any) -> None:
    wanted: dict[str, Any] = {"task": TASK, "round_number": number, "noise_multiplier": 50.0, "now_s": START_S}
    ledger.reserve_count(plan=plan, **{**wanted, **changes})


class CountsFirstLedger(PrivacyLedger):
    """Broken: a count fixes the order that suits counts."""

    def reserve_count(self, *, plan: TrainingPlanMsg, noise_multiplier: float, **wanted: Any) -> None:
        free = make_plan(noise_multiplier=noise_multiplier)
        del plan
        super().reserve_count(plan=free, noise_multiplier=noise_multiplier, **wanted)


class FirstComeLedger(PrivacyLedger):
    """Broken: whoever comes first fixes the device's order, with a share or not."""

    def reserve(self, **wanted: Any) -> float:
        period = self._spending.period_at(START_S)
        cost = cost_of(wanted["plan"])
        if period.device.order is None:
            period.device._order_index = period.device.best_order_index(cost)
            self._spending.period = period
        return super().reserve(**wanted)


class WastefulLedger(PrivacyLedger):
    """Broken: it counts for a round that cannot be charged afterwards."""

    def reserve_count(self, *, noise_multiplier: float, **wanted: Any) -> None:
        wanted["plan"] = make_plan(noise_multiplier=1e9)
        super().reserve_count(noise_multiplier=noise_multiplier, **wanted)


def check_one_count_costs_few_rounds(open_ledger: Open) -> None:
    for alone, plan in ALONE.items():
        ledger = open_ledger(MemoryStore(), MemoryCounter(), BUDGET)
        count_of(ledger, plan)
        assert rounds_of(ledger, plan) >= 0.88 * alone


def check_a_study_with_a_share_starves_nobody(open_ledger: Open) -> None:
    for odd in ODD:
        for alone, plan in ALONE.items():
            ledger = open_ledger(MemoryStore(), MemoryCounter(), SHARED)
            reserve(ledger, 1, task=OTHER, plan=odd)
            assert rounds_of(ledger, plan) >= 0.8 * alone


def check_no_count_is_charged_for_a_round_that_cannot_be(open_ledger: Open) -> None:
    ledger = open_ledger(MemoryStore(), MemoryCounter(), BUDGET)
    assert rounds_of(ledger, PLAIN) == 60
    spent = ledger.spent_epsilon
    assert ledger.remaining_participations(cost_of_count(1000.0)) > 1  # a count by itself there is room for
    with pytest.raises(BudgetSpentError, match="a count in round 61 of clinic/watch and the round would bring epsilon"):
        count_of(ledger, PLAIN, 61, noise_multiplier=1000.0)
    assert ledger.spent_epsilon == spent


CHECKS = [
    (check_one_count_costs_few_rounds, CountsFirstLedger),
    (check_a_study_with_a_share_starves_nobody, FirstComeLedger),
    (check_no_count_is_charged_for_a_round_that_cannot_be, WastefulLedger),
]


@pytest.mark.parametrize("check", [check for check, _ in CHECKS])
def test_the_ledger_passes(check: Callable[[Open], None]) -> None:
    check(PrivacyLedger)


@pytest.mark.parametrize(("check", "broken"), CHECKS)
def test_a_broken_ledger_is_caught(check: Callable[[Open], None], broken: Open) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(broken)


def test_what_was_admitted_for_a_count_is_admitted_for_its_round() -> None:
    ledger = opened()
    for number in range(1, 1000):
        try:
            count_of(ledger, SAMPLED, number, noise_multiplier=20.0)
        except BudgetSpentError:
            break
        reserve(ledger, number, plan=SAMPLED)
    each = cost_of(SAMPLED) + cost_of_count(20.0)
    assert number - 1 == RenyiFilter(3.0, 1e-5).remaining(each, filter_order_index(epsilon=3.0, delta=1e-5, cost=each))


def test_the_order_is_the_same_after_a_restart_when_a_count_or_a_share_came_first() -> None:
    quiet = make_plan(noise_multiplier=1000.0)
    for budget, task in ((BUDGET, TASK), (SHARED, OTHER), (Budget(3.0, 1e-5, per_task={TASK: 1.5}), TASK)):
        store, counter = MemoryStore(), MemoryCounter()
        ledger = PrivacyLedger(store, counter, budget)
        count_of(ledger, quiet, task=task, noise_multiplier=1000.0)
        again = PrivacyLedger(store.after_restart(), counter.after_restart(), budget)
        assert again.order == ledger.order is not None
        assert again.reservations == ledger.reservations
        left = [one.remaining_participations(cost_of(quiet), task=task) for one in (ledger, again)]
        assert left[0] == left[1] > 0


def test_a_count_that_was_written_without_its_plan_is_read_as_before() -> None:
    store, counter = MemoryStore(), MemoryCounter()
    count_of(PrivacyLedger(store, counter, BUDGET), RARE)
    line = decode_line(store.read_log(LOG_NAME))
    assert isinstance(line, Reservation)
    old = msgspec.structs.replace(line, plan=None)
    assert b"plan" not in msgspec.json.encode(old)
    assert decode_line(msgspec.json.encode(old)) == old
    np.testing.assert_array_equal(old.repeated_rdp(), cost_of_count(50.0))
    np.testing.assert_array_equal(line.repeated_rdp(), cost_of_count(50.0) + cost_of(RARE))


@given(
    epsilon=st.floats(1e-3, 100.0),
    delta=st.sampled_from([1e-3, 1e-5, 1e-9]),
    z=st.floats(0.3, 1e3),
)
def test_the_common_order_leaves_plain_steps_their_part_and_is_never_above_theirs(
    epsilon: float, delta: float, z: float
) -> None:
    cost: Vector = np.array(ORDERS) / (2 * z * z)
    common, best = common_order_index(epsilon, delta), filter_order_index(epsilon=epsilon, delta=delta, cost=cost)
    assert common <= best
    fresh = RenyiFilter(epsilon, delta)
    assert fresh.remaining(cost, common) >= LEAST_LEFT_TO_GAUSSIANS * fresh.remaining(cost, best) - 1


def test_a_small_share_costs_the_device_no_more_than_the_share() -> None:
    period = Period(SHARED, number=0, begins_s=0.0, ends_s=1.0)
    for odd in ODD:
        cost = cost_of(odd)
        while period.refusal(OTHER, cost) is None:
            period.add(OTHER, cost, cost)
            if not cost.max() > 1e-6:
                break  # it would be admitted for ever
    assert period.device.total[period.device.order_index(0)] <= 0.05
