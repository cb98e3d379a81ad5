"""What cannot be trained is refused in one sentence that names the layer and says what would work."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.tensorflow
tf = pytest.importorskip("tensorflow")

from layer_models import layers, spec_of, stack  # noqa: E402

from fl_protocol.model_manifest import ClipGroup, InputSchema  # noqa: E402
from models.errors import ModelSpecError  # noqa: E402
from models.network import Network  # noqa: E402
from models.specs import ModelSpec  # noqa: E402
from models.zoo.channel_scale import ChannelScale  # noqa: E402


def refusal(spec: ModelSpec) -> str:
    with pytest.raises(ModelSpecError) as caught:
        Network(spec)
    return str(caught.value)


NAMED = "odd"
"""The layer that each refusal has to name."""

# By name: the input's shape, the layer, and words of the refusal.
SINGLE_LAYERS: dict[str, tuple[tuple[int, ...], Callable[..., Any], str]] = {
    "batch normalisation": ((6, 4), layers.BatchNormalization, "use GroupNormalization or LayerNormalization"),
    "a function": ((6, 4), lambda **name: layers.Lambda(tf.abs, **name), "register_layer"),
    "an unknown layer": ((6, 4), layers.LeakyReLU, "use one of Activation, Add"),
    "a mask": ((6, 4), layers.Masking, "cannot be trained"),
    "a simple recurrent layer": ((6, 4), lambda **name: layers.SimpleRNN(3, **name), "use GRU or LSTM"),
    "a model within": ((4,), lambda **name: tf.keras.Sequential([layers.Dense(3)], **name), "into the outer model"),
    "groups": ((6, 4), lambda **name: layers.Conv1D(4, 3, groups=2, **name), "groups=1"),
    "channels first": (
        (4, 6),
        lambda **name: layers.MaxPooling1D(2, data_format="channels_first", **name),
        "channels_l",
    ),
    "an unknown activation": ((4,), lambda **name: layers.Dense(3, activation="selu", **name), "selu is not supported"),
    "a leaking rectifier": ((4,), lambda **name: layers.ReLU(negative_slope=0.1, **name), "negative_slope=0.1"),
    "a rectifier's threshold": ((4,), lambda **name: layers.ReLU(threshold=1.0, **name), "threshold=1.0"),
    "a softmax over time": ((6, 4), lambda **name: layers.Softmax(axis=1, **name), "only the last axis"),
    "shared dropout": ((6, 4), lambda **name: layers.Dropout(0.1, noise_shape=(None, 1, 4), **name), "noise_shape"),
    "a scale per channel": ((6, 4), lambda **name: layers.Rescaling([1.0, 2.0, 3.0, 4.0], **name), "one number"),
    "normalised steps": ((6, 4), lambda **name: layers.LayerNormalization(axis=1, **name), "last axis"),
    "groups of steps": ((6, 4), lambda **name: layers.GroupNormalization(2, axis=1, **name), "only the last axis"),
    "masked ids": ((6,), lambda **name: layers.Embedding(9, 4, mask_zero=True, **name), "mask_zero=False"),
    "an older GRU": ((6, 4), lambda **name: layers.GRU(3, reset_after=False, **name), "use reset_after=True"),
    "a relu GRU": ((6, 4), lambda **name: layers.GRU(3, activation="relu", **name), "only tanh is supported"),
    "a hard LSTM": ((6, 4), lambda **name: layers.LSTM(3, recurrent_activation="hard_sigmoid", **name), "only sigmoid"),
    "backwards": ((6, 4), lambda **name: layers.LSTM(3, go_backwards=True, **name), "go_backwards=True"),
    "recurrent dropout": ((6, 4), lambda **name: layers.GRU(3, recurrent_dropout=0.1, **name), "recurrent_dropout=0.1"),
    "input dropout": ((6, 4), lambda **name: layers.LSTM(3, dropout=0.2, **name), "dropout=0.2"),
    "a regularizer": ((4,), lambda **name: layers.Dense(3, kernel_regularizer="l2", **name), "regularizers"),
    "a constraint": ((4,), lambda **name: layers.Dense(3, kernel_constraint="max_norm", **name), "constraints"),
    "a NaN weight": ((4,), lambda **name: layers.Dense(3, bias_initializer=_nan, **name), "NaN or infinite"),
}


def _nan(shape: Any, **_: Any) -> Any:
    return tf.fill(shape, np.float32("nan"))


@pytest.mark.parametrize("name", SINGLE_LAYERS)
def test_an_unsupported_layer_is_named_and_what_would_work(name: str) -> None:
    shape, make, words = SINGLE_LAYERS[name]
    text = refusal(spec_of(stack(shape, make(name=NAMED), layers.Flatten(), layers.Dense(3))))
    assert re.match(rf"Layer {NAMED}: ", text)
    assert words in text
    assert text.endswith(".")
    assert "\n" not in text


def functional(make: Callable[[Any], Any], *, shape: tuple[int | None, ...] = (6, 4)) -> Any:
    """A model with a trained layer before `make` and a head after it."""
    x = tf.keras.Input(shape)
    value = make(layers.Dense(4, name="before")(x))
    return tf.keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling1D()(value)))


def _state(x: Any) -> Any:
    return layers.GRU(4, name=NAMED, return_sequences=True)(x, initial_state=layers.GlobalMaxPooling1D()(x))


def _constant_state(x: Any) -> Any:
    return layers.GRU(4, name=NAMED, return_sequences=True)(x, initial_state=tf.ones((1, 4)))


def _twice(x: Any) -> Any:
    shared = layers.Dense(4, name=NAMED)
    return shared(shared(x))


GRAPHS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "shared weights": (_twice, "used more than once"),
    "an operator": (lambda x: x + 1.0, "keras.layers.Add for +"),
    "an index": (lambda x: x[:, 1:], "use a layer"),
    "an initial state": (_state, "initial state"),
    "a constant initial state": (_constant_state, "called with initial_state"),
    "dropout while predicting": (lambda x: layers.Dropout(0.1, name=NAMED)(x, training=True), "called with training"),
    "several outputs": (
        lambda x: layers.LSTM(4, return_sequences=True, return_state=True, name=NAMED)(x)[0],
        "3 outputs",
    ),
    "examples side by side": (lambda x: layers.Concatenate(axis=0, name=NAMED)([x, x]), "mixes examples"),
    "sums of two shapes": (lambda x: layers.Add(name=NAMED)([x, layers.Dense(1)(x)]), "inputs of one shape"),
    "a late fixed stage": (ChannelScale((1.0,) * 4, name=NAMED), "before the first trained layer"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_does_not_come_apart_is_refused_by_layer(name: str) -> None:
    make, words = GRAPHS[name]
    text = refusal(spec_of(functional(make)))
    assert text.startswith("Layer ")
    assert words in text
    if name not in ("an operator", "an index"):
        assert text.startswith(f"Layer {NAMED}: ")


class Written(tf.keras.Model):  # type: ignore[misc]
    """A model as a Python program."""

    def call(self, x: Any) -> Any:
        """Nothing."""
        return x


def test_only_a_graph_of_layers_with_one_input_and_static_shapes_is_taken() -> None:
    good = spec_of(stack((4,), layers.Dense(3)))

    def changed(model: Any) -> ModelSpec:
        return ModelSpec(**{field: getattr(good, field) for field in good.__dataclass_fields__} | {"model": model})

    x, y = tf.keras.Input((4,)), tf.keras.Input((4,))
    head = layers.Dense(3)
    assert "Sequential or functional model" in refusal(changed(Written()))
    assert "Sequential or functional model" in refusal(changed(tf.keras.Sequential([layers.Dense(3)])))
    assert "got 2 and 1" in refusal(changed(tf.keras.Model([x, y], head(layers.Add()([x, y])))))
    assert "got 1 and 2" in refusal(changed(tf.keras.Model(x, [head(x), layers.Dense(2)(x)])))
    assert "only the batch may be unknown" in refusal(changed(functional(layers.ReLU(), shape=(None, 4))))
    assert "the model takes (5,)" in refusal(changed(stack((5,), layers.Dense(3))))
    assert "no layer has parameters" in refusal(changed(stack((4,), layers.Dense(3, trainable=False))))
    narrow = InputSchema(shape=(4,), channels=("a",), units=("1",), sampling_rate_hz=0)
    assert "expected 4 channel names" in refusal(
        ModelSpec(**{field: getattr(good, field) for field in good.__dataclass_fields__} | {"input": narrow})
    )


@pytest.mark.parametrize(
    ("units", "options", "words"),
    [
        (2, {}, "end the model with Dense(3)"),
        (3, {"loss": "mean_squared_error"}, "use softmax_cross_entropy"),
        (3, {"loss": "softmax_cross_entropy", "kind": "binary"}, "use binary_cross_entropy"),
        (3, {"loss": "binary_cross_entropy"}, "does not fit a label of kind class"),
        (3, {"kind": "value"}, "use mean_squared_error or huber"),
        (3, {"loss": "hinge"}, "there is no loss 'hinge'"),
        (3, {"loss": "huber", "kind": "input", "names": ()}, "an autoencoder's last layer gives (3,)"),
    ],
)
def test_loss_label_and_outputs_have_to_fit(units: int, options: dict[str, Any], words: str) -> None:
    assert words in refusal(spec_of(stack((4,), layers.Dense(units)), **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm_clips": (ClipGroup(("first",), 1.0),)}, "each trained layer once: ['first', 'head']"),
        ({"norm_clips": (ClipGroup(("first", "head"), 0.6), ClipGroup(("head",), 0.8))}, "each trained layer once"),
        ({"norm_clips": (ClipGroup(("first",), 0.5), ClipGroup(("head",), 0.5))}, "add up to 0.5; expected 1"),
        ({"norm_clips": (ClipGroup(("first",), -0.6), ClipGroup(("head",), 0.8))}, "expected 1"),
        ({"personal_layers": ("hat",)}, "no trained layer 'hat' to be personal"),
        ({"personal_layers": ("first", "head")}, "every layer is personal"),
    ],
)
def test_clip_groups_and_personal_layers_name_trained_layers(options: dict[str, Any], words: str) -> None:
    model = stack((4,), layers.Dense(4, name="first"), layers.Dense(3, name="head"))
    assert words in refusal(spec_of(model, **options))
