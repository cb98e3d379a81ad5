"""Integer noise by table sampling from a CSPRNG: discrete Gaussian and Skellam. Pure; at devices and at helpers.

Floating-point Gaussian samplers leak through their gaps and their running time (Mironov 2012; Jin et al., arXiv
2112.05307), so nothing here turns random bits into noise through floats: a table of integer weights is cut by 63 random
bits. A table ends where less than 2^-63 of the mass is left, so noise has a largest magnitude. Only as many of the bits
are drawn as decide; so how long it takes, and how many bytes are asked for, tells how many draws were near an edge of
their entry, as the search for these did before. Nothing here is constant-time.

Wide discrete Gaussian noise is composed of two tables, X = k·X1 + X2, which is within exp(-2π²·16) of one discrete
Gaussian of variance k²σ1² + σ2² when σ2 = 4k and σ1 >= 4 (Micciancio & Walter, CRYPTO 2017, section 4). Skellam noise
is the difference of two Poisson variables of the same mean; sums of it are Skellam again, so many devices' shares are
exactly what one would have drawn (N. Agarwal, P. Kairouz, Z. Liu, "The Skellam Mechanism for Differentially Private
Federated Learning", NeurIPS 2021, arXiv 2110.04995), and so is wide noise of several narrow ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fl_protocol.errors import LocalMisuseError

Entropy = Callable[[int], bytes]
"""n -> n bytes from a cryptographic source; an argument everywhere, so that a simulation can repeat itself."""

_Law = Literal["gaussian", "skellam"]
_TABLE_SIGMA = 512.0  # tables of this size stay in the processor's cache beside a training step
_TAIL = 9.3  # a table ends at this many standard deviations: the mass beyond is under 2^-63
_SKELLAM_TAIL = 40  # and a Skellam table, whose tails are wider, so many integers later
_WIDEST_SKELLAM = 1024.0**2
LEAST_SKELLAM = 2.0**-20
"""Less noise than this is a value other than 0 once in a million draws: somebody meant something else."""
_MOST_SKELLAM_PARTS = 64
_TOTAL = 1 << 63
_GUIDE_BITS = 16
_TAIL_BITS = 63 - _GUIDE_BITS
_SEVERAL = np.iinfo(np.uint16).max


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
        return _table_sample("gaussian", sigma, count, entropy)
    k, coarse, fine = _composed(sigma)
    # A step so wide that its fine part outgrows a table is itself composed.
    return k * _table_sample("gaussian", coarse, count, entropy) + discrete_gaussian(fine, count, entropy)


def discrete_gaussian_bound(sigma: float) -> int:
    """Largest magnitude that `discrete_gaussian` draws."""
    if sigma <= 2 * _TABLE_SIGMA:
        return _largest("gaussian", sigma)
    k, coarse, fine = _composed(sigma)
    return k * _largest("gaussian", coarse) + discrete_gaussian_bound(fine)


def skellam(variance: float, count: int, entropy: Entropy) -> NDArray[np.int64]:
    """`count` independent draws of the symmetric Skellam distribution.

    Args:
        variance: in grid units squared; 2^-20 to 2^26.
        count: how many, at least 0.
        entropy: cryptographic source of bytes.

    Raises:
        LocalMisuseError: `variance` is out of range.
    """
    parts = _skellam_parts(variance)
    drawn = np.zeros(count, np.int64)
    for _ in range(parts):
        drawn += _table_sample("skellam", variance / parts, count, entropy)
    return drawn


def skellam_bound(variance: float) -> int:
    """Largest magnitude that `skellam` draws. Raises LocalMisuseError."""
    parts = _skellam_parts(variance)
    return parts * _largest("skellam", variance / parts)


def _composed(sigma: float) -> tuple[int, float, float]:
    """k, σ1 and σ2 of wide discrete Gaussian noise."""
    k = math.ceil(sigma / _TABLE_SIGMA)
    fine = 4.0 * k
    return k, math.sqrt(sigma * sigma - fine * fine) / k, fine


def _skellam_parts(variance: float) -> int:
    """Of how many narrow ones Skellam noise is the sum."""
    widest = _WIDEST_SKELLAM * _MOST_SKELLAM_PARTS
    if not LEAST_SKELLAM <= variance <= widest:
        raise LocalMisuseError(
            f"variance: expected {LEAST_SKELLAM:g} to {widest:g} grid units squared, got {variance}; take another step"
        )
    return math.ceil(variance / _WIDEST_SKELLAM)


def _largest(law: _Law, parameter: float) -> int:
    """Where a table ends."""
    if law == "gaussian":
        return math.ceil(_TAIL * parameter)
    return math.ceil(_TAIL * math.sqrt(parameter)) + _SKELLAM_TAIL


@functools.lru_cache(maxsize=16)
def _cumulative_weights(law: _Law, parameter: float) -> NDArray[np.int64]:
    """Cumulative integer weights of a distribution on -m..m; they total 2^63 - 1 at the end exactly.

    Args:
        law: which.
        parameter: sigma of a discrete Gaussian, variance of a Skellam distribution.
    """
    m = _largest(law, parameter)
    density = _gaussian_density(parameter, m) if law == "gaussian" else _skellam_density(parameter, m)
    weights = np.rint(density * (float(_TOTAL) / float(density.sum()))).astype(np.int64)
    # The rounding's remainder goes to 0, where it is relatively smallest.
    weights[m] += (_TOTAL - 1) - int(weights.astype(object).sum())
    return np.cumsum(weights)


def _gaussian_density(sigma: float, m: int) -> NDArray[np.float64]:
    """Of a discrete Gaussian on -m..m, to a factor."""
    k = np.arange(-m, m + 1, dtype=np.float64)
    density: NDArray[np.float64] = np.exp(-(k * k) / (2 * sigma * sigma))
    return density


def _skellam_density(variance: float, m: int) -> NDArray[np.float64]:
    """Of a Skellam distribution on -m..m, to a factor: the modified Bessel functions I_|k| of the variance.

    From their ratios r_k = I_k / I_(k-1) = 1 / (2k / x + r_(k+1)), downwards, where errors shrink (W. Gautschi,
    "Computational Aspects of Three-Term Recurrence Relations", 1967).
    """
    begin = m + math.ceil(4 * math.sqrt(variance)) + 60
    x = np.longdouble(variance)
    ratio = x / (begin + np.sqrt(np.longdouble(begin) ** 2 + x * x))
    ratios = np.empty(m + 1, np.longdouble)
    ratios[0] = 1
    for k in range(begin, 0, -1):
        ratio = 1 / (2 * k / x + ratio)
        if k <= m:
            ratios[k] = ratio
    half = np.cumprod(ratios)
    density: NDArray[np.float64] = np.concatenate([half[:0:-1], half]).astype(np.float64)
    return density


@functools.lru_cache(maxsize=16)
def _guide(law: _Law, parameter: float) -> NDArray[np.uint16]:
    """For the leading bits of a draw: the table entry that every draw beginning with them has, or a mark if several."""
    cumulative, width = _cumulative_weights(law, parameter), _TOTAL >> _GUIDE_BITS
    starts = np.arange(1 << _GUIDE_BITS, dtype=np.int64) * width
    first, last = (np.searchsorted(cumulative, edge, side="right") for edge in (starts, starts + (width - 1)))
    guide: NDArray[np.uint16] = np.where(first == last, first, _SEVERAL).astype(np.uint16)
    return guide


def _table_sample(law: _Law, parameter: float, count: int, entropy: Entropy) -> NDArray[np.int64]:
    """`count` integers from one table: where 63 random bits fall in its cumulative weights."""
    cumulative = _cumulative_weights(law, parameter)
    last = len(cumulative) - 1
    heads = np.frombuffer(entropy(2 * count), dtype="<u2")
    index = _guide(law, parameter).take(heads)
    # Nine draws in ten are known by their leading 16 bits, so the other 47 are drawn for the rest only, and only these
    # are searched for: doing it for all took longer than a training step.
    unclear = np.flatnonzero(index == _SEVERAL)
    tails = np.frombuffer(entropy(8 * len(unclear)), dtype="<u8") >> np.uint64(64 - _TAIL_BITS)
    draws = heads[unclear].astype(np.int64) << _TAIL_BITS | tails.astype(np.int64)
    # Values run from 0 to 2^63 - 1; the one value past the total maps to the last entry.
    index[unclear] = np.minimum(np.searchsorted(cumulative, draws, side="right"), last)
    drawn: NDArray[np.int64] = index.astype(np.int64) - last // 2
    return drawn
