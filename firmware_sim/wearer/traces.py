"""Wearers as they were recorded: charger, use and Wi-Fi of real devices, from a CSV file.

The file has the columns ``device,time,event``, in any order, and any others, which are ignored. `time` is in Unix
seconds and does not fall from one line of a device to the next; lines of different devices may be mixed. An event is
the beginning or the end of an interval: ``charging_begins``, ``charging_ends``, ``idle_begins``, ``idle_ends``,
``wifi_begins``, ``wifi_ends``. Before the first event of a kind its opposite held; what is never mentioned never holds.
With Wi-Fi a device is at home, without it is away. docs/simulation-hardware.md shows how to bring other traces into
this form.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from firmware_sim.errors import TraceError
from firmware_sim.wearer.situation import AWAY, IDLE, ON_CHARGER, SITUATIONS, Season, Situation

_BITS = {"charging": ON_CHARGER, "idle": IDLE, "wifi": AWAY}
EVENTS = {f"{kind}_{edge}": (kind, edge == "begins") for kind in _BITS for edge in ("begins", "ends")}
_COLUMNS = ("device", "time", "event")
_MOVES = ON_CHARGER | AWAY
_WEEK_S = 7 * 86_400.0


class Trace(NamedTuple):
    """One device.

    Args:
        times: Unix seconds of its changes, ascending; the first is minus infinity.
        states: number of the situation (`SITUATIONS`) from each of them on.
        begins_s, ends_s: of its first and its last event.
    """

    times: tuple[float, ...]
    states: tuple[int, ...]
    begins_s: float
    ends_s: float


class TracedWearer:
    """`Wearing` over a trace; after its end all stays as it was then, unless it repeats.

    Args:
        trace: of one device.
        season: see `Wearing`.
        repeats: whether it begins anew after its end, a whole number of weeks after it began.
        utc_offset_s: of the place where it was recorded.
    """

    __slots__ = ("_begins_s", "_period_s", "_states", "_times", "season", "utc_offset_s")

    def __init__(
        self, trace: Trace, *, season: Season = "mild", repeats: bool = False, utc_offset_s: float = 0.0
    ) -> None:
        self._times, self._states, self.season, self.utc_offset_s = trace.times, trace.states, season, utc_offset_s
        self._begins_s, length_s = trace.begins_s, trace.ends_s - trace.begins_s
        self._period_s = max(1, math.ceil(length_s / _WEEK_S)) * _WEEK_S if repeats else math.inf

    def situation(self, time_s: float) -> Situation:
        """What holds at a moment."""
        return SITUATIONS[self._states[self._position(self._within(time_s)[0])]]

    def next_change_s(self, time_s: float) -> float:
        """The first later moment at which anything changes; infinity after the last."""
        return self._next(time_s, ON_CHARGER | IDLE | AWAY)

    def next_move_s(self, time_s: float) -> float:
        """The next time that charger or place change."""
        return self._next(time_s, _MOVES)

    def _within(self, time_s: float) -> tuple[float, float]:
        """A time of the trace, and how much later the true time is."""
        if self._period_s == math.inf or time_s < self._begins_s:
            return time_s, 0.0
        shift_s = math.floor((time_s - self._begins_s) / self._period_s) * self._period_s
        return time_s - shift_s, shift_s

    def _position(self, time_s: float) -> int:
        """Of the entry that holds."""
        return bisect_right(self._times, time_s) - 1

    def _next(self, time_s: float, bits: int) -> float:
        """The next time that one of these bits changes."""
        at_s, shift_s = self._within(time_s)
        position = self._position(at_s)
        now = self._states[position]
        for later in range(position + 1, len(self._times)):
            if (self._states[later] ^ now) & bits:
                return self._times[later] + shift_s
        if self._period_s == math.inf:
            return math.inf
        # Around the end: up to where the trace, begun anew, differs.
        for later in range(1, len(self._times)):
            if (self._states[later] ^ now) & bits:
                return self._times[later] + shift_s + self._period_s
        return math.inf


def parse_traces(lines: Iterable[str], *, where: str) -> dict[str, Trace]:
    """Traces from the lines of a CSV file; see the module.

    Args:
        lines: of the file.
        where: its path, for the errors.

    Returns:
        Traces by device, in the order of their first lines.

    Raises:
        TraceError: a line is not as described; the text names it and what is expected.
    """
    reader = csv.DictReader(lines, strict=True)
    events: dict[str, list[tuple[float, str]]] = {}
    try:
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise TraceError(
                f"trace {where}, line 1: expected the columns {', '.join(_COLUMNS)},"
                f" got {', '.join(reader.fieldnames or ()) or 'nothing'}"
            )
        for row in reader:
            device, time_s, event = _event(row, f"trace {where}, line {reader.line_num}")
            rows = events.setdefault(device, [])
            if rows and time_s < rows[-1][0]:
                raise TraceError(
                    f"trace {where}, line {reader.line_num}: expected a time of at least {rows[-1][0]:.15g}, that of"
                    f" the line before of device {device!r}, got {time_s:.15g}; sort the file by time"
                )
            rows.append((time_s, event))
    except csv.Error as error:
        raise TraceError(f"trace {where}, after line {reader.line_num}: expected CSV: {error}") from error
    if not events:
        raise TraceError(f"trace {where}: expected at least one line of events below the names of the columns")
    return {device: _trace(rows, f"trace {where}, device {device!r}") for device, rows in events.items()}


def _event(row: Mapping[str | None, str | None], line: str) -> tuple[str, float, str]:
    """One line, checked."""
    device, text, event = ((row[column] or "").strip() for column in _COLUMNS)
    if not device:
        raise TraceError(f"{line}: expected a device's name in the column device, got nothing")
    try:
        time_s = float(text)
    except ValueError:
        time_s = math.nan
    if not math.isfinite(time_s):
        raise TraceError(f"{line}: expected Unix seconds in the column time, got {text!r}")
    if event not in EVENTS:
        raise TraceError(f"{line}: expected one of {', '.join(EVENTS)} in the column event, got {event!r}")
    return device, time_s, event


def _trace(rows: list[tuple[float, str]], where: str) -> Trace:
    """One device's events as changes of its situation."""
    holds = dict.fromkeys(_BITS, False)
    first: dict[str, bool] = {}
    for _, event in rows:
        kind, begins = EVENTS[event]
        first.setdefault(kind, begins)
    holds.update({kind: not begins for kind, begins in first.items()})
    times, states = [-math.inf], [_number(holds)]
    for time_s, event in rows:
        kind, begins = EVENTS[event]
        if holds[kind] == begins:
            raise TraceError(
                f"{where}: expected {kind}_begins and {kind}_ends in turn, got {event} at {time_s:.15g} though"
                f" {'it had begun' if begins else 'it had ended'} already"
            )
        holds[kind] = begins
        if time_s > times[-1]:
            times.append(time_s)
            states.append(_number(holds))
        else:
            states[-1] = _number(holds)
    return Trace(tuple(times), tuple(states), rows[0][0], rows[-1][0])


def _number(holds: Mapping[str, bool]) -> int:
    """Of the situation."""
    away = not holds["wifi"]
    return ON_CHARGER * holds["charging"] + IDLE * holds["idle"] + AWAY * away
