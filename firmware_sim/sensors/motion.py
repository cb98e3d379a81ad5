"""Turning, and doing faster or slower, what a motion sensor measured. Pure."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]


def rotation(axis: NDArray[np.float64] | NDArray[np.int_], radians: float) -> Samples:
    """The rotation [3, 3] by an angle about an axis of any length above 0 (Rodrigues' formula)."""
    kx, ky, kz = axis / np.linalg.norm(axis)
    cross = np.array([[0, -kz, ky], [kz, 0, -kx], [-ky, kx, 0]])
    turned: Samples = np.eye(3) + math.sin(radians) * cross + (1 - math.cos(radians)) * cross @ cross
    return turned


def seat_of(channels: int, axis: NDArray[np.float64], radians: float) -> Samples:
    """The rotation [channels, channels] of a device: each three channels are one sensor's axes. With a number of
    channels that three does not divide, nothing is turned.

    Args:
        channels: such as 6, of an accelerometer and a gyroscope.
        axis: float64 [3], of any length above 0.
        radians: angle.
    """
    seat = np.eye(channels)
    if channels % 3 == 0:
        seat = np.kron(np.eye(channels // 3), rotation(axis, radians))
    return seat
