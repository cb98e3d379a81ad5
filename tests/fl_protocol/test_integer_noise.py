"""Integer noise: the exact distributions, to the last places that a table of 63 bits has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fl_protocol import integer_noise
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import (
    _cumulative_weights,
    _table_sample,
    discrete_gaussian,
    discrete_gaussian_bound,
    skellam,
    skellam_bound,
)
from tests.device_client import noise_checks as checks
from tests.enrolments import broken_copy
from tests.virtual_fleet import SeededEntropy

COUNT = 200_000
SMALL = [1.0, 1.7, 5.0, 40.0]
COMPOSED = [4097.0, 10_000.0, 3.7e5, 2.0**24, 2.0**34]


@pytest.mark.parametrize("sigma", SMALL)
def test_small_sigmas_follow_the_exact_probabilities(sigma: float) -> None:
    # False-alarm rate: FALSE_ALARM_RATE per sigma.
    draws = discrete_gaussian(sigma, COUNT, SeededEntropy(f"small {sigma}"))
    assert checks.p_value_of_discrete_gaussian(draws, sigma) > checks.FALSE_ALARM_RATE


@pytest.mark.parametrize("sigma", [2000.0, *COMPOSED])
def test_wide_sigmas_follow_the_gaussian_and_leave_no_lattice(sigma: float) -> None:
    # False-alarm rate: FALSE_ALARM_RATE for each of the four tests.
    draws = discrete_gaussian(sigma, COUNT, SeededEntropy(f"wide {sigma}"))
    assert checks.p_value_of_wide_gaussian(draws, sigma) > checks.FALSE_ALARM_RATE
    assert checks.p_value_of_standard_deviation(draws.astype(float), sigma) > checks.FALSE_ALARM_RATE
    for modulus in (2, max(2, math.ceil(sigma / 2048) % 1009)):
        assert checks.p_value_of_uniform_residues(draws, modulus) > checks.FALSE_ALARM_RATE


@pytest.mark.parametrize("sigma", [5.0, 10_000.0])
@pytest.mark.parametrize("error", [0.5, 0.97, 1.03])
def test_the_checks_notice_another_sigma(sigma: float, error: float) -> None:
    draws = discrete_gaussian(max(1.0, error * sigma), COUNT, SeededEntropy("other"))
    check = checks.p_value_of_discrete_gaussian if sigma < 100 else checks.p_value_of_wide_gaussian
    assert check(draws, sigma) < checks.FALSE_ALARM_RATE


def test_the_checks_notice_a_sampler_that_skips_numbers() -> None:
    draws = 2 * discrete_gaussian(5000.0, COUNT, SeededEntropy("even"))
    assert checks.p_value_of_wide_gaussian(draws, 10_000.0) > checks.FALSE_ALARM_RATE
    assert checks.p_value_of_uniform_residues(draws, 2) < checks.FALSE_ALARM_RATE


@pytest.mark.parametrize("sigma", [*SMALL, 333.3, 2048.0, 4096.0])
def test_the_table_is_the_exact_distribution_to_the_last_places_and_totals_two_to_the_63(sigma: float) -> None:
    cumulative = _cumulative_weights("gaussian", sigma)
    assert int(cumulative[-1]) == 2**63 - 1
    weights = np.diff(cumulative, prepend=0)
    assert (weights >= 0).all()
    middle = len(weights) // 2
    np.testing.assert_array_equal(weights[:middle], weights[:middle:-1])
    support, pmf = checks.discrete_gaussian_pmf(sigma)
    within = np.abs(support) <= middle
    gap = np.abs(weights.astype(np.longdouble) / 2**63 - pmf[within])
    # The total variation distance, tails included, is what a delta would have to pay for one coordinate.
    assert float(gap.sum() + pmf[~within].sum()) / 2 < 2e-15


@given(sigma=st.floats(1.0, 2.0**40), seed=st.text(max_size=8))
@settings(max_examples=100, deadline=None)
def test_noise_is_a_function_of_the_random_bytes_alone(sigma: float, seed: str) -> None:
    draws = discrete_gaussian(sigma, 50, SeededEntropy(seed))
    assert draws.dtype == np.int64
    np.testing.assert_array_equal(draws, discrete_gaussian(sigma, 50, SeededEntropy(seed)))
    assert np.abs(draws).max() <= discrete_gaussian_bound(sigma) < 20 * sigma + 1


@pytest.mark.parametrize("bits", [b"\x00", b"\xff"])
def test_extreme_random_bytes_stay_within_the_table(bits: bytes) -> None:
    draws = discrete_gaussian(10.0, 3, lambda count: bits * count)
    assert np.abs(draws).max() <= math.ceil(9.3 * 10)


@pytest.mark.parametrize("sigma", [0.0, 0.99, 2.0**41, math.nan, -1.0])
def test_sigmas_out_of_range_are_refused(sigma: float) -> None:
    with pytest.raises(LocalMisuseError, match="sigma"):
        discrete_gaussian(sigma, 1, SeededEntropy(""))


def check_guide(sigma: float, module: Any) -> None:
    cumulative = _cumulative_weights("gaussian", sigma)
    # Every boundary of the table and of the guide, one below and one above, and the ends.
    table = {int(c) + k for c in cumulative for k in (-1, 0, 1)}
    edges = table | {(i << 47) + k for i in range(1 << 16) for k in (-1, 0)}
    draws = np.array(sorted(edge for edge in edges if 0 <= edge < 1 << 63), np.int64)
    searched = np.minimum(np.searchsorted(cumulative, draws, side="right"), len(cumulative) - 1)
    drawn = module._table_sample("gaussian", sigma, len(draws), in_two_parts(draws, unclear(cumulative, draws)))
    np.testing.assert_array_equal(drawn, searched - (len(cumulative) - 1) // 2)


@pytest.mark.parametrize("sigma", [1.0, 3.7, 512.0, 1023.9])
def test_the_guide_gives_what_a_search_of_the_table_gives(sigma: float) -> None:
    check_guide(sigma, integer_noise)


def test_a_sampler_that_forgets_the_bits_behind_the_guide_is_caught() -> None:
    check_guide(3.7, broken_copy("fl_protocol.integer_noise"))
    copy = broken_copy("fl_protocol.integer_noise", ("_TAIL_BITS | tails", "_TAIL_BITS | 0 * tails"))
    with pytest.raises(AssertionError):
        check_guide(3.7, copy)


def unclear(cumulative: np.ndarray, draws: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Which draws share their leading 16 bits with one that another entry of the table has, bool [draws]."""
    first, last = draws >> 47 << 47, draws | (1 << 47) - 1
    return np.searchsorted(cumulative, first, side="right") != np.searchsorted(cumulative, last, side="right")


