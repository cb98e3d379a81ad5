"""What a device is in, for one life of its daemon: board, clock, connection, what befalls it, when it is started."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import simpy

from device_client.eligibility import Conditions
from device_client.ports import Board, Clock, Transport
from firmware_sim.fleet.edge import ShardEdge
from firmware_sim.fleet.links import SteadyLine
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.lasting_flash import LastingFlash

_DAY_S = 86_400.0


class Ending(NamedTuple):
    """Why a daemon ends.

    Args:
        kind: ``job_over``, or what befell the device (``killed``, ``hang``, ``brown_out``, ...).
        is_clean: whether its system lets it put things aside first.
        detail: for the table of events.
    """

    kind: str
    is_clean: bool
    detail: str = ""


class Surroundings(Protocol):
    """Of one device, for one life of its daemon. Times are seconds of the shard's time unless said otherwise."""

    @property
    def board(self) -> Board:
        """Its readings."""

    @property
    def clock(self) -> Clock:
        """What it takes for the time."""

    def prepare(self, flash: LastingFlash) -> None:
        """The device's flash as it is found: worn, damaged, full."""

    def connect(self, edge: ShardEdge, wake: Callable[[], None]) -> Transport:
        """A connection, not opened yet."""

    def compute_s(self, flop: float) -> float:
        """How long so many floating-point operations take now; they drain and warm the device."""

    def write_s(self, pages: int) -> float:
        """How long writing so many pages of the flash takes."""

    def check_memory(self, num_bytes: int) -> None:
        """Raises GraphError: the device has not so much memory for a graph."""

    def shard_s(self, device_s: float) -> float:
        """When the device's clock shows these Unix seconds."""

    def settle(self) -> None:
        """A turn is over: account for what it took."""

    def ending(self, *, is_done: Callable[[], bool], has_heard: Callable[[], bool]) -> Ending | None:
        """Why the daemon ends now, if it does.

        Args:
            is_done: whether the daemon has nothing to do.
            has_heard: whether every study has told it what there is to do.
        """

    def next_change_s(self) -> float:
        """When something changes that the daemon would see, or that would end it, if it does nothing."""

    def next_start_s(self, ending: Ending) -> float:
        """When its system starts the daemon again."""

    def start_without_store_s(self) -> float | None:
        """When its system starts a daemon again that could not use its store: infinity for never; None: the flash is
        well, so that this is a defect of the daemon.
        """

    def leave(self) -> None:
        """Put what has to last into the record."""


class World(Protocol):
    """Makes the surroundings of every device of a shard."""

    def first_start_s(self, record: DeviceRecord) -> float:
        """When a device is switched on."""

    def surroundings(self, record: DeviceRecord, environment: simpy.Environment) -> Surroundings:
        """Of a device whose daemon starts now."""


class FleetClock:
    """`device_client.ports.Clock`: true time as Unix seconds; local time is that of one time zone.

    Args:
        environment: of the shard.
        began_s: Unix seconds at which its time begins.
        utc_offset_s: local time less UTC.
    """

    def __init__(self, environment: simpy.Environment, began_s: float, *, utc_offset_s: float = 0.0) -> None:
        self._environment, self._began_s, self._utc_offset_s = environment, began_s, utc_offset_s

    def now_s(self) -> float:
        """Unix seconds."""
        return self._began_s + self._environment.now

    def local_time_s(self) -> float:
        """Seconds since midnight."""
        return (self.now_s() + self._utc_offset_s) % _DAY_S


class MainsBoard:
    """`device_client.ports.Board` of a machine without battery or thermometer, which nobody uses."""

    def read(self) -> Conditions:
        """Idle, on a network that costs nothing."""
        return Conditions(idle=True, unmetered=True)


class IdealSurroundings:
    """Mains, a steady line, a resident daemon that nothing befalls, and computing that takes no time."""

    def __init__(self, record: DeviceRecord, environment: simpy.Environment, began_s: float) -> None:
        self._record, self._environment, self._began_s = record, environment, began_s
        self.board, self.clock = MainsBoard(), FleetClock(environment, began_s)

    def prepare(self, flash: LastingFlash) -> None:
        """It is as new."""

    def connect(self, edge: ShardEdge, wake: Callable[[], None]) -> SteadyLine:
        """A steady line."""
        return SteadyLine(self._environment, edge, began_s=self._began_s, record=self._record, wake=wake)

    def compute_s(self, flop: float) -> float:
        """No time."""
        del flop
        return 0.0

    def write_s(self, pages: int) -> float:
        """No time."""
        del pages
        return 0.0

    def check_memory(self, num_bytes: int) -> None:
        """There is enough."""

    def shard_s(self, device_s: float) -> float:
        """Its clock is right."""
        return device_s - self._began_s

    def settle(self) -> None:
        """Nothing costs anything."""

    def ending(self, *, is_done: Callable[[], bool], has_heard: Callable[[], bool]) -> None:
        """It does not end."""
        del is_done, has_heard

    def next_change_s(self) -> float:
        """Never."""
        return math.inf

    def next_start_s(self, ending: Ending) -> float:
        """At once."""
        del ending
        return float(self._environment.now)

    def start_without_store_s(self) -> None:
        """Its flash is well."""

    def leave(self) -> None:
        """Nothing lasts."""


class IdealWorld:
    """Every device is switched on at the beginning, and nothing ever happens to it.

    Args:
        began_s: Unix seconds of the beginning.
    """

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s

    def first_start_s(self, record: DeviceRecord) -> float:
        """At once."""
        del record
        return 0.0

    def surroundings(self, record: DeviceRecord, environment: simpy.Environment) -> IdealSurroundings:
        """The same for all."""
        return IdealSurroundings(record, environment, self._began_s)
