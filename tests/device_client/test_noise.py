"""Discrete Gaussian noise: the exact distribution, the grid, and what each costs the sensitivity."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client.noise import SENSITIVITY_MARGIN, NoisyGrid, _cumulative_weights, _table_sample, discrete_gaussian
from fl_protocol.errors import LocalMisuseError
from tests.device_client import noise_checks as checks
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
    cumulative = _cumulative_weights(sigma)
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
    assert np.abs(draws).max() < 20 * sigma


@pytest.mark.parametrize("bits", [b"\x00", b"\xff"])
def test_extreme_random_bytes_stay_within_the_table(bits: bytes) -> None:
    draws = discrete_gaussian(10.0, 3, lambda count: bits * count)
    assert np.abs(draws).max() <= math.ceil(9.3 * 10)


@pytest.mark.parametrize("sigma", [0.0, 0.99, 2.0**41, math.nan, -1.0])
def test_sigmas_out_of_range_are_refused(sigma: float) -> None:
    with pytest.raises(LocalMisuseError, match="sigma"):
        discrete_gaussian(sigma, 1, SeededEntropy(""))


@given(
    clip=st.floats(1e-6, 1e6),
    length=st.integers(1, 2000),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.01, 100.0),
)
@settings(max_examples=200, deadline=None)
def test_rounding_to_the_grid_moves_neighbouring_sums_by_at_most_the_margin(
    clip: float, length: int, seed: int, scale: float
) -> None:
    grid = NoisyGrid(clip, 1.0, length)
    assert math.log2(grid.step) == round(math.log2(grid.step))
    assert 2 * grid.step * math.sqrt(length) > 2.0**-10 * clip >= grid.step * math.sqrt(length)
    generator = np.random.default_rng(seed)
    total = generator.normal(size=length) * scale * clip
    record = generator.normal(size=length)
    record *= clip / np.linalg.norm(record)
    rounded = np.rint(total / grid.step) * grid.step
    neighbour = np.rint((total + record) / grid.step) * grid.step
    assert np.linalg.norm(rounded - total) <= 2.0**-10 * clip
    # With 2^-10 left for float32 rounding in the graph, the noise covers what a record can do.
    assert np.linalg.norm(neighbour - rounded) <= clip * (1 + SENSITIVITY_MARGIN / 2) * (1 + 1e-12)
    assert grid.sigma * grid.step >= clip * (1 + SENSITIVITY_MARGIN)


@given(seed=st.text(max_size=8), first=st.floats(-10, 10), second=st.floats(-10, 10))
@settings(max_examples=50, deadline=None)
def test_what_is_released_is_a_grid_point_and_its_noise_ignores_the_sum(seed: str, first: float, second: float) -> None:
    grid = NoisyGrid(0.5, 2.0, 20)
    one, other = np.full(20, first), np.full(20, second)
    released, again = grid.release(one, SeededEntropy(seed)), grid.release(other, SeededEntropy(seed))
    np.testing.assert_array_equal(released / grid.step, np.rint(released / grid.step))
    np.testing.assert_array_equal(
        released - np.rint(one / grid.step) * grid.step, again - np.rint(other / grid.step) * grid.step
    )


def test_without_noise_the_sum_is_released_as_it_is() -> None:
    total = np.array([0.1, -0.2])
    np.testing.assert_array_equal(NoisyGrid(1.0, 0.0, 2).release(total, SeededEntropy("")), total)


@pytest.mark.parametrize("total", [np.zeros(3), np.array([np.nan, 0.0]), np.array([np.inf, 0.0])])
def test_sums_of_another_length_or_without_end_are_refused(total: np.ndarray) -> None:
    with pytest.raises(LocalMisuseError, match="clipped_sum"):
        NoisyGrid(1.0, 1.0, 2).release(total, SeededEntropy(""))


@pytest.mark.parametrize("clip", [0.0, 5e-324, 1e-30, 1e-20, 0.99e-12, 1e30, math.inf, math.nan])
def test_clips_whose_norms_float32_cannot_hold_are_refused(clip: float) -> None:
    with pytest.raises(LocalMisuseError, match="l2_norm_clip"):
        NoisyGrid(clip, 1.0, 10)


def test_the_least_clip_is_the_one_that_graphs_are_held_to() -> None:
    assert NoisyGrid(1e-12, 1.0, 10).step > 0


@pytest.mark.parametrize("sigma", [1.0, 3.7, 512.0, 1023.9])
def test_the_guide_gives_what_a_search_of_the_table_gives(sigma: float) -> None:
    cumulative = _cumulative_weights(sigma)
    # Every boundary of the table and of the guide, one below and one above, and the ends.
    table = {int(c) + k for c in cumulative for k in (-1, 0, 1)}
    edges = table | {(i << 47) + k for i in range(1 << 16) for k in (-1, 0)}
    draws = np.array(sorted(edge for edge in edges if 0 <= edge < 1 << 63), np.int64)
    raw = (draws.astype(np.uint64) << np.uint64(1)).astype("<u8").tobytes()
    searched = np.minimum(np.searchsorted(cumulative, draws, side="right"), len(cumulative) - 1)
    drawn = _table_sample(sigma, len(draws), lambda count: raw[:count])
    np.testing.assert_array_equal(drawn, searched - (len(cumulative) - 1) // 2)
