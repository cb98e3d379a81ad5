"""Statistical checks of noise, each returning a p-value; the callers say which false-alarm rate they accept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FALSE_ALARM_RATE = 1e-6
"""Of every statistical test here; the entropy is seeded, so a test that passes goes on passing."""


def discrete_gaussian_pmf(sigma: float) -> tuple[NDArray[np.int64], NDArray[np.longdouble]]:
    """Support and exact probabilities (64-bit mantissa) of the discrete Gaussian."""
    m = int(np.ceil(12 * sigma))
    k = np.arange(-m, m + 1)
    density = np.exp(-(k.astype(np.longdouble) ** 2) / (2 * np.longdouble(sigma) ** 2))
    return k, density / density.sum()


def p_value_of_discrete_gaussian(draws: NDArray[np.int64], sigma: float) -> float:
    """Chi-square against the exact probabilities, tails pooled so that each cell expects at least ten."""
    support, pmf = discrete_gaussian_pmf(sigma)
    expected = (pmf * len(draws)).astype(float)
    inner = support[expected >= 10]
    low, high = inner[0], inner[-1]
    observed = np.bincount(np.clip(draws, low, high) - low, minlength=len(inner)).astype(float)
    cells = expected[(support >= low) & (support <= high)]
    cells[0] += expected[support < low].sum()
    cells[-1] += expected[support > high].sum()
    return float(stats.chisquare(observed, cells * (observed.sum() / cells.sum())).pvalue)


def p_value_of_wide_gaussian(draws: NDArray[np.int64], sigma: float, cells: int = 200) -> float:
    """Chi-square in equally likely cells, for a sigma so wide that integers are dense in each cell."""
    ranks = stats.norm.cdf((draws + 0.0) / sigma)
    return float(stats.chisquare(np.bincount((ranks * cells).astype(int), minlength=cells)).pvalue)


def p_value_of_uniform_residues(draws: NDArray[np.int64], modulus: int) -> float:
    """Chi-square of the draws modulo something: a composed sampler must not leave a lattice behind."""
    return float(stats.chisquare(np.bincount(draws % modulus, minlength=modulus)).pvalue)


def p_value_of_standard_deviation(residual: NDArray[np.float64], sigma: float) -> float:
    """Two-sided chi-square test that independent normal residuals have this standard deviation."""
    cdf = stats.chi2.cdf(float(residual @ residual) / sigma**2, len(residual))
    return float(2 * min(cdf, 1 - cdf))


def p_value_of_normal(residual: NDArray[np.float64], sigma: float) -> float:
    """Kolmogorov-Smirnov against N(0, sigma²)."""
    return float(stats.kstest(residual / sigma, "norm").pvalue)


def p_value_of_no_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Pearson's test that two releases' noises are unrelated."""
    return float(stats.pearsonr(first, second).pvalue)
