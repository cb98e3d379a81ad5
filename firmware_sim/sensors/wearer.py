"""How one wearer and one watch differ from another: body, pace, seat of the watch, calibration, lost samples. Pure.

The ways to vary are those of T. T. Um et al., "Data augmentation of wearable sensor data for Parkinson's disease
monitoring using convolutional neural networks", arXiv 1706.00527, section 3: jittering, scaling, rotation and
time-warping (cropping is a window's random place). Where theirs draw anew for every window, what belongs to a person
or a watch is drawn once per device here, so that devices differ from each other and not only windows.

How large the variations are is our estimate, as in `benchmarks.synthetic_persons`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np

from device_client.ports import Float32
from firmware_sim.sensors.draws import Purpose, stream
from firmware_sim.sensors.motion import seat_of
from firmware_sim.sensors.sensor import Float64
from fl_protocol.model_manifest import InputSchema

WINDOW_DRAWS = 6
"""Uniform numbers that are drawn for a window."""
UNKNOWN_UNIT = 0.03
NOISE = {"g": 0.02, "rad/s": 0.05}
"""Standard deviation of the sensor's noise by unit; `UNKNOWN_UNIT` of the signal's scale otherwise."""
BIAS = {"g": 0.02, "rad/s": 0.02}
"""Standard deviation of a channel's offset, by unit."""
LONGEST_GAP = 0.25
"""Of a window, that a drop-out lasts."""


def require_within(name: str, value: float, lowest: float, highest: float) -> None:
    """Refuse a number outside its range, and one that is none.

    Raises:
        ValueError: the text names key, value and what is allowed.
    """
    if not lowest <= value <= highest:
        raise ValueError(f"{name}: expected a number from {lowest:g} to {highest:g}, got {value:g}")


class Variation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How far wearers differ; all 0 for identical ones.

    Args:
        pace: standard deviation of the logarithm of a person's tempo.
        warp: how much the tempo changes within a window, as a share, [0, 0.5].
        reach: standard deviation of the logarithm of a person's amplitude.
        seat_degrees: largest angle by which the watch is turned on the wrist, [0, 180].
        gain: standard deviation of the logarithm of a channel's gain.
        bias: a channel's offset, in multiples of `BIAS`.
        noise: the sensor's noise, in multiples of `NOISE`.
        dropout: share of windows in which up to a quarter of the samples is lost, [0, 1].
        style: standard deviation of how a synthetic person does each exercise, as a share of the motion's size; of no
            effect on people who are replayed.
    """

    pace: float = 0.12
    warp: float = 0.1
    reach: float = 0.15
    seat_degrees: float = 20.0
    gain: float = 0.03
    bias: float = 1.0
    noise: float = 1.0
    dropout: float = 0.02
    style: float = 0.3

    def __post_init__(self) -> None:
        limits = {"warp": 0.5, "dropout": 1.0, "seat_degrees": 180.0, "pace": 1.0, "reach": 1.0, "gain": 1.0}
        for name in self.__struct_fields__:
            require_within(name, getattr(self, name), 0.0, limits.get(name, 100.0))


USUAL = Variation()


@dataclass(frozen=True)
class Wearer:
    """A person with a watch.

    Args:
        pace, reach: factors on tempo and amplitude.
        warp: share by which the tempo varies within a window.
        seat: rotation [channels, channels].
        gain, bias, noise: float64 [channels] each; the noise is a standard deviation.
        dropout: probability that a window has lost samples.
    """

    pace: float
    reach: float
    warp: float
    seat: Float64
    gain: Float64
    bias: Float64
    noise: Float64
    dropout: float

    def measured(self, motion: Float64, chance: Float64, jitter: Float32) -> Float64:
        """What this wearer's watch measures of motions, [n, samples, channels].

        Args:
            motion: in the axes of a watch that sits straight, in the manifest's units.
            chance: uniform numbers, [n, 3]: whether samples are lost, where, and how many.
            jitter: standard normal numbers like `motion`.
        """
        turned = motion @ self.seat.T
        return self._with_gaps(turned * self.gain + self.bias + self.noise * jitter, chance)

    def _with_gaps(self, x: Float64, chance: Float64) -> Float64:
        """The last value is repeated where samples are lost, as a sensor's driver does that has nothing new."""
        samples = x.shape[1]
        begin = 1 + (chance[:, 1] * (samples - 1)).astype(np.int64)
        length = 1 + (chance[:, 2] * LONGEST_GAP * samples).astype(np.int64)
        at = np.arange(samples)
        lost = (chance[:, 0] < self.dropout)[:, None] & (begin[:, None] <= at) & (at < (begin + length)[:, None])
        source = np.where(lost, begin[:, None] - 1, at)
        return np.take_along_axis(x, source[:, :, None], axis=1)


def wearer_of(seed: int, person: int, variation: Variation, schema: InputSchema) -> Wearer:
    """The person with a number, the same at every call."""
    random, channels = stream(seed, Purpose.BODY, person), len(schema.units)
    pace, reach = np.exp(random.normal(size=2) * (variation.pace, variation.reach))
    seat = seat_of(channels, random.normal(size=3), math.radians(variation.seat_degrees) * random.random())
    return Wearer(
        pace=float(pace),
        reach=float(reach),
        warp=variation.warp,
        seat=seat,
        gain=np.exp(random.normal(size=channels) * variation.gain),
        bias=random.normal(size=channels) * variation.bias * _by_unit(schema, BIAS),
        noise=variation.noise * _by_unit(schema, NOISE),
        dropout=variation.dropout,
    )


def straight_wearer(schema: InputSchema) -> Wearer:
    """Somebody whose watch measures what there is."""
    nothing = Variation(**dict.fromkeys(Variation.__struct_fields__, 0.0))
    return wearer_of(0, 0, nothing, schema)


def warped_time(wearer: Wearer, chance: Float64, samples: int) -> Float64:
    """At which sample of their own tempo's motion each sample of a window is taken, float64 [n, samples], from 0 on.

    The tempo is the wearer's, and swings about it once in a window.

    Args:
        wearer: whose.
        chance: uniform numbers, [n, 2]: how strongly, and from which phase on.
        samples: of a window.
    """
    at = np.arange(samples, dtype=np.float64)
    swing, phase = wearer.warp * (2 * chance[:, :1] - 1), 2 * math.pi * chance[:, 1:2]
    turns = 2 * math.pi / samples
    # the integral of pace · (1 + swing · cos(turns · t + phase)): never backwards, as swing is below 1
    moments: Float64 = wearer.pace * (at + swing / turns * (np.sin(turns * at + phase) - np.sin(phase)))
    return moments


def window_draws(
    seed: int, person: int, days: list[int], numbers: list[int], shape: tuple[int, ...]
) -> tuple[Float64, Float32]:
    """Uniform [n, `WINDOW_DRAWS`] and normal [n, *shape] numbers of windows, known by person, day and number."""
    chance, jitter = np.zeros((len(days), WINDOW_DRAWS)), np.zeros((len(days), *shape), np.float32)
    for row, (day, number) in enumerate(zip(days, numbers, strict=True)):
        random = stream(seed, Purpose.WINDOW, person, day, number)
        random.random(out=chance[row])
        random.standard_normal(dtype=np.float32, out=jitter[row])
    return chance, jitter


def _by_unit(schema: InputSchema, by_unit: dict[str, float]) -> Float64:
    """A size for each channel, float64 [channels]."""
    return np.array([by_unit.get(unit, UNKNOWN_UNIT) for unit in schema.units])
