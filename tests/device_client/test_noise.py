"""The noisy grid: what rounding costs the sensitivity, and that what is released is a grid point."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client.noise import SENSITIVITY_MARGIN, NoisyGrid
from fl_protocol.errors import LocalMisuseError
from tests.virtual_fleet import SeededEntropy


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