def in_two_parts(draws: np.ndarray, whole: np.ndarray) -> Callable[[int], bytes]:  # type: ignore[type-arg]
    """A source of given draws of 63 bits: 16 bits of each, then the other 47, with 17 to spare, where `whole`."""
    parts = [(draws >> 47).astype("<u2"), (draws[whole].astype(np.uint64) << np.uint64(17)).astype("<u8")]

    def source(count: int) -> bytes:
        part = parts.pop(0).tobytes()
        assert len(part) == count
        return part

    return source


@pytest.mark.parametrize("sigma", [1.0, 512.0])
def test_every_draw_has_63_bits_of_its_own(sigma: float) -> None:
    cumulative = _cumulative_weights("gaussian", sigma)
    asked: list[int] = []

    def counting(count: int) -> bytes:
        asked.append(count)
        return SeededEntropy(f"{len(asked)}")(count)

    _table_sample("gaussian", sigma, COUNT, counting)
    heads = np.frombuffer(SeededEntropy("1")(2 * COUNT), "<u2").astype(np.int64) << 47
    assert asked == [2 * COUNT, 8 * np.count_nonzero(unclear(cumulative, heads))]


# Skellam.

VARIANCES = [0.01, 0.5, 1.0, 30.0, 2500.0]


def exact_skellam(variance: float) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Support and probabilities, as the difference of two Poisson variables: another way than the table's."""
    mean = np.longdouble(variance) / 2
    largest = math.ceil(variance / 2 + 40 * math.sqrt(variance) + 60)
    poisson = np.exp(-mean) * np.cumprod([np.longdouble(1), *(mean / k for k in range(1, largest + 1))])
    return np.arange(-largest, largest + 1), np.convolve(poisson, poisson[::-1])


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_skellam_table_is_the_difference_of_two_poisson_variables(variance: float) -> None:
    cumulative = _cumulative_weights("skellam", variance)
    assert int(cumulative[-1]) == 2**63 - 1
    weights = np.diff(cumulative, prepend=0)
    assert (weights >= 0).all()
    middle = len(weights) // 2
    assert middle == skellam_bound(variance)
    np.testing.assert_array_equal(weights[:middle], weights[:middle:-1])
    support, pmf = exact_skellam(variance)
    ours = np.zeros(len(pmf), np.longdouble)
    within, held = np.abs(support) <= middle, np.abs(np.arange(-middle, middle + 1)) <= support[-1]
    ours[within] = weights[held].astype(np.longdouble) / 2**63
    # The total variation distance is what a delta would have to pay for one coordinate.
    assert float(np.abs(ours - pmf).sum()) / 2 < 2e-15
    assert float(pmf[~within].sum()) < 2.0**-63


