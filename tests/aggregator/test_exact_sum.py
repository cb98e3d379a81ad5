"""Sums of updates: the same bits in whatever order and by whomever the updates were added up, and never an overflow."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from aggregator import exact_sum
from aggregator.errors import CombineError
from aggregator.exact_sum import LARGEST_NORM, MOST_UPDATES, ExactSum, norm_of
from tests.aggregator.desk import sum_of
from tests.enrolments import broken_copy

LENGTH = 3
Float32 = NDArray[np.float32]
# Whatever a device may send: denormals, negative zero, values whose last bits are below 2^-32, and the largest there
# are.
NUMBERS = st.one_of(
    st.floats(-LARGEST_NORM / 2, LARGEST_NORM / 2, width=32),
    st.floats(-(2.0**-26), 2.0**-26, width=32),
    st.floats(-(2.0**-126), 2.0**-126, width=32, allow_subnormal=True),
    st.sampled_from([0.0, -0.0, 2.0**-33, -(2.0**-33), 3 * 2.0**-33, 2.0**-149, 2.0**-32, 591.0]),
)
UPDATES = st.lists(
    st.lists(NUMBERS, min_size=LENGTH, max_size=LENGTH).map(lambda numbers: np.array(numbers, np.float32)),
    min_size=1,
    max_size=12,
)


def summed(updates: list[Float32], module: Any = exact_sum) -> ExactSum:
    total: ExactSum = module.ExactSum.zeros(len(updates[0]))
    for update in updates:
        total.add(update)
    return total


@given(updates=UPDATES, chance=st.randoms(use_true_random=False), workers=st.integers(1, 4), looks=st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_sum_is_the_same_bits_whoever_added_what_in_which_order(
    updates: list[Float32], chance: Any, workers: int, *, looks: bool
) -> None:
    expected = sum_of(*updates, length=LENGTH)
    assert summed(updates).total.tobytes() == expected.tobytes()
    shuffled = list(updates)
    chance.shuffle(shuffled)
    partials = [ExactSum.zeros(LENGTH) for _ in range(workers)]
    for update in shuffled:
        worker = chance.randrange(workers)
        partials[worker].add(update)
        if looks and chance.random() < 0.5:  # stored, and read again
            partials[worker] = ExactSum(partials[worker].total.copy(), partials[worker].count)
    chance.shuffle(partials)
    whole = ExactSum.zeros(LENGTH)
    for partial in partials:
        whole.merge(partial)
    assert whole.total.tobytes() == expected.tobytes()
    assert whole.count == len(updates)


def test_sums_of_floats_would_not_be_the_same() -> None:
    """What this module is for: the same three updates, added up as floats in two orders."""
    one, other, third = (np.float64(np.float32(number)) for number in (1e-10, 1000.0, -1000.0))
    assert (one + other) + third != one + (other + third)


@given(number=NUMBERS)
@example(number=2.0**-9)
def test_rounding_changes_a_value_by_at_most_half_a_unit(number: float) -> None:
    value = np.array([number], np.float32)
    error = Fraction(int(summed([value]).total[0]), 2**32) - Fraction(float(value[0]))
    assert abs(error) <= Fraction(1, 2**33)


def check_many_are_added_up(module: ModuleType) -> None:
    """The largest values that are taken, with bits down to the last, for longer than a float64 would have room for."""
    largest = np.array([1023.9999, 0.0, 2.0**-32], np.float32)
    total = module.ExactSum.zeros(LENGTH)
    for _ in range(5000):
        total.add(largest)
        total.add(np.array([2.0**-32, 2.0**-31, 3 * 2.0**-32], np.float32))
    expected = [5000 * int(np.ldexp(np.float64(largest[0]), 32)) + 5000, 5000 * 2, 5000 * 4]
    assert total.total.tolist() == expected
    assert total.count == 10_000


def check_each_value_is_rounded_by_itself(module: ModuleType) -> None:
    """To the nearest unit, and from half-way to the even one, whatever the sum so far is."""
    for values, units in (
        ([2.0**-33 * 1.5, -(2.0**-34), 1e-42], [1, 0, 0]),
        ([2.0**-33, 3 * 2.0**-33, 5 * 2.0**-33], [0, 2, 2]),
        ([-(2.0**-33), -3 * 2.0**-33, -5 * 2.0**-33], [0, -2, -2]),
    ):
        for before in (0, 1):
            total = module.ExactSum(np.full(LENGTH, before, np.int64), 1)
            for _ in range(100):
                total.add(np.array(values, np.float32))
            assert total.total.tolist() == [before + 100 * unit for unit in units]


def check_there_is_room_for_the_most(module: ModuleType) -> None:
    """As many updates as are ever taken, each as long as any may be: the sum still fits, and one more is refused."""
    longest = np.array([LARGEST_NORM, 0.0, -LARGEST_NORM], np.float32)
    before = (MOST_UPDATES - 1) * (longest.astype(np.float64) * 2.0**32).astype(np.int64)
    total = module.ExactSum(before, MOST_UPDATES - 1)
    total.add(longest)
    assert total.total.tolist() == [2**62, 0, -(2**62)]
    for more in (lambda: total.add(longest), lambda: total.merge(summed([longest]))):
        with pytest.raises(CombineError, match="at most 1048576 updates"):
            more()
    assert total.total.tolist() == [2**62, 0, -(2**62)]
    assert total.count == MOST_UPDATES


def check_blocks_are_all_added(module: ModuleType) -> None:
    """Longer than a block of the processor's cache, and no multiple of one."""
    update = np.random.default_rng(0).normal(size=140_001).astype(np.float32)
    total = summed([update, -update, update], module)
    # Of a million bytes that differ pytest would show how, line by line, for hours.
    assert np.array_equal(total.total, sum_of(update, length=len(update)))


