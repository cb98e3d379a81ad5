"""What every source of recordings answers: what a device's wearer recorded between two moments of virtual time. Pure.

Invariants, of all sensors and all wrappers over them: the same seed gives the same bytes; what a device gets depends
neither on other devices nor on how time is cut (asking for two halves of a day gives what asking for the day gives).
So a device that slept, or that another shard simulates, records the same. This holds since a window is known by its
device and its moment, and every random number about it is drawn from a stream of that name (`draws`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from device_client.training import Records

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Recorded:
    """Labelled windows and when each began.

    Args:
        at_s: virtual seconds, float64 [n], ascending.
        records: x float32 [n, samples, channels], y int32 [n].
    """

    at_s: Float64
    records: Records


class Sensor(Protocol):
    """A fleet's recordings."""

    @abstractmethod
    def recorded(self, device: int, from_s: float, to_s: float) -> Recorded:
        """What a device's wearer recorded from `from_s` on and before `to_s`.

        Args:
            device: its number in the fleet, from 0.
            from_s: virtual seconds since a midnight; nothing was recorded before 0.
            to_s: the same, at least `from_s`.
        """

    @abstractmethod
    def held_out(self, count: int) -> Records:
        """Up to `count` windows of people who are on no device, for measuring a model; the same at every call.

        They have right labels, and neither drift nor seasons.
        """

    def records(self, device: int, from_s: float, to_s: float) -> Records:
        """The windows of `recorded`, as ``Device.add`` takes them."""
        return self.recorded(device, from_s, to_s).records


@dataclass(frozen=True)
class NoSensor(Sensor):
    """Nobody records anything; for fleets whose training is not simulated.

    Args:
        window: shape of a window.
    """

    window: tuple[int, ...]

    def recorded(self, device: int, from_s: float, to_s: float) -> Recorded:
        """Nothing."""
        return Recorded(np.zeros(0), self.held_out(0))

    def held_out(self, count: int) -> Records:
        """Nothing."""
        return Records(np.zeros((0, *self.window), np.float32), np.zeros(0, np.int32))
