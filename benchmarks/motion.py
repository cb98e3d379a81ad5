"""Turning what a motion sensor measured."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def rotation(axis: NDArray[np.float64] | NDArray[np.int_], radians: float) -> NDArray[np.float64]:
    """The rotation [3, 3] by an angle about an axis of any length above 0 (Rodrigues' formula)."""
    kx, ky, kz = axis / np.linalg.norm(axis)
    cross = np.array([[0, -kz, ky], [kz, 0, -kx], [-ky, kx, 0]])
    turned: NDArray[np.float64] = np.eye(3) + math.sin(radians) * cross + (1 - math.cos(radians)) * cross @ cross
    return turned
