"""Augmentation of motion windows: the band sits a little differently on every arm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

_AXES = ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))
"""From the centre of a regular tetrahedron to its corners: four directions, none preferred."""


@dataclass(frozen=True)
class TetrahedralRotations:
    """Each window turned by the same angle about four axes, accelerometer and gyroscope alike.

    Args:
        degrees: the angle.
    """

    degrees: float

    @property
    def description(self) -> str:
        """The angle and the axes, for the manifest."""
        return f"four versions of each window, turned by {self.degrees:g} degrees about the axes of a tetrahedron."

    @property
    def copies(self) -> int:
        """Four."""
        return len(_AXES)

    def apply(self, x: tf.Tensor) -> tf.Tensor:
        """Versions [B·4, samples, 6] of windows [B, samples, 6]."""
        turned = [tf.matmul(x, matrix.T.astype(np.float32)) for matrix in self.matrices()]
        return tf.reshape(tf.stack(turned, 1), [-1, *x.shape[1:]])

    def matrices(self) -> list[NDArray[np.float64]]:
        """The rotations [6, 6], each twice the same [3, 3] block (Rodrigues' formula)."""
        angle = math.radians(self.degrees)
        blocks = []
        for axis in _AXES:
            kx, ky, kz = np.array(axis) / math.sqrt(3.0)
            cross = np.array([[0, -kz, ky], [kz, 0, -kx], [-ky, kx, 0]])
            blocks.append(np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross)
        return [np.kron(np.eye(2), block) for block in blocks]
