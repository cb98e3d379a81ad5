"""Small models that between them hold every registered Keras layer, with the options that change its arithmetic.

Options of one family stand side by side in one model: each branch reads the output of a trained layer, so that its
input gradient counts too, and all end in one Dense head. Converting a model takes a second or two, so they share it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from fl_protocol.model_manifest import (
    ClipGroup,
    InputSchema,
    LabelKind,
    LabelSchema,
    LossName,
    LossSpec,
    TrainingDefaults,
)
from models.specs import Augmentation, ModelSpec
from models.zoo.channel_scale import ChannelScale
from models.zoo.rotations import TetrahedralRotations

layers = tf.keras.layers

Chain = Sequence[Any]
"""Keras layers that run one after the other."""

NAMES = ("p", "q", "r")


def spec_of(
    model: Any,
    *,
    loss: LossName = "softmax_cross_entropy",
    kind: LabelKind = "class",
    names: tuple[str, ...] = NAMES,
    **rest: Any,
) -> ModelSpec:
    """The specification of a Keras model; three classes unless told otherwise."""
    shape = tuple(model.input_shape[1:])
    return ModelSpec(
        name="small",
        description="for tests",
        model=model,
        input=InputSchema(
            shape=shape,
            channels=tuple(f"c{i}" for i in range(shape[-1])),
            units=("1",) * shape[-1],
            sampling_rate_hz=50.0,
        ),
        label=LabelSchema(kind=kind, names=names, tolerance=1.0),
        loss=LossSpec(loss, delta=0.7),
        defaults=TrainingDefaults(learning_rate=1.0, l2_norm_clip=1.0, server_momentum=0.0),
        **rest,
    )


def stack(shape: tuple[int, ...], *chain: Any, dtype: str = "float32") -> Any:
    """A Sequential model."""
    return tf.keras.Sequential([tf.keras.Input(shape, dtype=dtype), *chain])


def branches(shape: tuple[int, ...], *chains: Chain, units: int = 4, flat: bool = True) -> Any:
    """A trained layer, then several chains of layers that all read it, then a head of three outputs."""
    x = tf.keras.Input(shape)
    before = layers.Dense(units, name="before")(x)
    ends = [functools.reduce(lambda value, layer: layer(value), chain, before) for chain in chains]
    ends = [layers.Flatten()(end) for end in ends] if flat else ends
    return tf.keras.Model(x, layers.Dense(3, name="head")(layers.Concatenate()(ends)))


def convolutions_1d() -> ModelSpec:
    conv = layers.Conv1D
    return spec_of(
        branches(
            (11, 4),
            [conv(3, 3)],
            [conv(2, 3, strides=2, padding="same", activation="relu")],
            [conv(2, 2, padding="causal", dilation_rate=2, use_bias=False)],
            [conv(3, 4, strides=3, activation="tanh")],
            [conv(2, 3, padding="same", dilation_rate=2)],
            [conv(2, 2, strides=3)],
            [conv(2, 3, strides=2, padding="causal")],
            [conv(5, 1)],
        )
    )


def convolutions_2d() -> ModelSpec:
    conv = layers.Conv2D
    return spec_of(
        branches(
            (6, 5, 2),
            [conv(2, 3)],
            [conv(2, 3, strides=2, padding="same", activation="relu")],
            [conv(3, (1, 3), strides=(2, 1), use_bias=False)],
            [conv(2, 2, padding="same", dilation_rate=2)],
            [conv(2, (4, 2), strides=(1, 3))],
            units=3,
        )
    )


def depthwise_1d() -> ModelSpec:
    depthwise, separable = layers.DepthwiseConv1D, layers.SeparableConv1D
    return spec_of(
        branches(
            (9, 4),
            [depthwise(3)],
            [depthwise(3, strides=2, padding="same", depth_multiplier=2, activation="relu")],
            [depthwise(2, dilation_rate=2, use_bias=False)],
            [separable(5, 3, depth_multiplier=2, activation="tanh")],
            [separable(3, 3, strides=2, padding="same", use_bias=False)],
            [separable(2, 2, padding="causal")],
            units=3,
        )
    )


def depthwise_2d() -> ModelSpec:
    depthwise, separable = layers.DepthwiseConv2D, layers.SeparableConv2D
    return spec_of(
        branches(
            (5, 6, 2),
            [depthwise(3)],
            [depthwise((2, 3), strides=2, padding="same", depth_multiplier=2, activation="relu")],
            [depthwise(2, dilation_rate=2, use_bias=False)],
            [separable(4, 3, depth_multiplier=2)],
            [separable(3, 2, strides=2, padding="same", use_bias=False)],
            units=2,
        )
    )


def pooling_1d() -> ModelSpec:
    return spec_of(
        branches(
            (9, 4),
            [layers.MaxPooling1D(2)],
            [layers.MaxPooling1D(3, strides=2)],
            [layers.MaxPooling1D(3, strides=1, padding="same")],
            [layers.MaxPooling1D(2, strides=4)],
            [layers.AveragePooling1D(2)],
            [layers.AveragePooling1D(3, strides=2, padding="same")],
            [layers.AveragePooling1D(4, strides=1, padding="same")],
            [layers.GlobalAveragePooling1D()],
            [layers.GlobalAveragePooling1D(keepdims=True)],
            [layers.GlobalMaxPooling1D()],
            [layers.GlobalMaxPooling1D(keepdims=True)],
        )
    )


def pooling_2d() -> ModelSpec:
    return spec_of(
        branches(
            (5, 6, 2),
            [layers.MaxPooling2D(2)],
            [layers.MaxPooling2D(3, strides=2, padding="same")],
            [layers.MaxPooling2D((2, 3), strides=(1, 2))],
            [layers.AveragePooling2D(2)],
            [layers.AveragePooling2D(3, strides=2, padding="same")],
            [layers.GlobalAveragePooling2D()],
            [layers.GlobalAveragePooling2D(keepdims=True)],
            [layers.GlobalMaxPooling2D()],
            [layers.GlobalMaxPooling2D(keepdims=True)],
            units=3,
        )
    )


def activations() -> ModelSpec:
    named = ("relu", "relu6", "tanh", "sigmoid", "softmax", "gelu", "linear")
    return spec_of(
        branches(
            (3, 5),
            *([layers.Activation(name)] for name in named),
            [layers.ReLU()],
            [layers.Rescaling(9.0), layers.ReLU(max_value=6.0)],
            [layers.Softmax()],
            [layers.Dense(6, activation="gelu")],
            [layers.Dense(3, activation="softmax"), layers.Dense(3)],
        )
    )


def dense_layers() -> ModelSpec:
    return spec_of(
        branches(
            (2, 3, 4),
            [layers.Dense(5, use_bias=False)],
            [layers.Dense(40), layers.Dense(30), layers.Dense(2)],
            [layers.Flatten(), layers.Dense(6, activation="tanh")],
        )
    )


def merges() -> ModelSpec:
    x = tf.keras.Input((4, 6))
    first = layers.Dense(6, name="first")(x)
    second = layers.Dense(6, activation="tanh", name="second")(first)
    doubled = layers.Add()([second, second])
    three = layers.Add()([first, second, doubled])
    wide = layers.Concatenate()([three, x])
    long = layers.Concatenate(axis=1)([doubled, layers.Dense(6, name="third")(wide), x])
    reshaped = layers.Reshape((6, -1, 3))(layers.Rescaling(0.5, offset=-0.25)(long))
    return spec_of(tf.keras.Model(x, layers.Dense(3, name="head")(layers.Flatten()(reshaped))))


def frozen_in_the_middle() -> ModelSpec:
    chain = [
        layers.Conv1D(4, 3, name="first"),
        layers.Conv1D(5, 2, activation="tanh", trainable=False, name="frozen"),
        layers.LayerNormalization(trainable=False, name="frozen_scale"),
        layers.GRU(4, trainable=False, name="frozen_state"),
        layers.Dense(3, name="head"),
    ]
    return spec_of(stack((7, 6), *chain))


def dropout() -> ModelSpec:
    chain = [
        layers.Dense(5, activation="tanh"),
        layers.Dropout(0.3),
        layers.Flatten(),
        layers.Dense(8, activation="relu"),
        layers.Dropout(0.5),
        layers.Dense(3),
    ]
    return spec_of(stack((4, 6), *chain), augmentation=TetrahedralRotations(20.0))


def gru() -> ModelSpec:
    return spec_of(
        branches(
            (5, 4),
            [layers.GRU(4)],
            [layers.GRU(3, use_bias=False, unroll=True)],
            [layers.GRU(3, return_sequences=True), layers.GRU(2, return_sequences=True, use_bias=False)],
        )
    )


def lstm() -> ModelSpec:
    return spec_of(
        branches(
            (5, 4),
            [layers.LSTM(4)],
            [layers.LSTM(3, use_bias=False, unroll=True)],
            [layers.LSTM(3, return_sequences=True), layers.LSTM(2, return_sequences=True, use_bias=False)],
        )
    )


def one_time_step() -> ModelSpec:
    return spec_of(branches((1, 4), [layers.GRU(3)], [layers.GRU(2, use_bias=False)], [layers.LSTM(3)]))


def long_memory() -> ModelSpec:
    return spec_of(stack((3, 6), layers.GRU(24), layers.Reshape((3, 8)), layers.LSTM(20), layers.Dense(3)))


def embedding_of_many() -> ModelSpec:
    return spec_of(stack((2, 3), layers.Embedding(60, 5), layers.Flatten(), layers.Dense(3)))


def embedding_of_few() -> ModelSpec:
    # 8 places and 6 ids: every example looks a row up twice.
    chain = [layers.Embedding(6, 4), layers.Conv1D(3, 3), layers.GlobalMaxPooling1D(), layers.Dense(3)]
    return spec_of(stack((8,), *chain, dtype="int32"))


def embeddings_of_one_place() -> ModelSpec:
    x = tf.keras.Input((1,), dtype="int32")
    ends = [layers.Flatten()(layers.Embedding(30, units)(x)) for units in (4, 5)]
    return spec_of(tf.keras.Model(x, layers.Dense(3)(layers.Concatenate()(ends))))


def normalisation_1d() -> ModelSpec:
    return spec_of(
        branches(
            (5, 3),
            [layers.LayerNormalization()],
            [layers.LayerNormalization(center=False, epsilon=0.1)],
            [layers.LayerNormalization(axis=[1, 2], scale=False)],
            [layers.LayerNormalization(axis=[1, 2], center=False, scale=False)],
            [layers.Flatten(), layers.LayerNormalization()],
            [layers.GroupNormalization(2)],
            [layers.GroupNormalization(1, center=False)],
            [layers.GroupNormalization(-1, scale=False)],
            [layers.Flatten(), layers.GroupNormalization(5)],
        )
    )


def normalisation_2d() -> ModelSpec:
    return spec_of(
        branches(
            (3, 4, 2),
            [layers.LayerNormalization()],
            [layers.LayerNormalization(axis=[-2, -1])],
            [layers.LayerNormalization(axis=[1, 2, 3])],
            [layers.GroupNormalization(2, axis=3)],
            [layers.GroupNormalization(-1, center=False, scale=False)],
        )
    )


def rectifier_before_maximum() -> ModelSpec:
    # Swapped in the first place, not in the second, where the rectifier's output is read again.
    x = tf.keras.Input((12, 3))
    swapped = layers.MaxPooling1D(2)(layers.Conv1D(6, 3, activation="relu")(x))
    shared = layers.ReLU()(layers.Conv1D(6, 3, padding="same")(swapped))
    ends = [layers.MaxPooling1D(3, strides=2, padding="same")(shared), layers.AveragePooling1D(2)(shared)]
    return spec_of(tf.keras.Model(x, layers.Dense(3)(layers.Concatenate()([layers.Flatten()(end) for end in ends]))))


def versions_of_an_example() -> ModelSpec:
    """Every form of parameter gradient with four augmented copies of each example."""
    model = branches(
        (7, 6),
        [layers.Conv1D(4, 3, activation="relu")],
        [layers.DepthwiseConv1D(3), layers.LayerNormalization()],
        [layers.GRU(3)],
        [layers.LSTM(3)],
        [layers.GroupNormalization(2), layers.SeparableConv1D(3, 2)],
        [layers.Flatten(), layers.Dense(40)],
    )
    return spec_of(model, augmentation=TetrahedralRotations(20.0))


class Shifted:
    """Augmentation of ids: the sentence itself, and one place further on."""

    description, copies = "the ids, and the ids shifted by one place.", 2

    def apply(self, x: tf.Tensor) -> tf.Tensor:
        """[N, T] to [N·2, T]."""
        first, rest = tf.split(x, [1, x.shape[1] - 1], 1)
        return tf.reshape(tf.stack([x, tf.concat([rest, first], 1)], 1), [-1, x.shape[1]])


def versions_of_a_sentence() -> ModelSpec:
    augmentation: Augmentation = Shifted()
    chain = [layers.Embedding(90, 4), layers.Flatten(), layers.Dense(3)]
    return spec_of(stack((3,), *chain), augmentation=augmentation)


def groups_and_personal_layers() -> ModelSpec:
    chain = [
        layers.Conv1D(4, 3, name="first"),
        layers.SeparableConv1D(4, 2, activation="tanh", name="both"),
        layers.LayerNormalization(name="own"),
        layers.Flatten(),
        layers.Dense(6, activation="tanh", name="frozen", trainable=False),
        layers.Dense(5, name="middle"),
        layers.Dense(3, name="head"),
    ]
    return spec_of(
        stack((7, 3), *chain),
        personal_layers=("own", "first"),
        norm_clips=(ClipGroup(("head", "own"), 0.6), ClipGroup(("first", "both", "middle"), 0.8)),
    )


def probabilities() -> ModelSpec:
    return spec_of(stack((5,), layers.Dense(6, activation="tanh"), layers.Dense(3, activation="softmax")))


def _hidden() -> Any:
    return layers.Dense(6, activation="tanh")


def one_binary_label() -> ModelSpec:
    model = stack((5,), _hidden(), layers.Dense(1, activation="sigmoid"))
    return spec_of(model, loss="binary_cross_entropy", kind="binary", names=("on",))


def binary_labels() -> ModelSpec:
    return spec_of(stack((5,), _hidden(), layers.Dense(3)), loss="binary_cross_entropy", kind="binary")


def values_squared() -> ModelSpec:
    return spec_of(stack((5,), _hidden(), layers.Dense(3)), loss="mean_squared_error", kind="value")


def values_huber() -> ModelSpec:
    model = stack((6, 6), layers.Flatten(), _hidden(), layers.Dense(2))
    return spec_of(model, loss="huber", kind="value", names=("x", "y"), augmentation=TetrahedralRotations(10.0))


def autoencoder() -> ModelSpec:
    chain = [ChannelScale((2.0, 0.5, 1.0)), layers.Conv1D(2, 3, padding="same"), layers.Dense(3)]
    return spec_of(stack((5, 3), *chain), loss="mean_squared_error", kind="input", names=())


def huber_autoencoder() -> ModelSpec:
    return spec_of(stack((5,), _hidden(), layers.Dense(5)), loss="huber", kind="input", names=())


MODELS: dict[str, Callable[[], ModelSpec]] = {
    make.__name__: make
    for make in (
        convolutions_1d,
        convolutions_2d,
        depthwise_1d,
        depthwise_2d,
        pooling_1d,
        pooling_2d,
        activations,
        dense_layers,
        merges,
        frozen_in_the_middle,
        dropout,
        gru,
        lstm,
        one_time_step,
        long_memory,
        embedding_of_many,
        embedding_of_few,
        embeddings_of_one_place,
        normalisation_1d,
        normalisation_2d,
        rectifier_before_maximum,
        versions_of_an_example,
        versions_of_a_sentence,
        groups_and_personal_layers,
        probabilities,
        one_binary_label,
        binary_labels,
        values_squared,
        values_huber,
        autoencoder,
        huber_autoencoder,
    )
}
