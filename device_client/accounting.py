"""Rényi differential privacy of DP-SGD on one device: Poisson-sampled Gaussian steps, composed and converted. Pure.

Adversary: everyone, the aggregator included, who sees every noisy step. Neighbours: add or remove one record.

Sources: I. Mironov, K. Talwar, L. Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", arXiv
1908.10530, section 3.3 (integer orders); C. Canonne, G. Kamath, T. Steinke, "The Discrete Gaussian for Differential
Privacy", arXiv 2004.00010, proposition 12 (conversion).
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from fl_protocol.errors import LocalMisuseError

_FRACTIONAL = (1.25, 1.5, 1.75, 2.25, 2.5, 2.75, 3.25, 3.5, 3.75, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5, 10.5)
_INTEGER = (*range(2, 65), 72, 80, 96, 128, 192, 256, 512, 1024)
ORDERS: tuple[float, ...] = tuple(sorted({float(order) for order in (*_FRACTIONAL, *_INTEGER)}))
"""The fixed Rényi orders of every ledger; a ledger's totals are vectors over them."""

Vector = NDArray[np.float64]

_ORDER_ARRAY = np.array(ORDERS)
_IS_INTEGER = np.array([order == math.floor(order) for order in ORDERS])

_LEAST_NOISE_FOR_QUADRATURE = 0.05
_LEAST_NOISE = 1e-100
"""Below this noise multiplier the moments overflow; it is taken for no noise at all."""
_MOST_NOISE = 1e100
"""More than this is charged as this: its square would leave float64."""
_ROUNDING_UP = 1 + 1e-10
"""More than float64 can lose here, in the sums that follow too, so that a cost is never below the true one."""


@functools.lru_cache(maxsize=1024)
def _step_rdp(sampling_rate: float, noise_multiplier: float) -> Vector:
    """RDP of one step at each of `ORDERS`, rounded up; kept, since a task repeats the same step thousands of times."""
    if noise_multiplier < _LEAST_NOISE:
        rdp = np.full(len(ORDERS), math.inf)
    elif sampling_rate == 1:
        rdp = _ORDER_ARRAY / (2 * noise_multiplier**2)
    else:
        rdp = _log_moments(sampling_rate, noise_multiplier) / (_ORDER_ARRAY - 1)
    rdp *= _ROUNDING_UP
    rdp.setflags(write=False)
    return rdp


def _log_moments(sampling_rate: float, noise_multiplier: float) -> Vector:
    """(order - 1) times the RDP at each order: exact at integers, between them by quadrature, or a chord above it.

    The log moment is convex in the order and 0 at order 1, so a chord between integers is an upper bound.
    """
    moments = np.empty(len(ORDERS))
    moments[_IS_INTEGER] = at_integers = _integer_log_moments(sampling_rate, noise_multiplier)
    if noise_multiplier >= _LEAST_NOISE_FOR_QUADRATURE:
        moments[~_IS_INTEGER] = _fractional_log_moments(sampling_rate, noise_multiplier)
    else:
        moments[~_IS_INTEGER] = np.interp(_FRACTIONAL, (1, *_INTEGER), (0.0, *at_integers))
    return moments


def _fractional_log_moments(sampling_rate: float, noise_multiplier: float) -> Vector:
    """Log of E[((1 - q) + q exp((2x - 1) / 2z²))^order] over x ~ N(0, z²) (Mironov et al., section 3.3), rounded up.

    By the trapezoid rule, whose error falls exponentially for an analytic integrand (Trefethen & Weideman, SIAM Review
    2014): the nearest singularity lies πz² off the real axis, so at this step it is below float64's rounding.
    """
    variance = noise_multiplier**2
    step = min(noise_multiplier, variance) / 4
    first, last = -12 * noise_multiplier, _FRACTIONAL[-1] + 12 * noise_multiplier
    x = first + step * np.arange(math.ceil((last - first) / step) + 1)
    ratio = np.logaddexp(math.log1p(-sampling_rate), math.log(sampling_rate) + (2 * x - 1) / (2 * variance))
    terms = np.outer(_FRACTIONAL, ratio) - x * x / (2 * variance)
    top = terms.max(axis=1)
    sums = np.exp(terms - top[:, None]).sum(axis=1)
    log_moments: Vector = top + np.log(sums * step / math.sqrt(2 * math.pi * variance))
    return np.maximum(0.0, log_moments) * (1 + 1e-9) + 1e-14


@functools.lru_cache(maxsize=1)
def _binomials() -> tuple[Vector, Vector, Vector, NDArray[np.intp]]:
    """For all integer orders in a row: k from 2 to the order, order - k, the log binomials, and where each begins."""
    k = np.concatenate([np.arange(2, order + 1, dtype=np.float64) for order in _INTEGER])
    rest = np.concatenate([np.arange(order - 2, -1, -1, dtype=np.float64) for order in _INTEGER])
    log_factorial = np.array([math.lgamma(n + 1) for n in range(_INTEGER[-1] + 1)])
    i, j = k.astype(np.intp), rest.astype(np.intp)
    lengths = [order - 1 for order in _INTEGER]
    starts = np.cumsum([0, *lengths[:-1]])
    return k, rest, log_factorial[i + j] - log_factorial[i] - log_factorial[j], starts


