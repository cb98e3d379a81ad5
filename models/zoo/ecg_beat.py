"""`ecg_beat`: the class of one heartbeat from a single-lead ECG, residual and one-dimensional, about 15k parameters.

Beats of 187 samples at 125 Hz and the five classes of AAMI EC57, as Kachuee et al. 2018 (arXiv 1805.00794) prepared the
MIT-BIH Arrhythmia Database; half the width and one block less than theirs, since noise under DP grows with the number
of parameters. Each beat is made zero-mean with unit variance in the graph.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from fl_protocol.model_manifest import InputSchema, LabelSchema, LossSpec, TrainingDefaults
from models.specs import ModelSpec

_BEAT = InputSchema(shape=(187, 1), channels=("ecg",), units=("mV",), sampling_rate_hz=125.0)
_CLASSES = ("normal", "supraventricular", "ventricular", "fusion", "unknown")


def make_model() -> ModelSpec:
    """The model with its initial parameters."""
    layers = tf.keras.layers
    inputs = x = tf.keras.Input(_BEAT.shape)
    x = layers.GroupNormalization(1, center=False, scale=False, epsilon=1e-5, name="per_beat")(x)
    x = layers.Conv1D(16, 5, padding="same", kernel_initializer=_glorot(0), name="conv")(x)
    for number in range(1, 5):
        x = _residual(number, x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(32, activation="relu", kernel_initializer=_glorot(100), name="hidden")(x)
    outputs = layers.Dense(len(_CLASSES), kernel_initializer=_glorot(101), name="logits")(x)
    return ModelSpec(
        name="ecg_beat",
        description="Tells five kinds of heartbeat apart on one ECG lead. Not a medical device.",
        model=tf.keras.Model(inputs, outputs, name="ecg_beat"),
        input=_BEAT,
        label=LabelSchema(kind="class", names=_CLASSES),
        loss=LossSpec("softmax_cross_entropy"),
        defaults=TrainingDefaults(learning_rate=0.2, l2_norm_clip=1.0, server_momentum=0.9),
        data="Meant for beats like those of the MIT-BIH Arrhythmia Database (47 people, ODC-BY 1.0); random start.",
    )


def _residual(number: int, x: Any) -> Any:
    """Two convolutions beside a shortcut, then pooling by 2."""
    layers = tf.keras.layers
    y = x
    for half, activation in (("a", "relu"), ("b", None)):
        seed = _glorot(10 * number + ord(half))
        y = layers.Conv1D(
            16, 5, padding="same", activation=activation, kernel_initializer=seed, name=f"conv{number}{half}"
        )(y)
    x = layers.Add(name=f"add{number}")([x, y])
    x = layers.Activation("relu", name=f"relu{number}")(x)
    return layers.MaxPooling1D(5, 2, name=f"pool{number}")(x)


def _glorot(seed: int) -> Any:
    return tf.keras.initializers.GlorotUniform(seed=seed)
