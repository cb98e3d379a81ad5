"""The converted graph's clipped sums equal per-example automatic differentiation, and the check can tell."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fl_protocol.bundle import ModelBundle

pytestmark = pytest.mark.tensorflow
tf = pytest.importorskip("tensorflow")

import oracle_cases  # noqa: E402
from oracle_cases import model_cases, signature, single_example_graph  # noqa: E402

from models import check, steps  # noqa: E402
from models.convert import convert_signatures, input_tensors  # noqa: E402
from models.network import Network  # noqa: E402

TOLERANCE = 1e-5


def test_full_batches_match_autodiff(bundle: ModelBundle, model: str, runtime: str) -> None:
    runner = signature(bundle.graph, runtime, "train")
    assert check.worst_error(runner, model_cases(model, 32).values()) < TOLERANCE


def test_small_batches_match_autodiff(bundle: ModelBundle, model: str, runtime: str) -> None:
    runner = signature(bundle.graph, runtime, "train_few")
    assert check.worst_error(runner, model_cases(model, 8).values()) < TOLERANCE


def test_batches_of_one_match_autodiff(model: str, runtime: str) -> None:
    runner = signature(single_example_graph(model), runtime, "train")
    assert check.worst_error(runner, model_cases(model, 1).values()) < TOLERANCE


def clips_the_sum(network: Network, *, clip: Any, **batch: Any) -> dict[str, Any]:
    grad = steps.plain_step(network, **batch)["grad"]
    right = steps.clipped_step(network, clip=clip, **batch)
    return right | {"grad": grad * tf.minimum(1.0, clip / tf.norm(grad))}


def ignores_the_mask(network: Network, *, mask: Any, **rest: Any) -> dict[str, Any]:
    return steps.clipped_step(network, mask=tf.ones_like(mask), **rest)


def never_clips(network: Network, *, clip: Any, **batch: Any) -> dict[str, Any]:
    return steps.clipped_step(network, clip=clip * 1e6, **batch)


def rescales_short_gradients_too(network: Network, *, clip: Any, **batch: Any) -> dict[str, Any]:
    # min(1, c/‖g‖) forgotten: equal to clipping at a tiny norm and scaling up.
    tiny = clip * 1e-6
    right = steps.clipped_step(network, clip=tiny, **batch)
    return right | {"grad": right["grad"] * 1e6}


def clips_every_version_alone(network: Network, *, x: Any, y: Any, mask: Any, **rest: Any) -> dict[str, Any]:
    augmentation = network.spec.augmentation
    assert augmentation is not None
    with tf.init_scope():  # building a network reads the Keras weights, which a graph under construction cannot
        alone = Network(dataclasses.replace(network.spec, augmentation=None))
    versions, labels, quarter = augmentation.apply(x), tf.repeat(y, 4), tf.repeat(mask, 4) / 4
    grad = steps.clipped_step(alone, x=versions, y=labels, mask=quarter, **rest)["grad"]
    return steps.clipped_step(network, x=x, y=y, mask=mask, **rest) | {"grad": grad}


def poisons_the_sum(network: Network, *, clip: Any, mask: Any, **batch: Any) -> dict[str, Any]:
    # Padding dropped by a product: zero times NaN is NaN.
    right = steps.clipped_step(network, clip=clip, mask=mask, **batch)
    dropped = tf.reduce_sum(batch["x"] * tf.reshape(mask, [-1, 1, 1]))
    return right | {"grad": right["grad"] + 1e-20 * dropped}


@pytest.mark.parametrize(
    "broken",
    [
        clips_the_sum,
        ignores_the_mask,
        never_clips,
        rescales_short_gradients_too,
        clips_every_version_alone,
        poisons_the_sum,
    ],
)
def test_a_broken_graph_fails_the_same_check(broken: Callable[..., Any]) -> None:
    network = oracle_cases.network("watch_features")
    graph = convert_signatures({"train": (functools.partial(broken, network), input_tensors(network, batch_size=32))})
    runner = signature(graph, "litert", "train")
    # Far outside: versions of one window differ little, which brings the mildest of these to 8e-4.
    assert check.worst_error(runner, model_cases("watch_features", 32).values()) > 10 * TOLERANCE


def test_an_example_of_nan_counts_as_padding(bundle: ModelBundle, model: str, runtime: str) -> None:
    runner = signature(bundle.graph, runtime, "train")
    case = model_cases(model, 32)["full, half clipped"]
    bad, mask = case.inputs["x"].copy(), case.inputs["mask"].copy()
    bad[[0, 5]], mask[[0, 5]] = np.nan, 0
    want = runner(**case.inputs | {"mask": mask})
    got = runner(**case.inputs | {"x": bad})
    for name, values in want.items():
        assert np.isfinite(got[name]).all()
        np.testing.assert_array_equal(got[name], values, err_msg=name)


@pytest.mark.parametrize("poison", [np.inf, -np.inf, 3e38])
def test_an_extreme_example_counts_as_padding_or_is_clipped(
    bundle: ModelBundle, model: str, runtime: str, poison: float
) -> None:
    # A saturating function may make something finite of it; then it is an example like any other.
    runner = signature(bundle.graph, runtime, "train")
    case = model_cases(model, 32)["full, half clipped"]
    bad, mask = case.inputs["x"].copy(), case.inputs["mask"].copy()
    bad[[0, 5]], mask[[0, 5]] = poison, 0
    without = runner(**case.inputs | {"mask": mask})
    got = runner(**case.inputs | {"x": bad})
    assert all(np.isfinite(values).all() for values in got.values())
    counted = got["loss"][[0, 5]] != 0
    moved = np.linalg.norm((got["grad"] - without["grad"]).astype(np.float64))
    assert moved <= 1.001 * counted.sum() * case.inputs["clip"]


@pytest.mark.parametrize("size", [np.nan, np.inf, 1e20, 3e38])
def test_diverged_parameters_never_give_a_sum_beyond_the_clips(
    bundle: ModelBundle, model: str, runtime: str, size: float
) -> None:
    case = model_cases(model, 32)["full, all clipped"]
    params = np.sign(case.inputs["params"]) * np.float32(size)
    out = signature(bundle.graph, runtime, "train")(**case.inputs | {"params": params})
    assert np.isfinite(out["grad"]).all()
    assert np.linalg.norm(out["grad"]) <= 1.0001 * bundle.manifest.batch_size * case.inputs["clip"]


@pytest.mark.parametrize("clip", [0.0, 1e-12, np.inf])
def test_extreme_clips_are_well_defined(bundle: ModelBundle, model: str, runtime: str, clip: float) -> None:
    case = model_cases(model, 32)["full, none clipped"]
    out = signature(bundle.graph, runtime, "train")(**case.inputs | {"clip": np.float32(clip)})
    assert np.isfinite(out["grad"]).all()
    if clip == np.inf:
        np.testing.assert_array_equal(
            out["grad"], signature(bundle.graph, runtime, "train")(**case.inputs)["grad"], "none is clipped"
        )
    else:
        assert np.linalg.norm(out["grad"]) <= 1.0001 * bundle.manifest.batch_size * clip


def test_an_empty_batch_gives_exactly_zero(bundle: ModelBundle, model: str, runtime: str) -> None:
    case = model_cases(model, 32)["full, half clipped"]
    out = signature(bundle.graph, runtime, "train")(**case.inputs | {"mask": np.zeros_like(case.inputs["mask"])})
    assert not any(values.any() for values in out.values())
