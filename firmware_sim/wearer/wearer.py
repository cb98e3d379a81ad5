"""A generated wearer: every day drawn from (seed, device, day) alone, and forgotten when the next one comes.

A day here is a cycle, from one rising to the next. In it the device comes off the charger, is used and put down, is
perhaps charged for a while and carried out of the house, and lies still from bedtime on, on its charger unless that was
forgotten. Rising and going to bed are drawn apart, as (middle of sleep ± half its length) + a normal deviation of the
day.

Pure: no clock, no I/O. Asking in order of time is fast, and so is asking about two days in turn, as a search for the
next start does; asking backwards gives the same answers. A wearer is kept as long as its device, in about a kilobyte.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from statistics import NormalDist
from typing import NamedTuple

from firmware_sim.chance import key_of, uniforms
from firmware_sim.wearer.habits import Habits
from firmware_sim.wearer.situation import AWAY, IDLE, ON_CHARGER, SITUATIONS, Season, Situation

_HOUR_S, _DAY_S = 3_600.0, 86_400.0
_TRAITS = -(2**62)
"""The draw that makes the person; days count from 1970."""
_SPELLS = 6
"""Times a day that the device is put down: enough for a share of idle time, few enough for 100,000 devices."""
_MOVES = ON_CHARGER | AWAY
_PUT_DOWN = 8
"""Idle because it charges, whatever else it would be."""
_NUMBERS = [bits & 7 | (IDLE if bits & _PUT_DOWN else 0) for bits in range(16)]
"""Of the situation, by toggled bits."""
_EPOCH_WEEKDAY = 3
"""1970-01-01 was a Thursday; Monday is 0."""
_STANDARD = NormalDist()
_EXTREME = 2.5
"""Deviations are cut there, so that nobody rises before going to bed."""


class _Day(NamedTuple):
    """A day that was drawn: its changes' times, and the situation from each on."""

    day: int | None
    begin_s: float
    end_s: float
    times: array[float]
    states: bytes


