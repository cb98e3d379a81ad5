"""The worst choice of rounds for one device, against trying out all choices."""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.privacy import composition
from aggregator.privacy.composition import Limits
from fl_protocol.errors import LocalMisuseError
from tests.aggregator.privacy.rounds import secure
from tests.enrolments import broken_copy

ROUNDS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 9), st.integers(0, 9)), max_size=8)


def by_trying_all(spans: list[tuple[float, float]], costs: np.ndarray, cap: int | None, apart_s: float) -> np.ndarray:
    """Whether a device can be in these rounds: somewhere in each, and at least so long after the one before."""
    best = np.zeros(costs.shape[1])
    for size in range(len(spans) + 1):
        if cap is not None and size > cap:
            break
        for chosen in itertools.combinations(range(len(spans)), size):
            at_s, can = -np.inf, True
            for index in chosen:
                at_s = max(at_s + apart_s, spans[index][0])  # as early as it may
                can = can and at_s <= spans[index][1]
            if can:
                best = np.maximum(best, costs[list(chosen)].sum(axis=0))
    return best


def check(
    module: ModuleType, rounds: list[tuple[int, int, int, int]], cap: int | None, apart_s: float, *, exact: bool = False
) -> None:
    """Never below the truth, and the truth if rounds have no length; each order has its own."""
    opened_s, spans = 0.0, []
    for pause_s, length_s, _, _ in rounds:
        opened_s += pause_s
        spans.append((opened_s, opened_s if exact else opened_s + length_s))
    events = [secure(index + 1, opened_s=a, closed_s=b) for index, (a, b) in enumerate(spans)]
    costs = np.array([row[2:] for row in rounds], np.float64).reshape(len(rounds), 2)
    found = module.worst_case(costs, events, Limits(cap, apart_s))
    truth = by_trying_all(spans, costs, cap, apart_s)
    assert (found >= truth).all()
    assert not exact or (found == truth).all()


@settings(max_examples=150, deadline=None)
@given(ROUNDS, st.one_of(st.none(), st.integers(1, 6)), st.integers(0, 7), st.booleans())
def test_it_is_the_worst_of_all_choices(
    rounds: list[tuple[int, int, int, int]], cap: int | None, apart_s: int, exact: bool
) -> None:
    check(composition, rounds, cap, float(apart_s), exact=exact)


# Pause before, length, and the costs at two orders.
DEAR_LATE = [(1, 0, 1, 9), (1, 0, 2, 1), (1, 0, 9, 5), (1, 0, 8, 5), (1, 0, 1, 6)]
LONG = [(1, 4, 3, 3), (1, 4, 3, 3), (1, 4, 3, 3)]


@pytest.mark.parametrize(
    "change",
    [
        ("np.maximum.accumulate(costs + best[before], axis=0)", "costs + best[before]"),
        ("range(min(cap, len(costs)))", "range(min(cap - 1, len(costs)))"),
        ("closed - minimum_separation_s", "opened - minimum_separation_s"),
        ('side="right"', 'side="left"'),
        ("best[index + 1] = np.maximum(best[index], cost + best[before[index]])", "best[index + 1] = cost"),
        ("if limits.are_none", "if False"),
        # A greedy device: the first rounds, and not the dearest.
        (
            "return _at_most(costs, before, limits.participation_cap)",
            "return costs[:limits.participation_cap].sum(axis=0)",
        ),
        # What a device was in on average.
        (
            "return _at_most(costs, before, limits.participation_cap)",
            "return costs.mean(axis=0) * limits.participation_cap",
        ),
    ],
)
def test_forgetting_the_worst_case_is_caught(change: tuple[str, str]) -> None:
    def all_checks(module: ModuleType) -> None:
        for cap in (None, 1, 2, 3):
            for apart_s in (0.0, 1.0, 2.0, 4.0):
                check(module, DEAR_LATE, cap, apart_s, exact=True)
                check(module, LONG, cap, apart_s)

    all_checks(broken_copy(composition.__name__))
    broken = broken_copy(composition.__name__, change)
    if change[1] == "if False":  # the shortcut is one: without it the same comes out
        all_checks(broken)
        return
    with pytest.raises(AssertionError):
        all_checks(broken)


def test_a_device_that_came_late_in_one_round_may_be_early_in_the_next() -> None:
    # Rounds of four hours, an hour apart in opening; the device keeps three hours between: it can be in the first and
    # in the second.
    events = [secure(1, opened_s=0.0, closed_s=4.0), secure(2, opened_s=1.0, closed_s=5.0)]
    assert composition.worst_case(np.ones((2, 1)), events, Limits(None, 3.0)) == [2.0]
    assert composition.worst_case(np.ones((2, 1)), events, Limits(None, 5.5)) == [1.0]


def test_rounds_out_of_order_are_refused() -> None:
    for events in ([secure(2), secure(1)], [secure(1), secure(1)], [secure(1, opened_s=1.0), secure(2, opened_s=0.0)]):
        with pytest.raises(LocalMisuseError, match="ascending order"):
            composition.worst_case(np.ones((2, 1)), events, Limits())


def test_limits_out_of_range_are_refused() -> None:
    for cap, apart_s in ((0, 0.0), (None, -1.0), (None, float("nan")), (None, float("inf"))):
        with pytest.raises(LocalMisuseError, match="expected at least"):
            Limits(cap, apart_s)
