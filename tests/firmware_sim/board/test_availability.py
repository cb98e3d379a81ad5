"""The generated population beside published availability curves; docs/simulation-hardware.md has the numbers."""

from __future__ import annotations

import msgspec
import pytest

from firmware_sim.board.availability import AvailabilityCurve, availability_curve
from firmware_sim.profiles.catalogue import load_profile
from firmware_sim.profiles.population import Population
from firmware_sim.wearer.habits import UNITED_STATES, Habits

MONDAY_S = 1_800_230_400.0
PHONES = {name: (load_profile(name), 1.0) for name in ("phone_midrange", "phone_fast")}
AMERICANS = Habits(time_zones=UNITED_STATES)


def curve_of(habits: Habits, *, devices: int = 1_000) -> AvailabilityCurve:
    return availability_curve(Population(PHONES, seed=5), habits, seed=5, devices=devices, begin_s=MONDAY_S)


@pytest.fixture(scope="module")
def americans() -> AvailabilityCurve:
    return curve_of(AMERICANS)


def hour_of(curve: tuple[float, ...], value: float) -> int:
    return curve.index(value)


def test_four_times_as_many_may_train_at_the_best_hour_as_at_the_worst(americans: AvailabilityCurve) -> None:
    """Bonawitz et al. 2019, appendix A: a 4× difference between the low and the high of a day, for a population centred
    on the United States.

    5,000 devices of another seed give 4.04; over eight seeds 1,000 devices gave 4.22 ± 0.29 (the lowest of 24 noisy
    hours is too low), so about one seed in 250 would leave the bounds of 4 ± 25 %. This one is fixed.
    """
    assert 3.0 <= americans.swing <= 5.0


def test_most_may_train_in_the_small_hours_and_fewest_by_day(americans: AvailabilityCurve) -> None:
    assert 1 <= hour_of(americans.local, max(americans.local)) <= 5
    assert 8 <= hour_of(americans.local, min(americans.local)) <= 21


def test_on_free_days_the_night_lasts_longer(americans: AvailabilityCurve) -> None:
    """Social jetlag: at seven to nine in the morning more devices still lie on their chargers than on work days."""
    for hour in (7, 8, 9):
        assert americans.free_day[hour] > 1.2 * americans.workday[hour]


def test_time_zones_flatten_what_a_server_sees_and_a_herd_does_not() -> None:
    spread, herd = curve_of(AMERICANS, devices=300), curve_of(Habits(time_zones=((-5.0, 1.0),)), devices=300)
    steepest = [max(abs(a - b) for a, b in zip(c.utc, c.utc[1:], strict=False)) for c in (spread, herd)]
    assert steepest[0] < 0.8 * steepest[1]


def test_a_population_that_charges_at_night_alone_is_not_taken_for_the_published_one() -> None:
    """What the bound is worth: without day charges and docked devices the swing is ten times too large."""
    nights = msgspec.structs.replace(AMERICANS, charges_by_day=0.0, docked=0.0)
    curve = curve_of(nights, devices=300)
    assert max(curve.utc) > 20 * min(curve.utc)


def test_a_winter_and_a_ward_have_curves_too() -> None:
    ward = curve_of(Habits(ward=True, idle_by_day=0.5), devices=100)
    assert min(ward.local) > 0.35
    assert curve_of(msgspec.structs.replace(AMERICANS, season="winter"), devices=100).swing > 2