class Wearer:
    """One wearer of a fleet; see `Wearing`.

    Args:
        seed: of the fleet.
        index: which device.
        habits: of the fleet.
    """

    __slots__ = (
        "_bed_s",
        "_begin_s",
        "_day",
        "_end_s",
        "_habits",
        "_idle_by_day",
        "_key",
        "_other",
        "_rise_s",
        "_states",
        "_stays",
        "_times",
        "_works_away",
        "utc_offset_s",
    )

    def __init__(self, seed: int | str, index: int, habits: Habits) -> None:
        self._habits, self._key = habits, key_of("wearer", seed, index)
        draw = uniforms(self._key, _TRAITS)
        later_hour = habits.midsleep_sd_hour * _deviation(draw[0])
        midsleep = habits.midsleep_hour + later_hour
        half = (habits.sleep_hour + habits.sleep_sd_hour * _deviation(draw[1])) / 2
        jetlag = max(0.0, habits.social_jetlag_hour + habits.social_jetlag_slope * later_hour)
        work_half = half - habits.work_sleep_loss_hour / 2
        # By whether the day that begins after the night is free.
        self._rise_s = ((midsleep - jetlag + work_half) * _HOUR_S, (midsleep + half) * _HOUR_S)
        self._bed_s = (_DAY_S + (midsleep - jetlag - work_half) * _HOUR_S, _DAY_S + (midsleep - half) * _HOUR_S)
        self._works_away = draw[2] < habits.works_away
        docked = draw[4] < habits.docked
        self._stays = habits.ward or docked
        self._idle_by_day = habits.docked_idle if docked and not habits.ward else habits.idle_by_day
        self.utc_offset_s = _zone(habits, draw[3]) * _HOUR_S
        self._day: int | None = None
        self._begin_s = self._end_s = 0.0
        self._times, self._states = array("d"), b""
        self._other: _Day | None = None

    @property
    def season(self) -> Season:
        """Of the fleet's habits."""
        return self._habits.season

    def situation(self, time_s: float) -> Situation:
        """What holds at a moment."""
        if not self._begin_s <= time_s < self._end_s:
            self._seek(time_s)
        return SITUATIONS[self._states[bisect_right(self._times, time_s) - 1]]

    def next_change_s(self, time_s: float) -> float:
        """The first later moment at which anything changes."""
        if not self._begin_s <= time_s < self._end_s:
            self._seek(time_s)
        after = bisect_right(self._times, time_s)
        return self._times[after] if after < len(self._times) else self._end_s

    def next_move_s(self, time_s: float) -> float:
        """The next time that charger or place change, or this day's end if that is sooner."""
        if not self._begin_s <= time_s < self._end_s:
            self._seek(time_s)
        after = bisect_right(self._times, time_s)
        now = self._states[after - 1]
        for position in range(after, len(self._times)):
            if (self._states[position] ^ now) & _MOVES:
                return self._times[position]
        return self._end_s

    def _seek(self, time_s: float) -> None:
        """Go to the day that a moment lies in: the one before, which is remembered, or drawn."""
        left, other = _Day(self._day, self._begin_s, self._end_s, self._times, self._states), self._other
        if other is not None and other.begin_s <= time_s < other.end_s:
            self._day, self._begin_s, self._end_s, self._times, self._states = other
        else:
            self._draw(time_s)
        self._other = left

    def _draw(self, time_s: float) -> None:
        """Draw the day that a moment lies in."""
        if self._day is not None and time_s >= self._end_s and time_s - self._end_s < _DAY_S / 2:
            day = self._day + 1
            draw = uniforms(self._key, day)
        else:
            day = math.floor((time_s + self.utc_offset_s) / _DAY_S)
            draw = uniforms(self._key, day)
            if time_s < self._rising_s(day, draw):
                day -= 1
                draw = uniforms(self._key, day)
        self._day = day
        self._begin_s, self._end_s = self._rising_s(day, draw), self._rising_s(day + 1, uniforms(self._key, day + 1))
        self._fill(day, draw)

    def _rising_s(self, day: int, draw: list[float]) -> float:
        """True time of rising on a local day."""
        local_s = self._rise_s[_is_free(day)] + self._habits.night_sd_hour * _HOUR_S * _deviation(draw[0])
        return day * _DAY_S - self.utc_offset_s + local_s

    def _fill(self, day: int, draw: list[float]) -> None:
        """Write down the day's changes."""
        begin_s = self._begin_s
        deviation_s = self._habits.night_sd_hour * _HOUR_S * _deviation(draw[1])
        bed_s = day * _DAY_S - self.utc_offset_s + self._bed_s[_is_free(day + 1)] + deviation_s
        bed_s = min(bed_s, self._end_s - 2 * _HOUR_S)
        toggles = [(bed_s, IDLE)]
        _put_down(toggles, begin_s, bed_s, self._idle_by_day, draw)
        toggled = ON_CHARGER if self._stays else 0
        if not self._stays:
            self._charge(toggles, bed_s, draw)
            self._go_out(toggles, bed_s, draw, free=_is_free(day))
        toggles.sort()
        times, states = [begin_s], [_NUMBERS[toggled]]
        for at_s, bit in toggles:
            toggled ^= bit
            state = _NUMBERS[toggled]
            if at_s > times[-1]:
                if state != states[-1]:
                    times.append(at_s)
                    states.append(state)
            elif len(states) > 1 and states[-2] == state:
                # Two changes at one moment that undo each other are none.
                del times[-1], states[-1]
            else:
                states[-1] = state
        self._times, self._states = array("d", times), bytes(states)

    def _charge(self, toggles: list[tuple[float, int]], bed_s: float, draw: list[float]) -> None:
        """For the night, and perhaps by day."""
        habits = self._habits
        if draw[2] >= habits.forgets_charger:
            toggles.append((bed_s, ON_CHARGER))
        if draw[3] < habits.charges_by_day:
            begin_s = self._begin_s + draw[4] * (bed_s - self._begin_s)
            end_s = min(begin_s + 2 * draw[5] * habits.day_charge_hour * _HOUR_S, bed_s)
            bits = ON_CHARGER | (_PUT_DOWN if draw[9] < habits.put_down_to_charge else 0)
            toggles += [(begin_s, bits), (end_s, bits)]

    def _go_out(self, toggles: list[tuple[float, int]], bed_s: float, draw: list[float], *, free: bool) -> None:
        """To work, or on an outing."""
        habits, awake_s = self._habits, bed_s - self._begin_s
        if free or not self._works_away:
            if draw[6] >= habits.outing:
                return
            away_s = 2 * draw[7] * habits.outing_hour * _HOUR_S
            begin_s = self._begin_s + draw[8] * max(0.0, awake_s - away_s)
        else:
            away_s = (habits.workday_hour + draw[7] - 0.5) * _HOUR_S
            begin_s = self._begin_s + (0.75 + 0.5 * draw[8]) * _HOUR_S
        begin_s, end_s = min(begin_s, bed_s), min(begin_s + away_s, bed_s)
        toggles += [(begin_s, AWAY), (end_s, AWAY)]


def _put_down(toggles: list[tuple[float, int]], begin_s: float, end_s: float, share: float, draw: list[float]) -> None:
    """Idle spells, one in each part of the waking day; their lengths are uniform, their mean the share."""
    part_s = (end_s - begin_s) / _SPELLS
    least, most = max(0.0, 2 * share - 1), min(1.0, 2 * share)
    for spell in range(_SPELLS):
        length = least + (most - least) * draw[10 + spell]
        at_s = begin_s + part_s * (spell + draw[16 + spell] * (1 - length))
        toggles.append((at_s, IDLE))
        toggles.append((at_s + part_s * length, IDLE))


def _deviation(uniform: float) -> float:
    """Standard normal, cut at its extremes."""
    return min(_EXTREME, max(-_EXTREME, _STANDARD.inv_cdf(uniform)))


def _is_free(day: int) -> bool:
    """Whether a local day is a Saturday or a Sunday."""
    return (day + _EPOCH_WEEKDAY) % 7 >= 5


def _zone(habits: Habits, uniform: float) -> float:
    """Offset from UTC in hours, by weight."""
    left = uniform * sum(weight for _, weight in habits.time_zones)
    for offset, weight in habits.time_zones:
        left -= weight
        if left < 0:
            return offset
    return habits.time_zones[-1][0]
