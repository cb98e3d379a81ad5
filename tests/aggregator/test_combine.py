"""The mean, the server's step, and models that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.combine import GlobalModel, ServerOptimiser, apply, average_models, mean_update
from aggregator.errors import CombineError

LENGTH = 50


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40), scale=st.floats(1e-3, 1e3))
@settings(max_examples=100, deadline=None)
def test_the_mean_does_not_depend_on_the_order(seed: int, count: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    updates = (scale * generator.normal(size=(count, LENGTH))).astype(np.float32)
    mean, counted = mean_update(iter(updates), LENGTH)
    shuffled, _ = mean_update(iter(generator.permutation(updates)), LENGTH)
    assert counted == count
    np.testing.assert_allclose(mean, shuffled, rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(mean, updates.astype(np.float64).mean(axis=0), rtol=0, atol=1e-12 * scale)
    again, _ = mean_update(iter(updates), LENGTH)
    assert again.tobytes() == mean.tobytes()


def test_momentum_follows_its_recursion() -> None:
    generator = np.random.default_rng(1)
    model = GlobalModel(np.zeros(LENGTH, np.float32), np.zeros(LENGTH, np.float32))
    params, velocity = np.zeros(LENGTH), np.zeros(LENGTH)
    for _ in range(10):
        mean = generator.normal(size=LENGTH)
        model = apply(model, mean, ServerOptimiser(learning_rate=0.3, momentum=0.9))
        velocity = 0.9 * velocity + mean
        params = params + 0.3 * velocity
    np.testing.assert_allclose(model.velocity, velocity, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.params, params, rtol=1e-5, atol=1e-5)


def test_without_momentum_it_is_plain_averaging() -> None:
    model = GlobalModel(np.ones(LENGTH, np.float32), np.full(LENGTH, 7.0, np.float32))
    stepped = apply(model, np.full(LENGTH, 0.5), ServerOptimiser())
    np.testing.assert_array_equal(stepped.params, np.full(LENGTH, 1.5, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_a_model_that_is_not_finite_is_an_error(value: float) -> None:
    model = GlobalModel(np.zeros(LENGTH, np.float32), np.zeros(LENGTH, np.float32))
    with pytest.raises(CombineError, match="not finite"), np.errstate(all="ignore"):
        apply(model, np.full(LENGTH, value), ServerOptimiser())


def test_nothing_cannot_be_combined() -> None:
    with pytest.raises(CombineError, match="no updates"):
        mean_update(iter([]), LENGTH)
    with pytest.raises(CombineError, match="no models"):
        average_models(iter([]))


def test_models_are_averaged_and_the_last_velocity_kept() -> None:
    models = [GlobalModel(np.full(3, n, np.float32), np.full(3, -n, np.float32)) for n in (1.0, 2.0, 6.0)]
    average = average_models(iter(models))
    np.testing.assert_array_equal(average.params, np.full(3, 3.0, np.float32))
    np.testing.assert_array_equal(average.velocity, np.full(3, -6.0, np.float32))
    alone = average_models(iter(models[2:]))
    assert alone.params.tobytes() == models[2].params.tobytes()
