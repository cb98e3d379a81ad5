"""Rényi divergences of integer noise, summed up in many digits: what every accountant is held against."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mpmath

Density = Callable[[int], mpmath.mpf]
DIGITS = 40


@functools.lru_cache(maxsize=100_000)
def skellam(z: int, variance: float) -> mpmath.mpf:
    """P(X - Y = z), X and Y Poisson of mean variance / 2: so the variance of the difference is what it is called."""
    with mpmath.workdps(DIGITS):
        return mpmath.exp(-variance) * mpmath.besseli(abs(z), mpmath.mpf(variance))


def skellam_from_poissons(z: int, variance: float) -> mpmath.mpf:
    """The same from its definition."""
    with mpmath.workdps(DIGITS):
        mean = mpmath.mpf(variance) / 2
        terms = (mean ** (2 * y + z) / mpmath.factorial(y + z) / mpmath.factorial(y) for y in range(max(0, -z), 400))
        return mpmath.exp(-2 * mean) * mpmath.fsum(terms)


@functools.lru_cache(maxsize=100)
def _gaussian_total(sigma: float) -> mpmath.mpf:
    with mpmath.workdps(DIGITS):
        last = math.ceil(20 * sigma) + 10
        return mpmath.fsum(mpmath.exp(-mpmath.mpf(z * z) / (2 * sigma * sigma)) for z in range(-last, last + 1))


def discrete_gaussian(z: int, sigma: float) -> mpmath.mpf:
    with mpmath.workdps(DIGITS):
        return mpmath.exp(-mpmath.mpf(z * z) / (2 * mpmath.mpf(sigma) ** 2)) / _gaussian_total(sigma)


def renyi(density: Density, shift: int, order: int, *, reach: int, p: float = 1.0) -> float:
    """The larger Rényi divergence of noise moved by `shift` with probability p and noise alone, over both ways.

    What is summed lies within `reach` of 0.
    """
    with mpmath.workdps(DIGITS):
        there, back = [], []
        for z in range(-reach, reach + 1):
            without = density(z)
            mixed = (1 - mpmath.mpf(p)) * without + p * density(z - shift)
            there.append(mixed**order * without ** (1 - order))
            back.append(without**order * mixed ** (1 - order))
        for terms in (there, back):
            assert max(terms[0], terms[-1]) < 1e-15 * max(terms), "reach is too short"
        return max(float(mpmath.log(mpmath.fsum(terms)) / (order - 1)) for terms in (there, back))


def hockey_stick(density: Density, shift: int, epsilon: float, *, reach: int) -> float:
    """The exact delta at epsilon of one release."""
    with mpmath.workdps(DIGITS):
        grown = mpmath.exp(epsilon)
        return float(
            mpmath.fsum(max(mpmath.mpf(0), density(z - shift) - grown * density(z)) for z in range(-reach, reach + 1))
        )
