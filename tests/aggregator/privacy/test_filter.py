"""A task stops at its budget: never one round later, and not long before."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest

from aggregator.privacy import filter as device_filter
from aggregator.privacy.accounting import device_epsilon
from aggregator.privacy.composition import Limits
from aggregator.privacy.events import ReleasedSum, SkellamShares
from aggregator.privacy.filter import DeviceBudget
from fl_protocol.errors import LocalMisuseError
from fl_protocol.renyi import INTEGER_ORDERS, epsilon_by_order, filter_order_index
from tests.aggregator.privacy.rounds import AGGREGATOR, HOUR_S, MODEL_RELEASE, SAMPLED, central, secure, tossed
from tests.enrolments import broken_copy

EPSILON, DELTA, MOST = 2.0, 1e-6, 160


def rounds_until_it_halts(budget: DeviceBudget, event: Any, most: int = MOST) -> list[ReleasedSum]:
    """What a coordinator does: ask, then run the round."""
    events: list[ReleasedSum] = []
    while len(events) < most and not budget.admits(events, event(len(events) + 1)):
        events.append(event(len(events) + 1))
    return events


def wide(number: int, **changes: Any) -> ReleasedSum:
    """A round with a noise multiplier of 20."""
    return secure(number, **{"shares": SkellamShares(400.0, 101), **changes})


def uneven(number: int) -> ReleasedSum:
    """Every third round half of the devices come."""
    return wide(number, shares=SkellamShares(400.0, 51 if number % 3 == 0 else 101))


def check_it_halts_at_its_budget(module: ModuleType) -> None:
    for limits, event, least in (
        (Limits(), wide, 60),
        (Limits(), uneven, 40),
        (Limits(45), uneven, 60),
        (Limits(None, 2.5 * HOUR_S), wide, 120),
        (Limits(45), wide, MOST),
    ):
        events = rounds_until_it_halts(module.DeviceBudget(EPSILON, DELTA, AGGREGATOR, limits), event)
        assert len(events) >= least
        assert device_epsilon(events, delta=DELTA, adversary=AGGREGATOR, limits=limits) <= EPSILON
        if least < MOST:
            following = [*events, event(len(events) + 1)]
            assert device_epsilon(following, delta=DELTA, adversary=AGGREGATOR, limits=limits) > 0.97 * EPSILON
            assert len(events) < MOST


def test_a_task_stops_at_its_budget() -> None:
    check_it_halts_at_its_budget(device_filter)


@pytest.mark.parametrize(
    "change",
    [
        ("if would_be <= self.epsilon:", "if would_be >= self.epsilon:"),
        ("if would_be <= self.epsilon:", "if self.enforced_epsilon(events) <= self.epsilon:"),
        ("self.enforced_epsilon([*events, following])", "self.enforced_epsilon([following])"),
        ("device_rdp(events, self.adversary, self.limits)", "device_rdp(events, self.adversary)"),
        ("epsilon_by_order(rdp, self.delta, INTEGER_ORDERS)[self._order_index]", "rdp[self._order_index]"),
        ("if not events:", "if len(events) < 500:"),
    ],
)
def test_a_filter_that_does_not_hold_its_budget_is_caught(change: tuple[str, str]) -> None:
    check_it_halts_at_its_budget(broken_copy(device_filter.__name__))
    with pytest.raises(AssertionError):
        check_it_halts_at_its_budget(broken_copy(device_filter.__name__, change))


def test_it_is_enforced_at_one_order_that_no_round_has_a_say_in() -> None:
    budget = DeviceBudget(EPSILON, DELTA, AGGREGATOR)
    index = INTEGER_ORDERS.index(budget.order)
    for events in ([wide(1)], [uneven(n) for n in range(1, 30)], [secure(1, shares=SkellamShares(2.0, 101))]):
        enforced = epsilon_by_order(device_filter.device_rdp(events, AGGREGATOR), DELTA, INTEGER_ORDERS)[index]
        assert budget.enforced_epsilon(events) == enforced
        assert device_epsilon(events, delta=DELTA, adversary=AGGREGATOR) <= enforced
    linear = device_filter.device_rdp([central()], MODEL_RELEASE)
    assert index == filter_order_index(epsilon=EPSILON, delta=DELTA, cost=linear, orders=INTEGER_ORDERS)


def test_the_reason_says_what_would_be_spent_and_what_is_allowed() -> None:
    budget = DeviceBudget(EPSILON, DELTA, AGGREGATOR)
    events = rounds_until_it_halts(budget, wide)
    number = len(events) + 1
    reason = budget.admits(events, wide(number))
    for words in (
        f"round {number}",
        "against aggregator",
        "budget is 2",
        f"with {len(events)} rounds it stands at 1.9",
    ):
        assert words in reason, reason


def test_noise_that_does_not_count_is_never_admitted() -> None:
    assert "epsilon inf" in DeviceBudget(EPSILON, DELTA, AGGREGATOR).admits([], central())
    assert DeviceBudget(EPSILON, DELTA, MODEL_RELEASE).admits([], central(sigma=200.0)) == ""
    assert DeviceBudget(1e-9, DELTA, MODEL_RELEASE).admits([], central(sigma=1e6))
    assert DeviceBudget(math.inf, DELTA, AGGREGATOR).admits([], central()) == ""  # claims nothing


def test_secret_coins_go_further() -> None:
    with_coins = rounds_until_it_halts(DeviceBudget(EPSILON, DELTA, SAMPLED), lambda n: tossed(central(n), 0.05), 100)
    without = rounds_until_it_halts(DeviceBudget(EPSILON, DELTA, MODEL_RELEASE), central, 100)
    assert len(with_coins) == 100 > 5 * len(without) > 0


def test_a_budget_out_of_range_is_refused() -> None:
    for epsilon, delta, word in ((0.0, DELTA, "epsilon"), (math.nan, DELTA, "epsilon"), (1.0, 1.0, "delta")):
        with pytest.raises(LocalMisuseError, match=word):
            DeviceBudget(epsilon, delta, AGGREGATOR)
