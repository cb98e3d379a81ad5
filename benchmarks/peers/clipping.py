"""Does a step clip every example's gradient and add the noise it should? Plain lists; for every library the same.

Two steps of a few examples, from parameters that are known, at learning rate 1: parameters before minus after is then
what the step applied. Without noise it must be the mean of the naively computed, naively clipped gradients of the
examples; with noise, what is left over must have the standard deviation of the Gaussian mechanism.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

TOLERANCE = 1e-4
NOISE_TOLERANCE = 0.1
"""With 8,646 parameters the sample's standard deviation is off by 0.8% (one sigma)."""

Vector = Sequence[float]


def norm(vector: Vector) -> float:
    """The L2 norm."""
    return math.sqrt(math.fsum(value * value for value in vector))


def half_clipping(gradients: Sequence[Vector]) -> float:
    """A norm that clips half of these gradients and leaves the others alone."""
    return statistics.median(norm(gradient) for gradient in gradients)


def clipped_mean(gradients: Sequence[Vector], clip: float) -> list[float]:
    """(1/B)·Σᵢ gᵢ·min(1, clip/‖gᵢ‖₂); an infinite clip gives the plain mean."""
    factors = [min(1.0, clip / norm(gradient)) / len(gradients) for gradient in gradients]
    return [
        math.fsum(factor * value for factor, value in zip(factors, column, strict=True))
        for column in zip(*gradients, strict=True)
    ]


def difference(one: Vector, other: Vector) -> list[float]:
    """Entry by entry."""
    return [a - b for a, b in zip(one, other, strict=True)]


def relative_error(got: Vector, expected: Vector) -> float:
    """‖got − expected‖₂ / ‖expected‖₂."""
    return norm(difference(got, expected)) / norm(expected)


def noise_multiplier(got: Vector, expected: Vector, *, clip: float, batch_size: int) -> float:
    """The noise found in a mean over `batch_size` examples, as a multiple of `clip`."""
    return statistics.pstdev(difference(got, expected)) * batch_size / clip
