"""Label flippers, over any sensor: their labels are permuted; others' and the test set's are not. Pure.

Those who begin with a round record rightly, and lie when they train (`firmware_sim.attackers.training`): what is
recorded belongs to no round.

V. Tolpegin et al., "Data Poisoning Attacks Against Federated Learning Systems", arXiv 2007.08432.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from device_client.ports import Labels
from device_client.training import Records
from firmware_sim.attackers.kinds import LabelFlip
from firmware_sim.sensors.sensor import Recorded, Sensor

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Mislabelling(Sensor):
    """A sensor some of whose devices lie about labels.

    Args:
        sensor: what is mislabelled.
        labels: K, how many there are.
        flips_of: a device's label flips, given its number.
        begins_s: when the run begins in the sensor's time.
    """

    sensor: Sensor
    labels: int
    flips_of: Callable[[int], tuple[LabelFlip, ...]]
    begins_s: float

    def recorded(self, device: int, from_s: float, to_s: float) -> Recorded:
        """See `Sensor`."""
        told = self.sensor.recorded(device, from_s, to_s)
        y = told.records.y
        for flip in self.flips_of(device):
            if flip.from_round > 1:
                continue
            # An attacker of the first hour has lied about what was recorded before as well.
            lies = told.at_s >= self.begins_s + flip.from_s if flip.from_s else np.ones(len(y), np.bool_)
            y = np.where(lies, permuted(y, flip, self.labels), y).astype(np.int32)
        return Recorded(told.at_s, Records(told.records.x, y))

    def held_out(self, count: int) -> Records:
        """The sensor's, rightly labelled."""
        return self.sensor.held_out(count)


def permuted(y: Labels, flip: LabelFlip, labels: int) -> Int32:
    """Labels as a flipper calls them, int32 [n]."""
    names = flip.permutation if flip.permutation is not None else tuple(range(labels - 1, -1, -1))
    called: Int32 = np.array(names, np.int32)[y]
    return called
