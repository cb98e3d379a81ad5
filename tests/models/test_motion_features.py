"""The features in the graph equal their definition in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fl_protocol.bundle import ModelBundle

pytestmark = pytest.mark.tensorflow
tf = pytest.importorskip("tensorflow")

from oracle_cases import signature  # noqa: E402

from models.zoo.rotations import TetrahedralRotations  # noqa: E402


def motion_features(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Features [54] of one window [128, 6], term by term in float64."""
    c = x / np.array([1, 1, 1, *[2 * np.pi] * 3])
    mean = c.mean(0)
    spread = np.sqrt(((c - mean) ** 2).mean(0) + 0.05**2)
    rate = 5 * np.abs(np.diff(c, axis=0)).mean(0)
    z = (c - mean) / spread
    lagged = [(z[10:, i] * z[:-10, j]).sum() / len(x) for i in range(6) for j in range(6)]
    f = np.concatenate([mean, np.log(spread / 0.3), np.log((rate + 0.05) / 0.3), lagged])
    return np.asarray(f / np.linalg.norm(f))


def windows(seed: int) -> NDArray[np.float32]:
    """Tilted gravity with swings of every size, from a watch at rest to a throw."""
    rng = np.random.default_rng(seed)
    t = np.arange(128)[None, :, None] / 50
    swing = np.sin(2 * np.pi * rng.uniform(0.2, 4, (32, 1, 6)) * t + rng.uniform(0, 6, (32, 1, 6)))
    size = 10 ** rng.uniform(-3, 1, (32, 1, 6))
    posture = np.concatenate([rng.uniform(-1, 1, (32, 1, 3)), np.zeros((32, 1, 3))], 2)
    return np.asarray(posture + size * (swing + 0.1 * rng.standard_normal((32, 128, 6))), np.float32)


@pytest.mark.parametrize("model", ["watch_features"])
def test_logits_are_those_of_the_numpy_features(bundle: ModelBundle, runtime: str) -> None:
    x = windows(1)
    params = np.random.default_rng(2).standard_normal(bundle.manifest.num_parameters).astype(np.float32)
    want = np.stack([motion_features(window) for window in x.astype(np.float64)]) @ params.reshape(54, 7)
    got = signature(bundle.graph, runtime, "infer")(params=params, x=x)["logits"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", ["watch_features"])
def test_a_watch_that_lies_still_has_finite_features(bundle: ModelBundle, runtime: str) -> None:
    params = np.ones(bundle.manifest.num_parameters, np.float32)
    for x in (np.zeros((32, 128, 6), np.float32), np.full((32, 128, 6), 1.0, np.float32)):
        assert np.isfinite(signature(bundle.graph, runtime, "infer")(params=params, x=x)["logits"]).all()


def test_the_rotations_turn_both_sensors_by_the_same_angle() -> None:
    rotations = TetrahedralRotations(15.0)
    for matrix in rotations.matrices():
        block = matrix[:3, :3]
        np.testing.assert_array_equal(matrix[3:, 3:], block)
        np.testing.assert_allclose(block @ block.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(block) == pytest.approx(1)
        assert np.trace(block) == pytest.approx(1 + 2 * np.cos(np.radians(15)))
    # No direction is preferred: the turns cancel to first order.
    np.testing.assert_allclose(sum(rotations.matrices()) / 4, np.eye(6), atol=0.03)


def test_the_versions_of_a_window_lie_side_by_side() -> None:
    x, rotations = windows(3), TetrahedralRotations(15.0)
    versions = rotations.apply(tf.constant(x)).numpy().reshape(len(x), 4, 128, 6)
    for copy, matrix in enumerate(rotations.matrices()):
        np.testing.assert_allclose(versions[:, copy], x @ matrix.T, rtol=0, atol=1e-4)
