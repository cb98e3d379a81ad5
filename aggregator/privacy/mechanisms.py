"""What one noisy sum costs in Rényi DP, for each kind of noise alone. Pure.

- Gaussian: ε(α) = α·Δ2² / 2σ² (I. Mironov, arXiv 1702.07476, corollary 3).
- Discrete Gaussian, for integer vectors: no more than that (C. Canonne, G. Kamath, T. Steinke, arXiv 2004.00010,
  proposition 5, coordinate by coordinate).
- Skellam of variance μ, for integer vectors and integer orders: ε(α) ≤ α·Δ2² / 2μ + min(((2α − 1)·Δ2² + 6·Δ1) / 4μ²,
  3·Δ1 / 2μ) (N. Agarwal, P. Kairouz, Z. Liu, arXiv 2110.04995, theorem 3.5 and corollary 3.6).
- Poisson-sampled: I. Mironov, K. Talwar, L. Zhang, arXiv 1908.10530, section 3.3, which is exact for the Gaussian and
  an upper bound for whatever symmetric additive noise has ε(k) ≤ k·Δ2² / 2σ² at all integers k (`PoissonSampled`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fl_protocol.errors import LocalMisuseError
from fl_protocol.renyi import INTEGER_ORDERS, Vector, sampled_gaussian_log_moments

_ROUNDING_UP = 1 + 1e-10
"""More than float64 loses here, and in sums over rounds."""
_LEAST_NOISE, _MOST_NOISE = 1e-100, 1e100


class Mechanism(Protocol):
    """One kind of noise on a sum in which a device's part is bounded."""

    def rdp(self, orders: Sequence[int] = INTEGER_ORDERS) -> Vector:
        """An upper bound, at each of some integer orders above 1, on the Rényi divergence both ways."""


def _gaussian_rdp(noise_multiplier: float, orders: Sequence[int]) -> Vector:
    """α / 2z², infinite where there is no noise to speak of."""
    if noise_multiplier < _LEAST_NOISE:
        return np.full(len(orders), math.inf)
    rdp: Vector = np.asarray(orders, np.float64) * (_ROUNDING_UP / 2 / min(noise_multiplier, _MOST_NOISE) ** 2)
    return rdp


@dataclass(frozen=True)
class Gaussian:
    """Continuous Gaussian noise.

    Args:
        l2_sensitivity: Δ2.
        sigma: standard deviation, in the same unit.
    """

    l2_sensitivity: float
    sigma: float

    def rdp(self, orders: Sequence[int] = INTEGER_ORDERS) -> Vector:
        """At each of some orders."""
        return _gaussian_rdp(self.sigma / self.l2_sensitivity, orders)


@dataclass(frozen=True)
class DiscreteGaussian(Gaussian):
    """Discrete Gaussian noise on a sum of integer vectors; same cost, in grid steps."""


@dataclass(frozen=True)
class Skellam:
    """Symmetric Skellam noise on a sum of integer vectors.

    Args:
        l2_sensitivity: Δ2, in grid steps.
        l1_sensitivity: Δ1, in grid steps.
        variance: μ, in grid steps squared: of the difference of two Poisson variables of mean μ / 2 each.
    """

    l2_sensitivity: float
    l1_sensitivity: float
    variance: float

    def rdp(self, orders: Sequence[int] = INTEGER_ORDERS) -> Vector:
        """At each of some orders, which the theorem wants to be integers.

        Raises:
            LocalMisuseError: an order is none.
        """
        if any(order != int(order) or order < 2 for order in orders):
            raise LocalMisuseError("orders: the Skellam bound is proven for integers from 2 on")
        mu, l1, l2_squared = self.variance, self.l1_sensitivity, self.l2_sensitivity**2
        gaussian = _gaussian_rdp(math.sqrt(mu) / self.l2_sensitivity, orders)
        if not np.isfinite(gaussian).all():
            return gaussian
        alpha = np.asarray(orders, np.float64)
        excess = np.minimum(((2 * alpha - 1) * l2_squared + 6 * l1) / (4 * mu * mu), 3 * l1 / (2 * mu))
        return gaussian + excess * _ROUNDING_UP


@dataclass(frozen=True)
class PoissonSampled:
    """A device's part is there with a probability p, by a coin that nobody sees.

    With P and Q the outputs with and without the part, M = (1 − p)·Q + p·P, and L = P / Q: E_Q[(M / Q)^α] = Σ C(α, k)
    (1 − p)^(α − k) p^k E_Q[L^k], and E_Q[L^k] = exp((k − 1)·ε(k)), which the Gaussian's ε(k) bounds for both kinds of
    noise. The other way round costs no more: symmetric noise has a reflection that swaps P and Q, so pair x with its
    image. The pair's part of E_Q[(M / Q)^α] − E_M[(Q / M)^α] is Q(x)·(a·k(a) − L·k(b)) with k(s) = s^(α − 1) − s^(−α),
    a = 1 − p + p·L and b = L / (p + (1 − p)·L), L ≥ 1. There 1 ≤ b ≤ a, and k(s) = 2·s^(−1/2)·sinh((α − 1/2)·ln s), so
    k(b) / k(a) falls with α, and at α = 1 it is a / L: never negative.

    Args:
        mechanism: with Gaussian cost, whose law does not depend on who takes part.
        probability: p, (0, 1].
    """

    mechanism: Gaussian
    probability: float

    def rdp(self, orders: Sequence[int] = INTEGER_ORDERS) -> Vector:
        """At `INTEGER_ORDERS`, and no others.

        Raises:
            LocalMisuseError: other orders are asked for.
        """
        if tuple(orders) != INTEGER_ORDERS:
            raise LocalMisuseError("orders: sampled noise is accounted at fl_protocol.renyi.INTEGER_ORDERS")
        noise_multiplier = self.mechanism.sigma / self.mechanism.l2_sensitivity
        if self.probability == 1 or noise_multiplier < _LEAST_NOISE:
            return self.mechanism.rdp(orders)
        moments = sampled_gaussian_log_moments(self.probability, min(noise_multiplier, _MOST_NOISE))
        rdp: Vector = moments * _ROUNDING_UP / (np.asarray(orders, np.float64) - 1)
        return rdp