@pytest.mark.parametrize("variance", [0.5, 4.0, 2500.0])
def test_skellam_noise_follows_the_exact_probabilities(variance: float) -> None:
    # False-alarm rate: FALSE_ALARM_RATE for each of the two tests.
    draws = skellam(variance, COUNT, SeededEntropy(f"skellam {variance}"))
    support, pmf = exact_skellam(variance)
    assert p_value(draws, support, pmf.astype(float)) > checks.FALSE_ALARM_RATE
    # The same number of draws of a discrete Gaussian of that variance is told apart while it is narrow.
    if variance == 4.0:
        gaussian = discrete_gaussian(math.sqrt(variance), COUNT, SeededEntropy("another law"))
        assert p_value(gaussian, support, pmf.astype(float)) < checks.FALSE_ALARM_RATE


def p_value(draws: np.ndarray, support: np.ndarray, pmf: np.ndarray) -> float:  # type: ignore[type-arg]
    """Chi-square against exact probabilities, tails pooled so that each cell expects at least ten."""
    inner = support[pmf * len(draws) >= 10]
    clipped = np.clip(draws, inner[0], inner[-1])
    cells = np.array(
        [pmf[support <= inner[0]].sum(), *pmf[np.isin(support, inner[1:-1])], pmf[support >= inner[-1]].sum()]
    )
    observed = np.bincount(clipped - inner[0], minlength=len(inner))
    return float(stats.chisquare(observed, cells * (len(draws) / cells.sum())).pvalue)


@pytest.mark.parametrize(("variance", "devices"), [(100.0, 20), (5e6, 1)])
def test_shares_of_many_devices_add_up_to_the_noise_of_one(variance: float, devices: int) -> None:
    # False-alarm rate: FALSE_ALARM_RATE for each of the three tests.
    total = np.zeros(COUNT, np.int64)
    for index in range(devices):
        total += skellam(variance / devices, COUNT, SeededEntropy(f"share {index} of {devices}"))
    assert checks.p_value_of_uniform_residues(total, 2) > checks.FALSE_ALARM_RATE
    assert checks.p_value_of_standard_deviation(total.astype(float), math.sqrt(variance)) > checks.FALSE_ALARM_RATE
    if devices > 1:
        support, pmf = exact_skellam(variance)
        assert p_value(total, support, pmf.astype(float)) > checks.FALSE_ALARM_RATE


def check_variance(module: object) -> None:
    draws = module.skellam(50.0, COUNT, SeededEntropy("variance"))  # type: ignore[attr-defined]
    assert checks.p_value_of_standard_deviation(draws.astype(float), math.sqrt(50.0)) > checks.FALSE_ALARM_RATE


def test_a_sampler_of_another_variance_is_caught() -> None:
    check_variance(broken_copy("fl_protocol.integer_noise"))
    copy = broken_copy(
        "fl_protocol.integer_noise", ("x = np.longdouble(variance)", "x = np.longdouble(variance * 0.97)")
    )
    with pytest.raises(AssertionError):
        check_variance(copy)


@given(variance=st.floats(1e-6, 2.0**22), seed=st.text(max_size=8))
@settings(max_examples=25, deadline=None)
def test_skellam_noise_stays_within_its_bound(variance: float, seed: str) -> None:
    draws = skellam(variance, 50, SeededEntropy(seed))
    np.testing.assert_array_equal(draws, skellam(variance, 50, SeededEntropy(seed)))
    assert np.abs(draws).max() <= skellam_bound(variance)
    for bits in (b"\x00", b"\xff"):
        assert np.abs(skellam(variance, 3, lambda count, bits=bits: bits * count)).max() <= skellam_bound(variance)  # type: ignore[misc]


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf, 2.0**27])
def test_variances_out_of_range_are_refused(variance: float) -> None:
    with pytest.raises(LocalMisuseError, match="variance: expected 9"):
        skellam(variance, 1, SeededEntropy(""))
