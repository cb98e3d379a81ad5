"""`device_client.ports.Board` in virtual time: a script says what each sensor reads, and when.

A script is a list of (from when, readings) or a function of time. `scripted_days` writes one for a wearer with habits:
a battery that drains by day and charges on most nights, warmth from the charger, hours away from home. The same seed
gives the same script. The board does not yet notice what the device does: training neither warms nor drains it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from device_client.eligibility import Conditions
from device_client.ports import Clock
from fl_protocol.errors import LocalMisuseError

Script = Sequence[tuple[float, Conditions]] | Callable[[float], Conditions]
"""Readings from each time on (Unix seconds, ascending), or readings by time."""

_HOUR_S, _DAY_S = 3_600.0, 86_400.0


class VirtualBoard:
    """A board that reads what its script says.

    Args:
        script: see `Script`; before the first of its times its first readings hold.
        clock: virtual time.

    Raises:
        LocalMisuseError: a list is empty, or its times do not ascend.
    """

    def __init__(self, script: Script, clock: Clock) -> None:
        self._clock = clock
        self._at = script if callable(script) else _stepwise(script)

    def read(self) -> Conditions:
        """The readings of this moment."""
        return self._at(self._clock.now_s())


@dataclass(frozen=True, kw_only=True)
class WearerHabits:
    """How a wearer treats a wearable, and how it behaves.

    Args:
        drain_percent_per_hour, charge_percent_per_hour: of the battery's capacity.
        bedtime_hour, rising_hour: local time of day, each day up to an hour earlier or later.
        forgets_charger: probability that it is not put on the charger for the night.
        leaves_home_hour, comes_home_hour: between them the network is metered.
        idle_by_day: probability that the wearable is not in use at a moment of the day; asleep it never is.
        worn_celsius, charging_celsius: temperatures it settles at, worn and on its charger.
        thermal_time_constant_s: time in which it covers 63 % of the way there.
    """

    drain_percent_per_hour: float = 3.0
    charge_percent_per_hour: float = 30.0
    bedtime_hour: float = 23.0
    rising_hour: float = 7.0
    forgets_charger: float = 0.2
    leaves_home_hour: float = 8.5
    comes_home_hour: float = 17.5
    idle_by_day: float = 0.4
    worn_celsius: float = 33.0
    charging_celsius: float = 39.0
    thermal_time_constant_s: float = 1_200.0


def scripted_days(
    seed: int | str,
    *,
    midnight_s: float,
    days: int = 7,
    step_s: float = 300.0,
    habits: WearerHabits | None = None,
) -> list[tuple[float, Conditions]]:
    """Some days of a wearable's life, as a script.

    Args:
        seed: of the habits' chances.
        midnight_s: Unix seconds of the wearer's midnight, with which it begins.
        days: how many.
        step_s: time between changes of the readings.
        habits: of this wearer.
    """
    habits = habits or WearerHabits()
    random = Random(f"board/{seed}")  # noqa: S311 - a wearer's habits
    wearable = _Wearable(habits, battery_percent=random.uniform(40, 100), celsius=habits.worn_celsius)
    # The night before the first day counts too.
    nights = [_night(habits, random, day=day) for day in range(-1, days)]
    script = []
    for step in range(round(days * _DAY_S / step_s)):
        at_s = step * step_s
        night = next((night for night in nights if night.start_s <= at_s < night.end_s), None)
        wearable.advance(step_s, charging=night is not None and night.on_charger)
        hour = at_s % _DAY_S / _HOUR_S
        chance = random.random()
        script.append(
            (
                midnight_s + at_s,
                Conditions(
                    battery_percent=float(round(wearable.battery_percent)),
                    charging=wearable.charging,
                    idle=night is not None or chance < habits.idle_by_day,
                    unmetered=not habits.leaves_home_hour <= hour < habits.comes_home_hour,
                    temperature_celsius=round(wearable.celsius + random.uniform(-0.3, 0.3), 1),
                ),
            )
        )
    return script


@dataclass(frozen=True)
class _Night:
    """From going to bed to getting up, in seconds after the script's first midnight."""

    start_s: float
    end_s: float
    on_charger: bool


def _night(habits: WearerHabits, random: Random, *, day: int) -> _Night:
    """The night that begins on the evening of `day`."""
    bedtime = habits.bedtime_hour + random.uniform(-1, 1)
    rising = 24 + habits.rising_hour + random.uniform(-1, 1)
    start_s = day * _DAY_S
    return _Night(start_s + bedtime * _HOUR_S, start_s + rising * _HOUR_S, random.random() >= habits.forgets_charger)


class _Wearable:
    """Charge and temperature over time."""

    def __init__(self, habits: WearerHabits, *, battery_percent: float, celsius: float) -> None:
        self._habits = habits
        self.battery_percent = battery_percent
        self.celsius = celsius
        self.charging = False

    def advance(self, elapsed_s: float, *, charging: bool) -> None:
        """Let time pass, on the charger or off it."""
        habits = self._habits
        rate = habits.charge_percent_per_hour if charging else -habits.drain_percent_per_hour
        self.battery_percent = min(100.0, max(0.0, self.battery_percent + rate * elapsed_s / _HOUR_S))
        # A full battery is not warmed any more.
        warmed = charging and self.battery_percent < 100
        target = habits.charging_celsius if warmed else habits.worn_celsius
        self.celsius += (target - self.celsius) * -math.expm1(-elapsed_s / habits.thermal_time_constant_s)
        self.charging = charging


def _stepwise(script: Sequence[tuple[float, Conditions]]) -> Callable[[float], Conditions]:
    """A list as a function of time."""
    times = [from_s for from_s, _ in script]
    if not times or times != sorted(times):
        raise LocalMisuseError(f"script: expected readings in the order of their times, got the times {times[:10]}")
    return lambda now_s: script[max(0, bisect_right(times, now_s) - 1)][1]
