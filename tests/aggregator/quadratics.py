"""Devices whose losses are quadratics that disagree: where plain local steps drift, and SCAFFOLD must not.

f_i(x) = (x - b_i)' A_i (x - b_i) / 2 with diagonal A_i, so the optimum of the mean is known in closed form.
`Algorithm1` is SCAFFOLD as its paper states it (S. P. Karimireddy et al., arXiv 1910.06378, algorithm 1, option II),
with every c_i
in one place: what the aggregator must agree with although it never sees a c_i.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Quadratic:
    """One device's loss."""

    curvature: Vector
    minimum: Vector

    def gradient(self, x: Vector) -> Vector:
        return self.curvature * (x - self.minimum)

    def steps(self, x: Vector, correction: Vector, *, count: int, rate: float) -> Vector:
        """Y after K corrected steps from x."""
        y = x.copy()
        for _ in range(count):
            y = y - rate * (self.gradient(y) + correction)
        return y


def quadratics(count: int, length: int, *, seed: int = 0) -> list[Quadratic]:
    generator = np.random.default_rng(seed)
    return [
        Quadratic(generator.uniform(0.2, 4.0, length), generator.normal(scale=2.0, size=length)) for _ in range(count)
    ]


def optimum(devices: list[Quadratic]) -> Vector:
    """Where the mean of the losses is least."""
    weight = sum(device.curvature for device in devices)
    weighted: Vector = sum(device.curvature * device.minimum for device in devices) / weight
    return weighted


@dataclass
class Algorithm1:
    """The paper's server and clients, with a server learning rate of 1."""

    devices: list[Quadratic]
    count: int
    rate: float
    x: Vector = field(init=False)
    c: Vector = field(init=False)
    own: list[Vector] = field(init=False)

    def __post_init__(self) -> None:
        length = len(self.devices[0].minimum)
        self.x, self.c = np.zeros(length), np.zeros(length)
        self.own = [np.zeros(length) for _ in self.devices]

    def round(self, sampled: list[int]) -> None:
        moves, changes = [], []
        for index in sampled:
            y = self.devices[index].steps(self.x, self.c - self.own[index], count=self.count, rate=self.rate)
            following = self.own[index] - self.c + (self.x - y) / (self.count * self.rate)
            moves.append(y - self.x)
            changes.append(following - self.own[index])
            self.own[index] = following
        self.x = self.x + np.mean(moves, axis=0)
        self.c = self.c + len(sampled) / len(self.devices) * np.mean(changes, axis=0)
