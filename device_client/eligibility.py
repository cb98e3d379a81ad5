"""When this device may train: named rules over the board's readings, each slower to start again than to stop.

Losing a condition stops training at once. To start again a number must pass its limit by a margin and a switch must
hold for `SETTLING_S`, so that a charge that hovers at the floor or a loose plug does not start and abandon training
all day.
The first reading needs neither: the margins are memory, and a fresh `Eligibility` has none.

A machine without a sensor is not held up by its rule. A sensor that exists and fails is: readings that are unreadable,
impossible, or missing after they were there once block under the rule's name. Clocks may jump: time that runs backwards
counts as none, so a wait is never longer than `SETTLING_S` of forward time.

Sources: the conditions are those of federated work on Android, idle, charging and unmetered (K. Bonawitz et al. 2019,
arXiv 1902.01046, section 3), as constraints of JobScheduler (android.app.job.JobInfo.Builder: setRequiresDeviceIdle,
setRequiredNetworkType(NETWORK_TYPE_UNMETERED), setRequiresBatteryNotLow). The battery's margin is the one by which
Android's BatteryService lets a low battery recover (AOSP config.xml, config_lowBatteryCloseWarningBump = 5).

Pure: the readings and both clocks are arguments.
"""

from __future__ import annotations

import enum
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fl_protocol.errors import LocalMisuseError

BATTERY_MARGIN_PERCENT = 5.0
"""Charge above the floor at which training starts again."""
TEMPERATURE_MARGIN_CELSIUS = 3.0
"""How far below the ceiling the device must cool before training starts again."""
SETTLING_S = 60.0
"""How long charger, idleness or network must be right, or a failed sensor well, before training starts again."""

_DAY_S = 86_400
_CLOCK_GRAIN_S = 1e-3  # Unix seconds are known to less than a microsecond, and differences of them are added up


@dataclass(frozen=True)
class BrokenReading:
    """A sensor that this machine has and that did not answer.

    Args:
        reading: the field of `Conditions` that is missing for it.
        cause: what went wrong, in words, such as the file and the system's error.
    """

    reading: str
    cause: str


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """One reading of the board; None where this machine has no such sensor.

    Args:
        battery_percent: charge, 0 to 100.
        charging: whether the charger is connected (a full battery on its charger counts).
        idle: whether nobody uses the device.
        unmetered: whether the network is not paid by volume.
        temperature_celsius: of the device.
        broken: sensors that exist and did not answer; their fields are None.
    """

    battery_percent: float | None = None
    charging: bool | None = None
    idle: bool | None = None
    unmetered: bool | None = None
    temperature_celsius: float | None = None
    broken: tuple[BrokenReading, ...] = ()


@dataclass(frozen=True)
class TimeWindow:
    """A time of day in which training may run, from `start_s` to before `end_s` (seconds after midnight, local).

    One that ends before it starts goes over midnight.
    """

    start_s: int
    end_s: int

    def __contains__(self, local_time_s: float) -> bool:
        if self.start_s < self.end_s:
            return self.start_s <= local_time_s < self.end_s
        return local_time_s >= self.start_s or local_time_s < self.end_s

    def __str__(self) -> str:
        return f"{_time_of_day(self.start_s)}-{_time_of_day(self.end_s)}"


def parse_window(text: str) -> TimeWindow:
    """Read a window such as ``22:00-06:00``; ``00:00-24:00`` is the whole day. Raises LocalMisuseError naming it."""
    match = re.fullmatch(r"\s*(\d{1,2}):(\d\d)\s*-\s*(\d{1,2}):(\d\d)\s*", text, re.ASCII)
    if match:
        hour, minute, end_hour, end_minute = (int(part) for part in match.groups())
        window = TimeWindow((hour * 60 + minute) * 60, (end_hour * 60 + end_minute) * 60)
        in_range = max(minute, end_minute) < 60 and window.start_s < _DAY_S and window.end_s <= _DAY_S
        if in_range and window.start_s != window.end_s:
            return window
    raise LocalMisuseError(
        f"window {text!r}: expected two different times from 00:00 to 24:00, such as 22:00-06:00"
        " (00:00-24:00 for the whole day)"
    )