def _integer_log_moments(sampling_rate: float, noise_multiplier: float) -> Vector:
    """Log of the binomial sum in Mironov et al., section 3.3, at each of `_INTEGER`.

    The sum of the binomial probabilities, which is 1, is taken out: 1 + Σ C(α, k) (1 - q)^(α - k) q^k (exp((k² - k) /
    2z²) - 1) over k from 2. All its terms are positive, so that next to no cost is exact too.
    """
    k, rest, log_binomial, starts = _binomials()
    exponent = (k * k - k) / (2 * noise_multiplier**2)
    terms = log_binomial + rest * math.log1p(-sampling_rate) + k * math.log(sampling_rate)
    terms += exponent + np.log(-np.expm1(-exponent))
    top = np.maximum.reduceat(terms, starts)
    lengths = np.diff([*starts, len(terms)])
    total: Vector = top + np.log(np.add.reduceat(np.exp(terms - np.repeat(top, lengths)), starts))
    return np.logaddexp(0.0, total)


def poisson_gaussian_rdp(*, sampling_rate: float, noise_multiplier: float, steps: int) -> Vector:
    """RDP at each of `ORDERS` of `steps` Poisson-sampled Gaussian steps.

    Args:
        sampling_rate: q, (0, 1]; each record enters each step independently with this probability.
        noise_multiplier: noise standard deviation over the clip; 0 gives infinity.
        steps: at least 0.

    Raises:
        LocalMisuseError: an argument is out of range.
    """
    if not 0 < sampling_rate <= 1:
        raise LocalMisuseError(f"sampling_rate: expected 0 < q <= 1, got {sampling_rate}")
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise LocalMisuseError(f"noise_multiplier: expected a finite number of at least 0, got {noise_multiplier}")
    if steps < 0:
        raise LocalMisuseError(f"steps: expected at least 0, got {steps}")
    if steps == 0:
        return np.zeros(len(ORDERS))
    total: Vector = steps * _step_rdp(sampling_rate, min(noise_multiplier, _MOST_NOISE))
    return total


def _conversion_terms(delta: float) -> Vector:
    """What the conversion to (epsilon, delta) adds to the RDP at each order."""
    if not 0 < delta < 1:
        raise LocalMisuseError(f"delta: expected 0 < delta < 1, got {delta}")
    terms: Vector = np.log1p(-1 / _ORDER_ARRAY) - (math.log(delta) + np.log(_ORDER_ARRAY)) / (_ORDER_ARRAY - 1)
    return terms


def epsilon_by_order(rdp: Vector, delta: float) -> Vector:
    """The epsilon that each single order gives for `delta`."""
    return np.maximum(0.0, rdp + _conversion_terms(delta))


def rdp_to_epsilon(rdp: Vector, delta: float) -> float:
    """The best epsilon over the orders, for mechanisms that were fixed in advance; 0 for nothing spent."""
    if not rdp.any():
        return 0.0
    return float(epsilon_by_order(rdp, delta).min())


def filter_order_index(*, epsilon: float, delta: float, cost: Vector) -> int:
    """Index into `ORDERS` of the order at which the budget admits the most participations of this cost.

    A Rényi filter is proven for one order chosen before anything is released (Feldman & Zrnic, arXiv 2008.11193,
    theorem 4.3), whatever the later steps depend on; with the first participation's cost this is such an order.

    Args:
        epsilon: of the budget, above 0, may be infinite.
        delta: of the budget.
        cost: RDP of one participation at each of `ORDERS`.
    """
    room = epsilon - _conversion_terms(delta)
    with np.errstate(divide="ignore", invalid="ignore"):
        admitted = np.where(room > 0, room / cost, -1.0)
    return int(np.argmax(np.nan_to_num(admitted, nan=0.0, posinf=np.inf)))


def noise_multiplier_for(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier (to 1e-4) for which a fresh ledger of (epsilon, delta) admits `steps` steps.

    Raises:
        LocalMisuseError: no noise below 10,000 suffices.
    """

    def fits(noise_multiplier: float) -> bool:
        rdp = poisson_gaussian_rdp(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps)
        return rdp_to_epsilon(rdp, delta) <= epsilon

    low, high = 0, 100_000_000  # in units of 1e-4
    if not fits(high * 1e-4):
        raise LocalMisuseError(
            f"no noise multiplier below {high * 1e-4:g} keeps {steps} steps within epsilon {epsilon}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(round(middle * 1e-4, 4)) else (middle, high)
    return round(high * 1e-4, 4)
