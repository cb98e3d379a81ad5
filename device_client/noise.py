"""Releasing a clipped sum on a grid with discrete Gaussian noise (`fl_protocol.integer_noise`). Pure.

The sum is rounded to a grid of a power of two first; what is released is an integer times the grid step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import Entropy, discrete_gaussian

_LEAST_CLIP, _LARGEST_CLIP = 1e-12, 1e20
SENSITIVITY_MARGIN = 2.0**-9
"""Relative room above the clip for grid rounding (2^-10) and float32 rounding in the graph (2^-10); the noise is
scaled up by it, so the accounted noise multiplier stays true."""


@dataclass(frozen=True)
class NoisyGrid:
    """The grid and noise for releasing clipped sums of one length.

    Args:
        l2_norm_clip: bound C on each record's contribution.
        noise_multiplier: z; 0 releases the sum as it is, and no privacy may be claimed for it.
        length: number of coordinates d.
    """

    l2_norm_clip: float
    noise_multiplier: float
    length: int

    def __post_init__(self) -> None:
        # The graph clips in float32, whose squares vanish below 1e-19 (ADR 8), and a grid step of 0 is none.
        if not _LEAST_CLIP <= self.l2_norm_clip <= _LARGEST_CLIP:
            raise LocalMisuseError(
                f"l2_norm_clip: expected {_LEAST_CLIP:g} to {_LARGEST_CLIP:g}, got {self.l2_norm_clip}"
            )

    @property
    def step(self) -> float:
        """Grid step: the largest power of two for which rounding d coordinates moves the sum by at most 2^-10·C."""
        return 2.0 ** math.floor(math.log2(self.l2_norm_clip * 2.0**-10 / math.sqrt(self.length)))

    @property
    def sigma(self) -> float:
        """Noise standard deviation in grid steps."""
        return self.noise_multiplier * self.l2_norm_clip * (1 + SENSITIVITY_MARGIN) / self.step

    def release(self, clipped_sum: NDArray[np.float64], entropy: Entropy) -> NDArray[np.float64]:
        """The noisy sum, float64 [d].

        Args:
            clipped_sum: sum of the records' clipped gradients, float64 [d], finite.
            entropy: cryptographic source of bytes.

        Raises:
            LocalMisuseError: wrong length, or not finite.
        """
        if clipped_sum.shape != (self.length,) or not np.isfinite(clipped_sum).all():
            raise LocalMisuseError(f"clipped_sum: expected {self.length} finite numbers, got shape {clipped_sum.shape}")
        if self.noise_multiplier == 0:
            return clipped_sum
        on_grid = np.rint(clipped_sum / self.step).astype(np.int64)
        noisy: NDArray[np.float64] = (on_grid + discrete_gaussian(self.sigma, self.length, entropy)) * self.step
        return noisy
