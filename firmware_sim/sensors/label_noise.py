"""Wrong labels, over any sensor: what wearers call a window is not always what they did. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from device_client.training import Records
from firmware_sim.sensors.draws import Purpose, stream
from firmware_sim.sensors.sensor import Float64, Recorded, Sensor


@dataclass(frozen=True)
class LabelNoise(Sensor):
    """A sensor whose devices mislabel windows; the test set keeps its labels.

    Args:
        sensor: what is mislabelled.
        confusion: float64 [K, K]: row k has the probabilities of what a window of label k is called; rows sum to 1.
        seed: of the run.
    """

    sensor: Sensor
    confusion: Float64
    seed: int

    def recorded(self, device: int, from_s: float, to_s: float) -> Recorded:
        """See `Sensor`."""
        told = self.sensor.recorded(device, from_s, to_s)
        cumulative = np.cumsum(self.confusion, axis=1)[told.records.y]
        chance = np.array([self._chance(device, moment) for moment in told.at_s.view(np.int64).tolist()])
        called = (cumulative <= chance[:, None]).sum(axis=1) if len(chance) else np.zeros(0)
        labels = np.minimum(called, len(self.confusion) - 1).astype(np.int32)
        return Recorded(told.at_s, Records(told.records.x, labels))

    def held_out(self, count: int) -> Records:
        """The sensor's, rightly labelled."""
        return self.sensor.held_out(count)

    def _chance(self, device: int, moment: int) -> float:
        """The uniform number that decides about the window of a moment (the bits of its time)."""
        return float(stream(self.seed, Purpose.WRONG_LABEL, device, moment).random())


def symmetric(labels: int, share: float) -> Float64:
    """The confusion [K, K] in which `share` of all windows has a wrong label, each wrong one equally often.

    Args:
        labels: K, at least 2.
        share: [0, 1].
    """
    wrong = np.full((labels, labels), share / (labels - 1))
    np.fill_diagonal(wrong, 1 - share)
    return wrong
