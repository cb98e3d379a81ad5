"""Discrete Gaussian noise by integer table sampling from a CSPRNG, and releasing a clipped sum on a grid. Pure.

Floating-point Gaussian samplers leak through their gaps and their running time (Mironov 2012; Jin et al., arXiv
2112.05307), so nothing here turns random bits into noise through floats: a table of integer weights is cut by 63 random
bits. The sum is rounded to a grid of a power of two first; what is released is an integer times the grid step.

Wide noise is composed of two tables, X = k·X1 + X2, which is within exp(-2π²·16) of one discrete Gaussian of variance
k²σ1² + σ2² when σ2 = 4k and σ1 >= 4 (Micciancio & Walter, CRYPTO 2017, section 4).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_protocol.errors import LocalMisuseError

Entropy = Callable[[int], bytes]
"""n -> n bytes from a cryptographic source; an argument everywhere, so that a simulation can repeat itself."""

_TABLE_SIGMA = 512.0  # tables of this size stay in the processor's cache beside a training step
_TAIL = 9.3  # a table ends at this many standard deviations: the mass beyond is under 2^-63
_TOTAL = 1 << 63
_GUIDE_BITS = 16
_SEVERAL = np.iinfo(np.uint16).max
_LEAST_CLIP, _LARGEST_CLIP = 1e-12, 1e20
SENSITIVITY_MARGIN = 2.0**-9
"""Relative room above the clip for grid rounding (2^-10) and float32 rounding in the graph (2^-10); the noise is
scaled up by it, so the accounted noise multiplier stays true."""


@functools.lru_cache(maxsize=16)
def _cumulative_weights(sigma: float) -> NDArray[np.int64]:
    """Cumulative integer weights of a discrete Gaussian on -m..m; they total 2^63 - 1 at the end exactly."""
    m = math.ceil(_TAIL * sigma)
    k = np.arange(-m, m + 1, dtype=np.float64)
    density = np.exp(-(k * k) / (2 * sigma * sigma))
    weights = np.rint(density * (float(_TOTAL) / float(density.sum()))).astype(np.int64)
    # The rounding's remainder goes to 0, where it is relatively smallest.
    weights[m] += (_TOTAL - 1) - int(weights.astype(object).sum())
    return np.cumsum(weights)


@functools.lru_cache(maxsize=16)
def _guide(sigma: float) -> NDArray[np.uint16]:
    """For the leading bits of a draw: the table entry that every draw beginning with them has, or a mark if several."""
    cumulative, width = _cumulative_weights(sigma), _TOTAL >> _GUIDE_BITS
    starts = np.arange(1 << _GUIDE_BITS, dtype=np.int64) * width
    first, last = (np.searchsorted(cumulative, edge, side="right") for edge in (starts, starts + (width - 1)))
    guide: NDArray[np.uint16] = np.where(first == last, first, _SEVERAL).astype(np.uint16)
    return guide


def _table_sample(sigma: float, count: int, entropy: Entropy) -> NDArray[np.int64]:
    """`count` discrete Gaussian integers from one table."""
    cumulative = _cumulative_weights(sigma)
    raw = np.frombuffer(entropy(8 * count), dtype="<u8")
    # Nine draws in ten are known by their leading 16 bits; searching the table for all took longer than a training
    # step.
    index = _guide(sigma).take(raw.view("<u2")[3::4]).astype(np.int64)
    unclear = np.flatnonzero(index == _SEVERAL)
    found = np.searchsorted(cumulative, (raw[unclear] >> np.uint64(1)).astype(np.int64), side="right")
    # Values run from 0 to 2^63 - 1; the one value past the total maps to the last entry.
    index[unclear] = np.minimum(found, len(cumulative) - 1)
    drawn: NDArray[np.int64] = index - (len(cumulative) - 1) // 2
    return drawn


def discrete_gaussian(sigma: float, count: int, entropy: Entropy) -> NDArray[np.int64]:
    """`count` independent draws from the discrete Gaussian on the integers.

    Args:
        sigma: standard deviation parameter, in grid units; at least 1.
        count: how many, at least 0.
        entropy: cryptographic source of bytes.

    Raises:
        LocalMisuseError: `sigma` is below 1 or beyond 2^40.
    """
    if not 1 <= sigma <= 2.0**40:
        raise LocalMisuseError(f"sigma: expected 1 to 2^40 grid units, got {sigma}")
    if sigma <= 2 * _TABLE_SIGMA:
        return _table_sample(sigma, count, entropy)
    k = math.ceil(sigma / _TABLE_SIGMA)
    fine = 4.0 * k
    coarse = math.sqrt(sigma * sigma - fine * fine) / k
    # A step so wide that its fine part outgrows a table is itself composed.
    return k * _table_sample(coarse, count, entropy) + discrete_gaussian(fine, count, entropy)


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
