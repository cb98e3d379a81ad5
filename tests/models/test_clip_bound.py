"""The clip holds for what is made to break it: rows that nearly cancel, and the ends of float32 (ADR 8)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.tensorflow
tf = pytest.importorskip("tensorflow")

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: E402
from oracle_cases import network as catalogue_network  # noqa: E402

from fl_protocol.bundle import ModelBundle  # noqa: E402
from fl_protocol.model_manifest import ClipGroup  # noqa: E402
from models import catalog, check  # noqa: E402
from models.build import build_bundle  # noqa: E402
from models.convert import convert_network, convert_signatures, training_rows  # noqa: E402
from models.errors import ConversionError  # noqa: E402
from models.hostile import LARGEST_CONTRIBUTION, hostile_probes, worst_contribution  # noqa: E402
from models.layers import gradients  # noqa: E402
from models.layers.dense import DenseLayer  # noqa: E402
from models.layers.gradients import keep_counted, total_of_squares  # noqa: E402
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


CLIPS = (1e-12, 0.05, 0.5, 1e3)
GAPS = tuple(np.arange(34.0, 54.0, 1.0))


def longest(network: Network, graph: bytes, runtime: str, *, batch_size: int = 2, draws: int = 40) -> float:
    return max(
        worst_contribution(
            graph,
            runtime,
            hostile_probes(network, batch_size=rows, gaps=GAPS, draws=draws),
            clips=CLIPS,
            signature=signature,
        )
        for signature, rows in training_rows(batch_size).items()
    )


def test_no_hostile_parameters_let_a_record_pass_the_clip_of_a_committed_bundle(
    bundle: ModelBundle, model: str, runtime: str
) -> None:
    batch_size = bundle.manifest.batch_size
    assert longest(catalogue_network(model), bundle.graph, runtime, batch_size=batch_size) <= LARGEST_CONTRIBUTION


@pytest.mark.parametrize("kind", KINDS)
def test_no_hostile_parameters_let_a_record_pass_the_clip_of_any_layer(kind: str, runtime: str) -> None:
    assert longest(*converted(kind), runtime) <= LARGEST_CONTRIBUTION


def chain(*, loss: Any = None, classes: int = 3) -> Any:
    """Frozen, then two layers whose examples have one row: Gram norms, and no function that bounds what they see."""
    inputs = tf.keras.Input((8,))
    x = layers.Dense(16, name="fixed", trainable=False)(inputs)
    x = layers.Dense(16, activation="relu", name="shared")(x)
    outputs = layers.Dense(classes, name="own")(x)
    made = tf.keras.Model(inputs, outputs, name="bound")
    made.compile(loss=loss or tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return made


PLAIN = Description()
GROUPS = Description(personal_layers=("own",), norm_clips=(ClipGroup(("shared",), 0.8), ClipGroup(("own",), 0.6)))
VALUES = {"loss": tf.keras.losses.MeanSquaredError(), "classes": 2}
BINARY = {"loss": tf.keras.losses.BinaryCrossentropy(from_logits=True), "classes": 2}


@pytest.mark.parametrize(("made", "said"), [({}, PLAIN), ({}, GROUPS), (VALUES, PLAIN), (BINARY, PLAIN)])
def test_frozen_personal_and_grouped_layers_and_every_loss_hold_the_clip(
    made: dict[str, Any], said: Description, runtime: str
) -> None:
    network = Network(describe(chain(**made), said))
    assert longest(network, convert_network(network, batch_size=2), runtime) <= LARGEST_CONTRIBUTION


def as_before(form: Any) -> Any:
    """The Gram norm that was shipped once: a factor that saturates or vanishes takes the other with it."""
    rows, gradient = form._rows, form._output_gradient
    return tf.reduce_sum(gradient * gradient, [1, 2]) * (tf.reduce_sum(rows * rows, [1, 2]) + 1.0)


def without_saturation(form: Any) -> Any:
    return total_of_squares(form._output_gradient**2) * (total_of_squares(form._rows**2) + 1.0)


BROKEN = [(as_before, "litert"), (as_before, "tflite-runtime"), (without_saturation, "tflite-runtime")]


@pytest.mark.parametrize("made", [{}, VALUES, BINARY])
@pytest.mark.parametrize(("broken", "where"), BROKEN)
def test_a_gram_norm_with_a_hole_lets_a_record_pass(
    broken: Any, where: str, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients._Gram, "squared_norms", broken)
    network = Network(describe(chain(**made), PLAIN))
    assert longest(network, convert_network(network, batch_size=2), where, draws=0) > 10


@pytest.mark.parametrize("broken", [as_before, without_saturation])
def test_a_graph_with_such_a_hole_is_not_signed(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients._Gram, "squared_norms", broken)
    with pytest.raises(ConversionError, match="one record can contribute"):
        build_bundle(catalog.load("watch_cnn"), publisher_key=Ed25519PrivateKey.generate(), batch_size=2)


def total_error(total: Any, shape: tuple[int, ...], runtime: str) -> float:
    """How far below the true sum one of decreasing squares comes out, relative: the worst order for adding up."""
    graph = convert_signatures(
        {"total": (lambda squares: {"sum": total(squares)}, {"squares": tf.TensorSpec(shape, tf.float32, "squares")})}
    )
    squares = np.full(shape, 2.0**-25.2, np.float32)
    squares.reshape(shape[0], -1)[:, 0] = 1
    got = check.interpreter(runtime, graph).get_signature_runner("total")(squares=squares)["sum"]
    return float((1 - got / squares.astype(np.float64).reshape(shape[0], -1).sum(1)).max())


@pytest.mark.parametrize("shape", [(2, 2**14), (2, 127, 129), (2, 1000, 1021), (2, 1, 2**20 + 5)])
def test_a_sum_of_many_squares_loses_little_in_the_worst_order(shape: tuple[int, ...], runtime: str) -> None:
    # Half of it is the norm's, and 2^-10 is the room there.
    assert total_error(total_of_squares, shape, runtime) <= 2.0**-10


def test_adding_them_one_after_the_other_loses_more() -> None:
    assert total_error(lambda squares: tf.reduce_sum(squares, 1), (2, 2**20), "tflite-runtime") > 2.0**-6


def test_squares_that_vanish_count_as_the_least_that_does_not(runtime: str) -> None:
    graph = convert_signatures(
        {
            "total": (
                lambda x: {"sum": total_of_squares(x * x)},
                {"x": tf.TensorSpec((2, 3, 5), tf.float32, "x")},
            )
        }
    )
    x = np.full((2, 3, 5), 1e-19, np.float32)
    got = check.interpreter(runtime, graph).get_signature_runner("total")(x=x)["sum"]
    assert (got >= (x.astype(np.float64) ** 2).sum((1, 2))).all()
    assert not np.isfinite(check.interpreter(runtime, graph).get_signature_runner("total")(x=x * np.nan)["sum"]).any()
