"""How many devices of a population may train, by the hour: charger connected, unused, not metered, and on.

These are the conditions of published systems (K. Bonawitz et al., "Towards Federated Learning at Scale: System Design",
MLSys 2019, arXiv 1902.01046, section 3), so the curve can be held against theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from firmware_sim.board.virtual_board import VirtualBoard, first_state
from firmware_sim.profiles.hardware_profile import HardwareProfile
from firmware_sim.profiles.population import Population
from firmware_sim.wearer.habits import Habits
from firmware_sim.wearer.wearer import Wearer

_DAY_S = 86_400.0


@dataclass(frozen=True)
class AvailabilityCurve:
    """Shares of devices that may train.

    Args:
        utc, local: by time of day, from midnight on in equal steps, in UTC and in each wearer's own time.
        workday, free_day: the local curve of Mondays to Fridays, and of Saturdays and Sundays.
    """

    utc: tuple[float, ...]
    local: tuple[float, ...]
    workday: tuple[float, ...]
    free_day: tuple[float, ...]

    @property
    def swing(self) -> float:
        """The UTC curve's highest over its lowest: what a server sees of a whole population."""
        return max(self.utc) / min(self.utc)


def availability_curve(
    population: Population,
    habits: Habits,
    *,
    seed: int | str,
    devices: int,
    begin_s: float,
    weeks: int = 1,
    steps: int = 24,
) -> AvailabilityCurve:
    """Simulate a population that does nothing but wait, and look at it at equal steps.

    Args:
        population: profiles by device.
        habits: of the wearers.
        seed: of wearers and first charges.
        devices: how many.
        begin_s: a midnight in UTC; the day after it is the first to be counted.
        weeks: how long.
        steps: looks a day.
    """
    counts: dict[str, list[list[int]]] = {
        name: [[0, 0] for _ in range(steps)] for name in ("utc", "local", "workday", "free_day")
    }
    for index in range(devices):
        profile, wearer = population.profile(index), Wearer(seed, index, habits)
        may_train = _looks(profile, wearer, seed=seed, index=index, begin_s=begin_s)
        for look in range(weeks * 7 * steps):
            at_s = begin_s + _DAY_S + (look + 0.5) * _DAY_S / steps
            ready = may_train(at_s)
            local_day, local_s = divmod(at_s + wearer.utc_offset_s, _DAY_S)
            kind = "free_day" if (local_day + 3) % 7 >= 5 else "workday"
            local_step = int(local_s * steps / _DAY_S)
            for name, step in (("utc", look % steps), ("local", local_step), (kind, local_step)):
                counts[name][step][0] += ready
                counts[name][step][1] += 1
    return AvailabilityCurve(
        **{name: tuple(ready / max(1, looks) for ready, looks in by_step) for name, by_step in counts.items()}
    )


def _looks(
    profile: HardwareProfile, wearer: Wearer, *, seed: int | str, index: int, begin_s: float
) -> Callable[[float], bool]:
    """Whether this device may train at a time, asked in order."""
    clock = _Clock(begin_s)
    state = first_state(profile, wearer, time_s=begin_s, seed=seed, index=index)
    board = VirtualBoard(profile, wearer, clock=clock, state=state)

    def may_train(at_s: float) -> bool:
        clock.time_s = at_s
        reading = board.read()
        return board.is_on and reading.charging is not False and bool(reading.idle and reading.unmetered)

    return may_train


@dataclass
class _Clock:
    """True time."""

    time_s: float

    def now_s(self) -> float:
        return self.time_s

    def local_time_s(self) -> float:
        return self.time_s % _DAY_S
