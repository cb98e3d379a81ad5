"""The clip holds for finite examples that are made to break it: rows that nearly cancel, of any size (ADR 8)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.tensorflow
tf = pytest.importorskip("tensorflow")

from models import check  # noqa: E402
from models.convert import convert_network  # noqa: E402
from models.layers.dense import DenseLayer  # noqa: E402
from models.layers.gradients import keep_counted  # noqa: E402
from models.network import Network  # noqa: E402
from models.sources import Description, describe  # noqa: E402

layers = tf.keras.layers
SIZES = (1.0, 1e2, 1e3, 1e4, 1e6, 1e8, 1e12)


def model(kind: str) -> Any:
    inputs = tf.keras.Input((4, 64))
    first = {
        "dense": layers.Dense(64),
        "convolution": layers.Conv1D(64, 1),
        "wide convolution": layers.Conv1D(64, 2),
        "depthwise": layers.DepthwiseConv1D(2),
        "normalised": tf.keras.Sequential([layers.LayerNormalization(), layers.Dense(32)]),
        "recurrent": layers.GRU(48, return_sequences=True),
        "flat": layers.Reshape((1, 256)),
    }[kind]
    x = inputs
    for layer in getattr(first, "layers", [first]):
        x = layer(x)
    outputs = layers.Dense(3)(layers.GlobalAveragePooling1D()(x))
    made = tf.keras.Model(inputs, outputs, name="bound")
    made.compile(loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return made


def embedding_model() -> Any:
    inputs = tf.keras.Input((6,))
    x = layers.Dense(5)(layers.Flatten()(layers.Embedding(50, 32)(inputs)))
    made = tf.keras.Model(inputs, layers.Dense(3)(x), name="bound")
    made.compile(loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return made


@cache
def converted(kind: str) -> tuple[Network, bytes]:
    network = Network(describe(embedding_model() if kind == "embedding" else model(kind), Description()))
    return network, convert_network(network, batch_size=2)


def worst_length(network: Network, graph: bytes, runtime: str, *, size: float) -> float:
    """The largest clipped sum of one counted example, over draws, with clip 1; infinite if one is not finite."""
    runner, worst = check.interpreter(runtime, graph).get_signature_runner("train"), 0.0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x = np.zeros((2, 4, 64), np.float32)
        x[0, :2] = size * rng.standard_normal((2, 64))
        x[0, 2:] = -x[0, :2]
        x[0, 0] += max(1.0, 1e-4 * size) * rng.standard_normal(64)
        params = network.initial_parameters
        if network.spec.input.shape == (6,):
            # Equal ids whose gradients nearly cancel: the dense layer after them sees each place with its own weights.
            x = np.array([[7, 7, 7, 7, 3, 3], [0] * 6], np.float32)
            params = (size * rng.standard_normal(network.num_parameters)).astype(np.float32)
        out = runner(params=params, x=x, y=np.zeros(2, np.int32), mask=np.array([1, 0], np.float32), clip=np.float32(1))
        length = float(np.linalg.norm(out["grad"].astype(np.float64)))
        worst = max(worst, length if np.isfinite(length) else np.inf)
    return worst


KINDS = ("dense", "convolution", "wide convolution", "depthwise", "normalised", "recurrent", "flat", "embedding")


@pytest.mark.parametrize("kind", KINDS)
def test_no_finite_example_is_longer_than_the_clip(kind: str, runtime: str) -> None:
    for size in SIZES:
        # 2^-10 of the clip is the room that the devices' noise scale leaves for float32 in the graph.
        assert worst_length(*converted(kind), runtime, size=size) <= 1 + 2.0**-10, size


class GramOfManyRows:
    """The form that the design had: it cancels."""

    def __init__(self, rows: Any, gradient: Any, roles: tuple[str, ...]) -> None:
        self.roles, self._rows, self._gradient = roles, rows, gradient

    def squared_norms(self) -> Any:
        inputs = tf.matmul(self._rows, self._rows, transpose_b=True)
        outputs = tf.matmul(self._gradient, self._gradient, transpose_b=True)
        return tf.reduce_sum((inputs + 1.0) * outputs, [1, 2])

    def weighted_sum(self, factors: Any, counted: Any) -> tuple[Any, ...]:
        rows = keep_counted(counted, self._rows)
        rescaled = keep_counted(counted, self._gradient) * tf.reshape(factors, [-1, 1, 1])
        kernel = tf.reduce_sum(tf.matmul(rows, rescaled, transpose_a=True), 0)
        return tf.reshape(kernel, [-1]), tf.reduce_sum(rescaled, [0, 1])


def test_the_gram_form_of_many_rows_fails_the_same_check(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DenseLayer.backward

    def with_gram(self: DenseLayer, weights: Any, saved: Any, gradient: Any) -> Any:
        back, (form,) = right(self, weights, saved, gradient)
        return back, (GramOfManyRows(saved, gradient, form.roles) if saved.shape[1] > 1 else form,)

    monkeypatch.setattr(DenseLayer, "backward", with_gram)
    network = Network(describe(model("dense"), Description()))
    graph = convert_network(network, batch_size=2)
    assert max(worst_length(network, graph, "litert", size=size) for size in SIZES) > 1.05
