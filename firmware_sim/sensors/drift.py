"""Concept drift, over any sensor: how wearers move, and how the watch sits, changes with time. Pure.

The two forms are the incremental and the sudden drift of J. Gama et al., "A survey on concept drift adaptation", ACM
Computing Surveys 46(4), 2014, section 2.2. Shifts of labels with the seasons are the diary's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from device_client.training import Records
from firmware_sim.sensors.draws import Purpose, stream
from firmware_sim.sensors.motion import seat_of
from firmware_sim.sensors.sensor import Float64, Recorded, Sensor


@dataclass(frozen=True)
class Drift(Sensor):
    """A sensor whose devices drift; the test set does not.

    Args:
        sensor: what drifts.
        seed: of the run.
        begins_s, ends_s: virtual seconds: nothing has changed before, all has after, and in between the change grows
            linearly. Both the same: a jump.
        turn_degrees: angle by which each watch has turned in the end, about an axis of its own.
        amplitude: factor on what a window's samples differ from their mean in the end, above 0.
    """

    sensor: Sensor
    seed: int
    begins_s: float
    ends_s: float
    turn_degrees: float = 0.0
    amplitude: float = 1.0

    def recorded(self, device: int, from_s: float, to_s: float) -> Recorded:
        """See `Sensor`."""
        told = self.sensor.recorded(device, from_s, to_s)
        if not len(told.records):
            return told
        x, done = told.records.x.astype(np.float64), self.done(told.at_s)
        mean = x.mean(axis=1, keepdims=True)
        moved = mean + (self.amplitude**done)[:, None, None] * (x - mean)
        axis = stream(self.seed, Purpose.DRIFT, device).normal(size=3)
        seats = [seat_of(x.shape[-1], axis, math.radians(self.turn_degrees) * share) for share in done.tolist()]
        turned = moved @ np.stack(seats).transpose(0, 2, 1)
        return Recorded(told.at_s, Records(turned.astype(np.float32), told.records.y))

    def held_out(self, count: int) -> Records:
        """The sensor's, as it was before anything drifted."""
        return self.sensor.held_out(count)

    def done(self, at_s: Float64) -> Float64:
        """Which share of the change has happened at each moment, [0, 1]."""
        if self.ends_s <= self.begins_s:
            return (at_s >= self.begins_s).astype(np.float64)
        return np.clip((at_s - self.begins_s) / (self.ends_s - self.begins_s), 0.0, 1.0)
