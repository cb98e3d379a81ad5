"""Who is struck by which fault, and when: the same for a device whatever the others are, and however many shards. Pure.

Everything follows from the run's seed, the fault's place among those of its kind, and the device's name. So a scenario
may be given another fault, or another device, without moving what it had.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from firmware_sim.faults.kinds import (
    Aimed,
    ClockSkew,
    EnrolmentStorm,
    Fault,
    OfProfile,
    Packets,
    Partition,
    SlowLoris,
    Timed,
    TimeZoneHerd,
)
from firmware_sim.faults.packets import PacketRates
from firmware_sim.labelled_chance import key_of, uniform
from firmware_sim.radio.links import Interval
from fl_protocol.errors import LocalMisuseError

_DAY_S = 86_400.0
_TARGET, _STRIKES, _WHEN = range(3)
F = TypeVar("F", bound=Timed)


class Strike(NamedTuple):
    """One fault, once: Unix seconds; `key` for whatever chance it needs."""

    starts_s: float
    ends_s: float
    fault: Timed
    key: int


class FaultSchedule:
    """What strikes one device, or the services all devices share.

    Args:
        faults: each with its key.
        began_s, ends_s: the run's beginning and end, Unix seconds.
    """

    __slots__ = ("_began_s", "_ends_s", "_faults")

    def __init__(self, faults: Sequence[tuple[Timed, int]], *, began_s: float, ends_s: float) -> None:
        self._faults, self._began_s, self._ends_s = tuple(faults), began_s, ends_s

    def has(self, kind: type[Timed]) -> bool:
        """Whether faults of a kind ever strike."""
        return any(isinstance(fault, kind) for fault, _ in self._faults)

    def strikes(self, from_s: float, to_s: float) -> list[Strike]:
        """Those that begin in [from_s, to_s), in the order of their times."""
        found = [
            strike
            for fault, key in self._faults
            for strike in self._of(fault, key, from_s)
            if from_s <= strike.starts_s < to_s
        ]
        return sorted(found, key=lambda one: one.starts_s)

    def next_s(self, after_s: float) -> float:
        """When the next strike begins or ends, strictly after a time; infinity if none does."""
        times = [
            edge_s for fault, key in self._faults for edge_s in self._edges(fault, key, after_s) if edge_s > after_s
        ]
        return min(times, default=math.inf)

    def active(self, kind: type[F], at_s: float) -> list[F]:
        """Faults of a kind that strike at a time."""
        return [fault for fault, _ in self.active_strikes(kind, at_s)]

    def active_strikes(self, kind: type[F], at_s: float) -> list[tuple[F, Strike]]:
        """As `active`, with the strikes."""
        return [
            (fault, strike)
            for fault, key in self._faults
            if isinstance(fault, kind)
            for strike in self._of(fault, key, at_s - fault.lasts_s)
            if strike.starts_s <= at_s < strike.ends_s
        ]

    def outages(self) -> list[Interval]:
        """When partitions leave the device without network; for `firmware_sim.radio.radio.Radio`."""
        return [
            Interval(strike.starts_s, strike.ends_s)
            for strike in self.strikes(self._began_s, self._ends_s)
            if isinstance(strike.fault, Partition)
        ]

    def clock_jumps(self) -> list[tuple[float, float]]:
        """When its clock jumps, by how much; for `firmware_sim.clock.real_time_clock.RealTimeClock`."""
        return [
            (strike.starts_s, strike.fault.by_s)
            for strike in self.strikes(self._began_s, self._ends_s)
            if isinstance(strike.fault, ClockSkew)
        ]

    def packet_rates(self, at_s: float, *, up: bool) -> PacketRates:
        """What its network does to messages of one direction at a time: faults together, each by itself."""
        rates = PacketRates()
        for fault in self.active(Packets, at_s):
            if fault.direction in {"both", "up" if up else "down"}:
                rates = rates.along_with(PacketRates(fault.drop, fault.repeat, fault.reorder, fault.corrupt))
        return rates

    def upload_gap_s(self, at_s: float) -> float:
        """Least time between two chunks of its uploads; 0: as fast as they come."""
        return max((fault.gap_s for fault in self.active(SlowLoris, at_s)), default=0.0)

    def _of(self, fault: Timed, key: int, from_s: float) -> Iterator[Strike]:
        """A fault's strikes, from the last one before a time on, ascending."""
        for number, starts_s in self._starts(fault, key, from_s):
            if starts_s >= self._ends_s:
                return
            yield Strike(starts_s, starts_s + fault.lasts_s, fault, key_of(key, str(number)))

    def _starts(self, fault: Timed, key: int, from_s: float) -> Iterator[tuple[int, float]]:
        """Numbers and beginnings of a fault's strikes, from the last one before a time on."""
        if fault.probability is None:
            first_s = self._began_s + (fault.at_s or 0.0)
            if fault.every_s is None:
                yield 0, first_s
                return
            number = max(0, math.floor((from_s - first_s) / fault.every_s) - 1)
            while True:
                yield number, first_s + number * fault.every_s
                number += 1
        day = max(0, math.floor((from_s - self._began_s) / _DAY_S) - 1)
        while self._began_s + day * _DAY_S < self._ends_s:
            if uniform(key, _STRIKES, day) < fault.probability:
                yield day, self._began_s + (day + uniform(key, _WHEN, day)) * _DAY_S
            day += 1

    def _edges(self, fault: Timed, key: int, after_s: float) -> Iterator[float]:
        """Beginnings and ends of a fault's strikes around a time, up to the first that begins after it."""
        for strike in self._of(fault, key, after_s - fault.lasts_s):
            yield strike.starts_s
            yield strike.ends_s
            if strike.starts_s > after_s:
                return


