"""Persons who do not exist, each made from one wrist of a real one: for cohorts larger than ten people. Pure.

A synthetic person repeats what one real wrist recorded, with a body, a pace and a watch of their own. Drawn for each
from the seed (`SEED`, real person, number), so the same in every run, and whoever else is in the fleet:

1. the wrist: left for even numbers, right for odd ones;
2. pace: every recording is resampled (linear interpolation) to go faster by a factor exp(N(0, 0.12)), which turns the
   rates of rotation up by the same factor;
3. reach: what differs from a recording's mean, in all channels, times exp(N(0, 0.15)); the mean, and with it gravity,
   stays;
4. the watch's seat: accelerometer and gyroscope are turned together about a random axis, by an angle that is uniform
   from 0 to 20 degrees;
5. the sensor: a gain of exp(N(0, 0.03)) for each channel, and white noise of 0.02 g and 0.05 rad/s;
6. windows: each recording is cut into disjoint windows of 128 samples, beginning at a random sample within the first
   128, and `WINDOWS` of all of them are kept at random: the wearer did some of the exercises more than others.

Ten thousand of them are no more than ten different people, seen from many sides: a model learns less from them than
from a thousand real ones. What they do have is number, which is what device-level noise is divided by.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from device_client.training import Records
from firmware_sim.sensors.motion import rotation
from firmware_sim.watch_data import SIDES, Recording, Wrist

SEED = 20_240_601
WINDOWS = 40
LARGEST_TURN_RADIANS = math.radians(20)
PACE, REACH, GAIN = 0.12, 0.15, 0.03
"""Standard deviations of logarithms."""
NOISE = np.array([0.02] * 3 + [0.05] * 3)
"""Standard deviations in g and rad/s."""
Samples = NDArray[np.float64]


def synthetic_person(recordings: list[Recording], person: int, number: int, *, samples: int) -> Records:
    """The windows of one synthetic person.

    Args:
        recordings: of everybody; only those of one wrist of `person` are looked at.
        person: the real one.
        number: which of the synthetic persons that are made from this one, from 0.
        samples: of a window.
    """
    random = np.random.default_rng([SEED, person, number])
    pace, reach = np.exp(random.normal(0, (PACE, REACH)))
    gain = np.exp(random.normal(0, GAIN, 6))
    seat = np.kron(np.eye(2), rotation(random.normal(size=3), random.uniform(0, LARGEST_TURN_RADIANS)))
    wrist = Wrist(person, SIDES[number % 2])
    x: list[NDArray[np.float32]] = []
    y: list[int] = []
    for recording in (each for each in recordings if each.wrist == wrist):
        moved = _moved(recording.samples.astype(np.float64), pace, reach) @ seat.T * gain
        noisy = moved + random.normal(0, NOISE, moved.shape)
        begin = int(random.integers(samples))
        count = (len(noisy) - begin) // samples
        x.append(noisy[begin : begin + count * samples].astype(np.float32).reshape(count, samples, -1))
        y += [recording.label] * count
    kept = np.sort(random.choice(len(y), min(WINDOWS, len(y)), replace=False))
    return Records(np.concatenate(x)[kept], np.array(y, np.int32)[kept])


def sources(people: tuple[int, ...], count: int) -> list[tuple[int, int]]:
    """The real person and the number of each of `count` synthetic ones, as evenly as it goes."""
    return [(people[index % len(people)], index // len(people)) for index in range(count)]


def _moved(series: Samples, pace: float, reach: float) -> Samples:
    """A recording [n, 6] done faster and wider."""
    at = np.arange(0, len(series) - 1, pace)
    faster = np.stack([np.interp(at, np.arange(len(series)), channel) for channel in series.T], axis=1)
    faster[:, 3:] *= pace
    mean = faster.mean(axis=0)
    wider: Samples = mean + reach * (faster - mean)
    return wider
