"""What a device is in: its board, clock and line, and when its system starts its daemon."""

from __future__ import annotations

import math
from typing import Protocol

import simpy

from device_client.eligibility import Conditions
from device_client.ports import Board, Clock
from firmware_sim.fleet.links import Line, SteadyLine
from firmware_sim.fleet.record import DeviceRecord

_DAY_S = 86_400.0


class Surroundings(Protocol):
    """Of one device, for one life of its daemon. Times are seconds of the shard's time."""

    @property
    def board(self) -> Board:
        """Its readings."""

    @property
    def clock(self) -> Clock:
        """What it takes for the time."""

    @property
    def line(self) -> Line:
        """How its messages travel."""

    @property
    def longest_run_s(self) -> float:
        """After which its system ends the daemon; infinity for a resident one."""

    def compute_s(self, flop: float) -> float:
        """How long so many floating-point operations take now; they drain and warm the device."""

    def next_change_s(self) -> float:
        """When the board reads otherwise, if the device does nothing."""

    def next_start_s(self) -> float:
        """When its system starts the daemon again, if it ends now."""

    def leave(self) -> None:
        """Put what has to last into the record."""


class World(Protocol):
    """Makes the surroundings of every device of a shard."""

    def first_start_s(self, record: DeviceRecord) -> float:
        """When a device is switched on."""

    def surroundings(self, record: DeviceRecord, environment: simpy.Environment) -> Surroundings:
        """Of a device whose daemon starts now."""


class FleetClock:
    """`device_client.ports.Clock`: the shard's time as Unix seconds; local time is UTC.

    Args:
        environment: of the shard.
        began_s: Unix seconds at which its time begins.
    """

    def __init__(self, environment: simpy.Environment, began_s: float) -> None:
        self._environment, self._began_s = environment, began_s

    def now_s(self) -> float:
        """Unix seconds."""
        return self._began_s + float(self._environment.now)

    def local_time_s(self) -> float:
        """Seconds since midnight."""
        return self.now_s() % _DAY_S


class MainsBoard:
    """`device_client.ports.Board` of a machine without battery or thermometer, which nobody uses."""

    def read(self) -> Conditions:
        """Idle, on a network that costs nothing."""
        return Conditions(idle=True, unmetered=True)


class IdealSurroundings:
    """Mains, a steady line, a resident daemon, and computing that takes no time."""

    longest_run_s = math.inf

    def __init__(self, environment: simpy.Environment, began_s: float) -> None:
        self.board, self.clock, self.line = MainsBoard(), FleetClock(environment, began_s), SteadyLine()

    def compute_s(self, flop: float) -> float:
        """No time."""
        del flop
        return 0.0

    def next_change_s(self) -> float:
        """Never."""
        return math.inf

    def next_start_s(self) -> float:
        """Never: it does not end."""
        return math.inf

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
        del record
        return IdealSurroundings(environment, self._began_s)
