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

_LEAST_NOISE_FOR_QUADRATURE = 0.05
_LEAST_NOISE = 1e-100
"""Below this noise multiplier the moments overflow; it is taken for no noise at all."""


@functools.lru_cache(maxsize=256)
def _step_rdp(sampling_rate: float, noise_multiplier: float) -> tuple[float, ...]:
    """RDP of one step at each of `ORDERS`; cached, since a task repeats the same step thousands of times."""
    if noise_multiplier < _LEAST_NOISE:
        return (math.inf,) * len(ORDERS)
    if sampling_rate == 1:
        return tuple(order / (2 * noise_multiplier**2) for order in ORDERS)
    return tuple(_log_moment(order, sampling_rate, noise_multiplier) / (order - 1) for order in ORDERS)


def _log_moment(order: float, sampling_rate: float, noise_multiplier: float) -> float:
    """(order - 1) times the RDP at `order`: exact at integers, between them by quadrature, or a chord above it.

    The log moment is convex in the order and 0 at order 1, so a chord between integers is an upper bound.
    """
    below = math.floor(order)
    if order == below:
        return _integer_log_moment(below, sampling_rate, noise_multiplier)
    if noise_multiplier >= _LEAST_NOISE_FOR_QUADRATURE:
        return _fractional_log_moment(order, sampling_rate, noise_multiplier)
    low = _integer_log_moment(below, sampling_rate, noise_multiplier) if below > 1 else 0.0
    high = _integer_log_moment(below + 1, sampling_rate, noise_multiplier)
    return low + (order - below) * (high - low)


def _fractional_log_moment(order: float, sampling_rate: float, noise_multiplier: float) -> float:
    """Log of E[((1 - q) + q exp((2x - 1) / 2z²))^order] over x ~ N(0, z²) (Mironov et al., section 3.3), rounded up.

    By the trapezoid rule, whose error falls exponentially for an analytic integrand (Trefethen & Weideman, SIAM Review
    2014): the nearest singularity lies πz² off the real axis, so at this step it is below float64's rounding.
    """
    variance = noise_multiplier**2
    step = min(noise_multiplier, variance) / 4
    first, last = -12 * noise_multiplier, order + 12 * noise_multiplier
    x = first + step * np.arange(math.ceil((last - first) / step) + 1)
    ratio = np.logaddexp(math.log1p(-sampling_rate), math.log(sampling_rate) + (2 * x - 1) / (2 * variance))
    terms = order * ratio - x * x / (2 * variance)
    top = float(terms.max())
    log_moment = top + math.log(float(np.exp(terms - top).sum()) * step / math.sqrt(2 * math.pi * variance))
    return max(0.0, log_moment) * (1 + 1e-9) + 1e-14


@functools.lru_cache(maxsize=4096)
def _integer_log_moment(order: int, sampling_rate: float, noise_multiplier: float) -> float:
    """Log of the binomial sum in Mironov et al., section 3.3."""
    k = np.arange(order + 1, dtype=np.float64)
    log_binomial = np.array([math.lgamma(order + 1) - math.lgamma(i + 1) - math.lgamma(order - i + 1) for i in k])
    terms = log_binomial + (order - k) * math.log1p(-sampling_rate) + k * math.log(sampling_rate)
    terms += (k * k - k) / (2 * noise_multiplier**2)
    top = float(terms.max())
    return top + math.log(float(np.exp(terms - top).sum()))


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
    total: Vector = steps * np.array(_step_rdp(sampling_rate, noise_multiplier), dtype=np.float64)
    return total


def _conversion_terms(delta: float) -> Vector:
    """What the conversion to (epsilon, delta) adds to the RDP at each order."""
    if not 0 < delta < 1:
        raise LocalMisuseError(f"delta: expected 0 < delta < 1, got {delta}")
    orders = np.array(ORDERS)
    terms: Vector = np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
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
