"""Rényi differential privacy of DP-SGD on one device: Poisson-sampled Gaussian steps, composed and converted. Pure.

Adversary: everyone, the aggregator included, who sees every noisy step. Neighbours: add or remove one record.

Integer orders and the conversion are `fl_protocol.renyi`'s; between integer orders it is by quadrature here.

Source: I. Mironov, K. Talwar, L. Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", arXiv
1908.10530, section 3.3.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from fl_protocol.errors import LocalMisuseError
from fl_protocol.renyi import (
    FRACTIONAL_ORDERS,
    INTEGER_ORDERS,
    ORDERS,
    Vector,
    rdp_to_epsilon,
    sampled_gaussian_log_moments,
)

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
    moments[_IS_INTEGER] = at_integers = sampled_gaussian_log_moments(sampling_rate, noise_multiplier)
    if noise_multiplier >= _LEAST_NOISE_FOR_QUADRATURE:
        moments[~_IS_INTEGER] = _fractional_log_moments(sampling_rate, noise_multiplier)
    else:
        moments[~_IS_INTEGER] = np.interp(FRACTIONAL_ORDERS, (1, *INTEGER_ORDERS), (0.0, *at_integers))
    return moments


def _fractional_log_moments(sampling_rate: float, noise_multiplier: float) -> Vector:
    """Log of E[((1 - q) + q exp((2x - 1) / 2z²))^order] over x ~ N(0, z²) (Mironov et al., section 3.3), rounded up.

    By the trapezoid rule, whose error falls exponentially for an analytic integrand (Trefethen & Weideman, SIAM Review
    2014): the nearest singularity lies πz² off the real axis, so at this step it is below float64's rounding.
    """
    variance = noise_multiplier**2
    step = min(noise_multiplier, variance) / 4
    first, last = -12 * noise_multiplier, FRACTIONAL_ORDERS[-1] + 12 * noise_multiplier
    x = first + step * np.arange(math.ceil((last - first) / step) + 1)
    ratio = np.logaddexp(math.log1p(-sampling_rate), math.log(sampling_rate) + (2 * x - 1) / (2 * variance))
    terms = np.outer(FRACTIONAL_ORDERS, ratio) - x * x / (2 * variance)
    top = terms.max(axis=1)
    sums = np.exp(terms - top[:, None]).sum(axis=1)
    log_moments: Vector = top + np.log(sums * step / math.sqrt(2 * math.pi * variance))
    return np.maximum(0.0, log_moments) * (1 + 1e-9) + 1e-14


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