@dataclass(frozen=True, kw_only=True)
class EligibilityPolicy:
    """What the wearer wants of the conditions; the fields are those of ``[eligibility]`` in ``device.toml``.

    Args:
        minimum_battery_percent: floor of the charge, 0 to 100; 0 for none.
        charging_lifts_battery_floor: whether a connected charger stands in for the floor.
        require_charging, require_idle, require_unmetered: conditions that must hold.
        maximum_temperature_celsius: ceiling; infinity for none.
        windows: times of day in which training may run; empty for always.

    Raises:
        LocalMisuseError: the floor is not a percentage, or the ceiling not a number.
    """

    minimum_battery_percent: float = 30.0
    charging_lifts_battery_floor: bool = False
    require_charging: bool = False
    require_idle: bool = True
    require_unmetered: bool = True
    maximum_temperature_celsius: float = 45.0
    windows: tuple[TimeWindow, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.minimum_battery_percent <= 100:
            raise LocalMisuseError(f"minimum_battery_percent: expected 0 to 100, got {self.minimum_battery_percent}")
        if math.isnan(self.maximum_temperature_celsius):
            raise LocalMisuseError("maximum_temperature_celsius: expected degrees Celsius, got NaN")


@dataclass(frozen=True)
class Blocked:
    """Why training does not run.

    Args:
        rule: ``battery``, ``charging``, ``idle``, ``network``, ``temperature`` or ``time_window``.
        reason: for the wearer: what was read, what is wanted, and what it takes to start again.
    """

    rule: str
    reason: str


@dataclass(frozen=True)
class Moment:
    """What a rule sees: the readings and the time of day (seconds after midnight, local)."""

    conditions: Conditions
    local_time_s: float


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One condition, as data.

    Args:
        name: see `Blocked`.
        reading: the field of `Conditions` it cannot do without; None for the time of day.
        subject: that reading in words.
        possible: least and greatest value the reading can truly have.
        holds: whether training may go on.
        settles_s: after a stop, for how long this has to last before training starts again; None if it is not enough.
        explain: why it blocks, given for how long things have been good enough to start again (None: they are not).
    """

    name: str
    reading: str | None
    subject: str
    possible: tuple[float, float]
    holds: Callable[[Moment], bool]
    settles_s: Callable[[Moment], float | None]
    explain: Callable[[Moment, float | None], str]

    def value(self, moment: Moment) -> float | bool | None:
        """What was read."""
        if self.reading is None:
            return moment.local_time_s
        value: float | bool | None = getattr(moment.conditions, self.reading)
        return value

    def fault(self, moment: Moment) -> str | None:
        """What is wrong with the reading itself, None if it can be believed or does not exist."""
        for broken in moment.conditions.broken:
            if broken.reading == self.reading:
                return broken.cause
        value, (least, greatest) = self.value(moment), self.possible
        # NaN is in no range.
        if value is None or least <= value <= greatest:
            return None
        return f"it reads {value:g}, possible is {least:g} to {greatest:g}"


@functools.lru_cache(maxsize=16)
def rules_of(policy: EligibilityPolicy) -> tuple[Rule, ...]:
    """The rules that a policy asks for; made once, for they keep nothing."""
    table = (
        (policy.minimum_battery_percent > 0, _battery(policy)),
        (
            policy.require_charging,
            _switch("charging", "charging", subject="the charger", wrong="is not connected", right="connected"),
        ),
        (policy.require_idle, _switch("idle", "idle", subject="the device", wrong="is in use", right="idle")),
        (
            policy.require_unmetered,
            _switch("network", "unmetered", subject="the network", wrong="is metered", right="unmetered"),
        ),
        (policy.maximum_temperature_celsius < math.inf, _temperature(policy.maximum_temperature_celsius)),
        (bool(policy.windows), _time_window(policy.windows)),
    )
    return tuple(rule for wanted, rule in table if wanted)


class Eligibility:
    """Whether the device may train now, remembering what stopped it. One per device, told of every reading.

    Args:
        policy: what the wearer wants.
        rules: in place of the policy's own.
    """

    def __init__(self, policy: EligibilityPolicy, *, rules: Sequence[Rule] | None = None) -> None:
        self._watches = [_Watch(rule) for rule in (rules_of(policy) if rules is None else rules)]
        self._last_s: float | None = None

    def update(self, conditions: Conditions, *, now_s: float, local_time_s: float) -> tuple[Blocked, ...]:
        """Take a reading; what blocks training now, in the order of the rules, empty if it may run.

        Args:
            conditions: the reading.
            now_s: any clock in seconds; it may jump.
            local_time_s: seconds since local midnight as a clock on the wall shows them; taken modulo a day.
        """
        elapsed_s = 0.0 if self._last_s is None else max(0.0, now_s - self._last_s)
        self._last_s = now_s
        moment = Moment(conditions, local_time_s % _DAY_S)
        found = [watch.update(moment, elapsed_s=elapsed_s) for watch in self._watches]
        return tuple(blocked for blocked in found if blocked is not None)

    @property
    def is_settling(self) -> bool:
        """Whether time alone will change the answer: something that blocked is well again, and has to last."""
        return any(watch.is_settling for watch in self._watches)


class _Stop(enum.Enum):
    """Why a rule blocks."""

    FAILED = "failed"  # its condition was lost: the margin applies
    BROKEN = "broken"  # only its sensor was: the margin does not apply, or one bad reading could cost a night


class _Watch:
    """One rule and its memory."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._seen = False
        self._stop: _Stop | None = None
        self._held_s: float | None = None

    @property
    def is_settling(self) -> bool:
        """Whether it counts for how long it has been good enough."""
        return self._held_s is not None

    def update(self, moment: Moment, *, elapsed_s: float) -> Blocked | None:
        """Take a reading, `elapsed_s` after the last."""
        fault = self._fault(moment)
        if fault is not None:
            self._stop, self._held_s = self._stop or _Stop.BROKEN, None
            return Blocked(
                self._rule.name,
                f"{self._rule.subject} is not known: {fault}; training starts again when it has been read well for"
                f" {SETTLING_S:.0f} s, or choose another source in [board]",
            )
        if not self._seen:
            return None
        if not self._rule.holds(moment):
            self._stop = _Stop.FAILED
        if self._stop is None or self._settled(moment, elapsed_s):
            self._stop = self._held_s = None
            return None
        return Blocked(self._rule.name, self._reason(moment))

    def _fault(self, moment: Moment) -> str | None:
        """What is wrong with the reading, its absence after it was there included."""
        fault = self._rule.fault(moment)
        if fault is None and self._rule.value(moment) is None:
            return "there was a reading before and now there is none" if self._seen else None
        self._seen = True
        return fault

    def _settled(self, moment: Moment, elapsed_s: float) -> bool:
        """Whether it has been good enough for long enough to start again."""
        if not self._rule.holds(moment):
            wait_s = None
        else:
            wait_s = SETTLING_S if self._stop is _Stop.BROKEN else self._rule.settles_s(moment)
        if wait_s is None:
            self._held_s = None
            return False
        # Counted from the first good reading, in steps of forward time.
        self._held_s = 0.0 if self._held_s is None else self._held_s + elapsed_s
        return self._held_s >= wait_s - _CLOCK_GRAIN_S

    def _reason(self, moment: Moment) -> str:
        """Why it blocks, though its reading can be believed."""
        if self._stop is _Stop.BROKEN:
            return (
                f"{self._rule.subject} was not known; it has been read well for {self._held_s or 0:.0f}"
                f" of the {SETTLING_S:.0f} s that training waits for"
            )
        return self._rule.explain(moment, self._held_s)


def _battery(policy: EligibilityPolicy) -> Rule:
    """Charge, with a margin; the charger may stand in for it."""
    floor = policy.minimum_battery_percent
    restart = min(floor + BATTERY_MARGIN_PERCENT, 100.0)

    def percent(moment: Moment) -> float:
        return _number(moment.conditions.battery_percent)

    def lifted(moment: Moment) -> bool:
        return policy.charging_lifts_battery_floor and moment.conditions.charging is True

    def settles_s(moment: Moment) -> float | None:
        if percent(moment) >= restart:
            return 0.0
        return SETTLING_S if lifted(moment) else None

    def explain(moment: Moment, held_s: float | None) -> str:
        text = (
            f"the battery is at {percent(moment):g} %; training stops below {floor:g} %, starts again at {restart:g} %"
        )
        if policy.charging_lifts_battery_floor:
            text += f", or when the charger has been connected for {SETTLING_S:.0f} s (now {held_s or 0:.0f} s)"
        return text

    return Rule(
        name="battery",
        reading="battery_percent",
        subject="the battery's charge",
        possible=(0.0, 100.0),
        holds=lambda moment: percent(moment) >= floor or lifted(moment),
        settles_s=settles_s,
        explain=explain,
    )


def _temperature(ceiling: float) -> Rule:
    """Temperature, with a margin."""
    restart = ceiling - TEMPERATURE_MARGIN_CELSIUS

    def celsius(moment: Moment) -> float:
        return _number(moment.conditions.temperature_celsius)

    return Rule(
        name="temperature",
        reading="temperature_celsius",
        subject="the temperature",
        # Beyond what silicon sensors measure: a loose thermistor, or an error code taken for degrees.
        possible=(-60.0, 150.0),
        holds=lambda moment: celsius(moment) <= ceiling,
        settles_s=lambda moment: 0.0 if celsius(moment) <= restart else None,
        explain=lambda moment, _: (
            f"the device is at {celsius(moment):.1f} °C; training stops above {ceiling:g} °C,"
            f" starts again at {restart:g} °C"
        ),
    )


def _switch(name: str, reading: str, *, subject: str, wrong: str, right: str) -> Rule:
    """A condition that holds or does not; it must have held for a while."""

    def holds(moment: Moment) -> bool:
        return getattr(moment.conditions, reading) is True

    def explain(_: Moment, held_s: float | None) -> str:
        if held_s is None:
            return f"{subject} {wrong}; training starts again when it has been {right} for {SETTLING_S:.0f} s"
        return f"{subject} has been {right} for {held_s:.0f} of the {SETTLING_S:.0f} s that training waits for"

    return Rule(
        name=name,
        reading=reading,
        subject=f"whether {subject} is {right}",
        possible=(False, True),
        holds=holds,
        settles_s=lambda moment: SETTLING_S if holds(moment) else None,
        explain=explain,
    )


def _time_window(windows: tuple[TimeWindow, ...]) -> Rule:
    """Time of day; a timetable does not flicker, so it has no margin."""

    def holds(moment: Moment) -> bool:
        return any(moment.local_time_s in window for window in windows)

    return Rule(
        name="time_window",
        reading=None,
        subject="the time of day",
        possible=(0.0, _DAY_S),
        holds=holds,
        settles_s=lambda moment: 0.0 if holds(moment) else None,
        explain=lambda moment, _: (
            f"it is {_time_of_day(moment.local_time_s)}; training may run at {', '.join(map(str, windows))} only"
        ),
    )


def _number(value: float | None) -> float:
    """A reading that the rule's watch has found to exist."""
    if value is None:
        raise LocalMisuseError("expected a reading, got None: a rule is asked only about readings that exist")
    return value


def _time_of_day(seconds: float) -> str:
    """``HH:MM``."""
    minutes = int(seconds) // 60
    return f"{minutes // 60:02d}:{minutes % 60:02d}"
