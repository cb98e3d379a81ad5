"""What a generated wearer does with a device."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware_sim.wearer.habits import UNITED_STATES, Habits
from firmware_sim.wearer.wearer import Wearer

DAY_S = 86_400.0
MONDAY_S = 1_800_230_400.0
"""A Monday, 0:00 UTC."""


def changes(wearer: Wearer, *, days: float, start_s: float = MONDAY_S) -> list[float]:
    """Times of change, the start included."""
    times = [start_s]
    while times[-1] < start_s + days * DAY_S:
        times.append(wearer.next_change_s(times[-1]))
    return times


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    index=st.integers(0, 10**6),
    habits=st.builds(
        Habits,
        idle_by_day=st.floats(0, 0.95),
        forgets_charger=st.floats(0, 1),
        charges_by_day=st.floats(0, 1),
        day_charge_hour=st.floats(0, 12),
        outing_hour=st.floats(0, 12),
        midsleep_sd_hour=st.floats(0, 3),
        ward=st.booleans(),
        docked=st.floats(0, 1),
        put_down_to_charge=st.floats(0, 1),
        time_zones=st.just(UNITED_STATES),
    ),
)
def test_something_changes_at_each_change_and_nothing_between(seed: int, index: int, habits: Habits) -> None:
    wearer, other = Wearer(seed, index, habits), Wearer(seed, index, habits)
    for earlier, later in pairwise(changes(wearer, days=3)[1:]):
        assert later > earlier
        assert wearer.situation(later) != wearer.situation(earlier)
        assert other.situation((earlier + later) / 2) == wearer.situation(earlier)
        moves_s, at_s, before = wearer.next_move_s(earlier), earlier, wearer.situation(earlier)
        while at_s < moves_s:
            assert wearer.situation(at_s)[::2] == before[::2]
            at_s = wearer.next_change_s(at_s)
        assert at_s == moves_s


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 30), min_size=1, max_size=8))
def test_the_order_of_asking_changes_no_answer(days: list[float]) -> None:
    habits = Habits(time_zones=UNITED_STATES)
    one = Wearer("fleet", 7, habits)
    for day in days:
        time_s = MONDAY_S + day * DAY_S
        fresh = Wearer("fleet", 7, habits)
        assert one.situation(time_s) == fresh.situation(time_s)
        assert one.next_change_s(time_s) == fresh.next_change_s(time_s)


def test_other_devices_and_other_seeds_have_other_days() -> None:
    days = {tuple(changes(Wearer(seed, index, Habits()), days=1)) for seed in (1, 2) for index in range(50)}
    assert len(days) == 100


def test_nothing_of_past_days_is_kept() -> None:
    wearer = Wearer(1, 1, Habits())
    sizes = []
    for day in range(365):
        wearer.situation(MONDAY_S + day * DAY_S)
        sizes.append(sum(sys.getsizeof(getattr(wearer, name)) for name in wearer.__slots__))
    assert max(sizes[300:]) <= max(sizes[:30])
    assert max(sizes) < 2_000


def test_a_ward_patient_is_always_there_and_on_the_charger() -> None:
    wearer = Wearer(1, 1, Habits(ward=True))
    found = {wearer.situation(time_s) for time_s in changes(wearer, days=14)}
    assert {(one.on_charger, one.place) for one in found} == {(True, "home")}
    assert {one.idle for one in found} == {True, False}


def test_who_always_forgets_and_never_charges_by_day_is_never_on_the_charger() -> None:
    wearer = Wearer(1, 1, Habits(forgets_charger=1.0, charges_by_day=0.0, docked=0.0))
    assert not any(wearer.situation(time_s).on_charger for time_s in changes(wearer, days=14))


def test_a_docked_device_stays_on_its_charger_and_others_come_off_it() -> None:
    """300 devices, of which 75 ± 7.5 are docked: the bound of 5 standard deviations, and the seed is fixed."""
    docked = 0
    for index in range(300):
        wearer = Wearer("docks", index, Habits(docked=0.25))
        docked += all(wearer.situation(time_s).on_charger for time_s in changes(wearer, days=4))
    assert abs(docked - 75) < 5 * 7.5


def test_who_puts_it_down_to_charge_does_not_use_it_meanwhile() -> None:
    habits = Habits(charges_by_day=1.0, put_down_to_charge=1.0, docked=0.0, idle_by_day=0.2)
    for index in range(20):
        wearer = Wearer("puts down", index, habits)
        charging = [one for at in changes(wearer, days=7) if (one := wearer.situation(at)).on_charger]
        assert charging
        assert all(one.idle for one in charging)


def asleep_hours(habits: Habits, *, free: bool) -> tuple[float, float]:
    """Mean local hours of going to the charger and of leaving it, over people who charge at night only."""
    beds, rises = [], []
    for index in range(300):
        wearer = Wearer("sleep", index, habits)
        # From noon to noon: Saturday to Sunday, or Tuesday to Wednesday.
        noon_s = MONDAY_S + (5 if free else 1) * DAY_S + DAY_S / 2
        night = [at for at in changes(wearer, days=1.25, start_s=noon_s) if noon_s < at < noon_s + 1.25 * DAY_S]
        on = next(at for at in night if wearer.situation(at).on_charger)
        off = next(at for at in night if at > on and not wearer.situation(at).on_charger)
        beds.append((on - noon_s) / 3600 + 12)
        rises.append((off - noon_s) / 3600 - 12)
    return sum(beds) / len(beds), sum(rises) / len(rises)


def test_sleep_lies_where_the_questionnaires_lay_it() -> None:
    """MCTQ database: free nights from 0:15 to 8:15 on average. The mean of 300 has a standard error of 1.5 h / √300 =
    5 min; the bound of 20 min is 4 of them, and the seed is fixed.
    """
    bed, rise = asleep_hours(Habits(forgets_charger=0.0, charges_by_day=0.0, docked=0.0), free=True)
    assert bed == pytest.approx(24.25, abs=1 / 3)
    assert rise == pytest.approx(8.25, abs=1 / 3)
    work_bed, work_rise = asleep_hours(Habits(forgets_charger=0.0, charges_by_day=0.0, docked=0.0), free=False)
    assert work_rise < rise - 0.75
    assert work_bed < bed


def test_one_zone_puts_all_wearers_at_the_same_hour_and_four_spread_them() -> None:
    def offsets(habits: Habits) -> set[float]:
        return {Wearer(3, index, habits).utc_offset_s / 3600 for index in range(200)}

    assert offsets(Habits(time_zones=((9.0, 1.0),))) == {9.0}
    assert offsets(Habits(time_zones=UNITED_STATES)) == {-5.0, -6.0, -7.0, -8.0}


def test_a_later_zone_is_the_same_day_earlier() -> None:
    here, east = Wearer(3, 1, Habits()), Wearer(3, 1, Habits(time_zones=((6.0, 1.0),)))
    for time_s in changes(here, days=5):
        # A tenth of a second aside: the sum of floats at the change itself.
        assert east.situation(time_s - 6 * 3600 + 0.1) == here.situation(time_s + 0.1)


@pytest.mark.parametrize(
    ("name", "value"), [("forgets_charger", 1.5), ("idle_by_day", 1.0), ("time_zones", ()), ("season", "spring")]
)
def test_habits_that_cannot_be_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        Habits(**{name: value})  # type: ignore[arg-type]