class FaultPlan:
    """All faults of a run.

    Args:
        faults: as `firmware_sim.faults.parsing.parse_faults` gives them.
        seed: of the run.
        began_s, ends_s: the run's beginning and end, Unix seconds.

    Raises:
        LocalMisuseError: there are two enrolment storms or two time zones.
    """

    def __init__(self, faults: Sequence[Fault], *, seed: int | str, began_s: float, ends_s: float) -> None:
        self._seed, self._began_s, self._ends_s = seed, began_s, ends_s
        self._timed = [(fault, label) for fault, label in _labelled(faults) if isinstance(fault, Timed)]
        self._storm = _only(EnrolmentStorm, faults)
        self._herd = _only(TimeZoneHerd, faults)

    def faults_of(self, device: str, profile: str) -> FaultSchedule:
        """What strikes one device."""
        keyed = [
            (fault, key_of(self._seed, "fault", label, device))
            for fault, label in self._timed
            if isinstance(fault, Aimed)
        ]
        struck = [(fault, key) for fault, key in keyed if _is_target(fault, key, device, profile)]
        return FaultSchedule(struck, began_s=self._began_s, ends_s=self._ends_s)

    def service_faults(self) -> FaultSchedule:
        """What strikes broker and aggregator."""
        struck = [
            (fault, key_of(self._seed, "fault", label)) for fault, label in self._timed if not isinstance(fault, Aimed)
        ]
        return FaultSchedule(struck, began_s=self._began_s, ends_s=self._ends_s)

    def appears_s(self, device: str) -> float | None:
        """When a device is first there, where an enrolment storm says so; Unix seconds."""
        if self._storm is None:
            return None
        chance = uniform(key_of(self._seed, "enrolment storm", device), 0)
        return self._began_s + self._storm.at_s + self._storm.for_s * chance

    @property
    def utc_offset_s(self) -> float | None:
        """Everybody's time zone, where there is but one."""
        return None if self._herd is None else self._herd.utc_offset_s


S = TypeVar("S", EnrolmentStorm, TimeZoneHerd)


def _only(kind: type[S], faults: Sequence[Fault]) -> S | None:
    """The one fault of a kind, if there is one."""
    found = [fault for fault in faults if isinstance(fault, kind)]
    if len(found) > 1:
        raise LocalMisuseError(f"expected at most one fault of the kind {kind.__struct_config__.tag}, got {len(found)}")
    return found[0] if found else None


def _labelled(faults: Sequence[Fault]) -> Iterator[tuple[Fault, str]]:
    """Faults with their kind and their place among those of their kind."""
    seen: dict[str, int] = {}
    for fault in faults:
        kind = str(fault.__struct_config__.tag)
        seen[kind] = seen.get(kind, 0) + 1
        yield fault, f"{kind} {seen[kind]}"


def _is_target(fault: Aimed, key: int, device: str, profile: str) -> bool:
    """Whether a fault is aimed at a device."""
    target = fault.target
    if isinstance(target, OfProfile):
        return profile == target.profile
    if isinstance(target, str):
        return True
    if isinstance(target, tuple):
        return device in target
    return uniform(key, _TARGET) < target
