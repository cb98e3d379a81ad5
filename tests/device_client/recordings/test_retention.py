"""Age is time that was seen to pass: a clock that jumps neither erases everything nor keeps anything for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_client.recordings.retention import LONGEST_STEP_S, Retention, SeenTime
from fl_protocol.errors import LocalMisuseError

DAY_S, YEAR_S, NOW_S = 86_400.0, 365 * 86_400.0, 1.8e9


def passed_s(*readings_s: float) -> float:
    time = SeenTime.begin(readings_s[0])
    for reading_s in readings_s[1:]:
        time = time.at(reading_s)
    return time.passed_s


def test_a_steady_clock_counts_what_it_shows() -> None:
    assert passed_s(*(NOW_S + day * DAY_S for day in range(400))) == 399 * DAY_S


@pytest.mark.parametrize("jump_s", [10 * YEAR_S, -10 * YEAR_S])
def test_a_jump_and_back_adds_a_week_at_most(jump_s: float) -> None:
    assert passed_s(NOW_S, NOW_S + jump_s, NOW_S + 60) <= LONGEST_STEP_S + 60


def test_a_clock_that_stays_wrong_goes_on_counting() -> None:
    wrong = [NOW_S + 10 * YEAR_S + day * DAY_S for day in range(30)]
    assert 29 * DAY_S <= passed_s(NOW_S, *wrong) <= 29 * DAY_S + LONGEST_STEP_S
    back = [NOW_S + day * DAY_S for day in range(30)]
    assert passed_s(NOW_S + 10 * YEAR_S, *back) == 29 * DAY_S


def test_a_device_that_starts_at_1970_every_day_ages_no_faster_than_the_days_pass() -> None:
    readings = [reading for day in range(100) for reading in (60.0, NOW_S + day * DAY_S)]
    assert passed_s(NOW_S, *readings) <= 100 * DAY_S


def test_a_long_time_off_counts_as_a_week() -> None:
    assert passed_s(NOW_S, NOW_S + 90 * DAY_S) == LONGEST_STEP_S


READINGS = st.lists(st.floats(-20 * YEAR_S, 20 * YEAR_S).map(lambda offset_s: NOW_S + offset_s), min_size=2, max_size=9)


@given(readings_s=READINGS)
def test_whatever_the_clock_does_time_never_goes_back_nor_leaps(readings_s: list[float]) -> None:
    time = SeenTime.begin(readings_s[0])
    for reading_s in readings_s[1:]:
        later = time.at(reading_s)
        assert 0 <= later.passed_s - time.passed_s <= LONGEST_STEP_S
        time = later


def test_limits_that_keep_nothing_are_refused() -> None:
    for count, age_s in ((0, 1.0), (1, 0.0), (1, float("nan"))):
        with pytest.raises(LocalMisuseError, match="retention"):
            Retention(count, age_s)