def check_the_norm_is_told(module: ModuleType) -> None:
    norm: Callable[[Float32], float] = module.norm_of
    generator = np.random.default_rng(1)
    for length in (1, 300, 8192, 40_001):
        update = generator.normal(size=length).astype(np.float32)
        exact = math.sqrt(math.fsum(float(value) ** 2 for value in update))
        assert norm(update) == pytest.approx(exact, rel=1e-5)
    for value in (np.nan, np.inf, -np.inf):
        update[7] = value
        assert not math.isfinite(norm(update))
    # Squares that float32 has no room for.
    assert norm(np.full(100, 1e30, np.float32)) == pytest.approx(1e31, rel=1e-5)
    assert norm(np.full(100, 1e-30, np.float32)) == pytest.approx(1e-29, rel=1e-5)
    assert norm(np.full(4, 2.0**-149, np.float32)) == pytest.approx(2.0**-148)
    assert norm(np.full(4, 2.0**-149, np.float32)) > 0
    for nothing in (np.zeros(5, np.float32), -np.zeros(5, np.float32), np.zeros(0, np.float32)):
        assert norm(nothing) == 0.0


def test_a_sum_goes_on_after_it_was_looked_at() -> None:
    update = np.array([1.5, -0.25, 1e-5], np.float32)
    total = ExactSum.zeros(LENGTH)
    for count in range(1, 30):
        total.add(update)
        assert total.total.tobytes() == sum_of(*[update] * count, length=LENGTH).tobytes()


def test_merging_changes_the_other_in_nothing() -> None:
    update = np.array([1.5, -0.25, 1e-5], np.float32)
    one, other = summed([update]), summed([update, update])
    one.merge(other)
    one.add(update)
    assert (one.count, other.count) == (4, 2)
    assert other.total.tobytes() == sum_of(update, update, length=LENGTH).tobytes()


BREAKS = [
    (check_many_are_added_up, ("self._num_rounders += len(", "self._num_rounders = len(")),
    (check_each_value_is_rounded_by_itself, ("block += _ROUNDER\n", "block += _ROUNDER + UNIT\n")),
    (check_each_value_is_rounded_by_itself, ("_ROUNDER = 1.5 * 2.0**20", "_ROUNDER = 1.5 * 2.0**20 + UNIT")),
    (check_there_is_room_for_the_most, ("if self.count + more > MOST_UPDATES:", "if False:")),
    (
        check_blocks_are_all_added,
        ("for start in range(0, len(self._total) if self._waiting else 0, _BLOCK)", "for start in (0,)"),
    ),
    (check_the_norm_is_told, ("1e-20 < squared < math.inf", "True")),
    (check_the_norm_is_told, ("squared == 0 and values.max(initial=0) == values.min(initial=0)", "squared == 0")),
]


@pytest.mark.parametrize("check", [check for check, _ in BREAKS])
def test_it_holds(check: Callable[[ModuleType], None]) -> None:
    check(exact_sum)


@pytest.mark.parametrize(("check", "change"), BREAKS)
def test_a_broken_copy_is_caught(check: Callable[[ModuleType], None], change: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(broken_copy("aggregator.exact_sum", change))


def test_no_norm_that_is_let_through_can_overflow() -> None:
    """The bound of the docstring, from its constants."""
    assert MOST_UPDATES * LARGEST_NORM * 2.0**32 <= 2.0**62
    longest = np.array([LARGEST_NORM, 0.0, 0.0], np.float32)
    assert norm_of(longest) == LARGEST_NORM
