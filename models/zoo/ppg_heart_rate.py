"""`ppg_heart_rate`: heart rate from 8 s of a wrist's photoplethysmogram and accelerometer, about 22k parameters.

Window and channels are those of PPG-DaLiA (Reiss et al. 2019, doi 10.3390/s19143079) as Q-PPG prepares them (Burrello
et al. 2021, doi 10.1109/TBCAS.2021.3122017): both sensors at 32 Hz. The layout follows the dilated residual networks of
TimePPG (Burrello et al. 2022, arXiv 2203.16339) with group normalisation in place of batch normalisation. The first
layer makes each channel of each window zero-mean with unit variance, since a light sensor's counts have no unit.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from fl_protocol.model_manifest import InputSchema, LabelSchema, LossSpec, TrainingDefaults
from models.specs import ModelSpec

_WINDOW = InputSchema(
    shape=(256, 4), channels=("ppg", "ax", "ay", "az"), units=("counts", "g", "g", "g"), sampling_rate_hz=32.0
)
_CENTRE_BPM, _SPREAD_BPM = 90.0, 30.0
"""Round numbers for a heart rate and its range, not statistics of anybody's."""


def make_model() -> ModelSpec:
    """The model with its initial parameters."""
    layers = tf.keras.layers
    inputs = x = tf.keras.Input(_WINDOW.shape)
    x = layers.GroupNormalization(4, center=False, scale=False, epsilon=1e-5, name="per_channel")(x)
    for number, (filters, size) in enumerate(((16, 9), (24, 7), (32, 5)), 1):
        x = _block(f"conv{number}", x, filters, size, strides=2)
    for dilation in (2, 4):
        x = layers.Add(name=f"add{dilation}")([x, _block(f"dilated{dilation}", x, 32, 3, dilation_rate=dilation)])
    x = layers.AveragePooling1D(4, name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(32, activation="relu", kernel_initializer=_glorot("hidden"), name="hidden")(x)
    x = layers.Dense(1, kernel_initializer=_glorot("rate"), name="rate")(x)
    outputs = layers.Rescaling(_SPREAD_BPM, _CENTRE_BPM, name="bpm")(x)
    return ModelSpec(
        name="ppg_heart_rate",
        description="Heart rate from 8 s of a wrist's photoplethysmogram and accelerometer. Not a medical device.",
        model=tf.keras.Model(inputs, outputs, name="ppg_heart_rate"),
        input=_WINDOW,
        # ANSI/AAMI EC13 allows a heart rate meter the larger of 5 beats a minute and 10 %.
        label=LabelSchema(kind="value", names=("heart rate",), units=("1/min",), tolerance=5.0),
        loss=LossSpec("huber", delta=10.0),
        defaults=TrainingDefaults(learning_rate=0.02, l2_norm_clip=100.0, server_momentum=0.9),
        data="Meant for recordings like PPG-DaLiA (15 people, CC BY 4.0); starts from random parameters.",
    )


def _block(name: str, x: Any, filters: int, size: int, **options: Any) -> Any:
    """Convolution, group normalisation, rectifier."""
    layers = tf.keras.layers
    x = layers.Conv1D(filters, size, padding="same", kernel_initializer=_glorot(name), name=name, **options)(x)
    x = layers.GroupNormalization(4, name=f"{name}_norm")(x)
    return layers.Activation("relu", name=f"{name}_relu")(x)


def _glorot(name: str) -> Any:
    """An initializer whose numbers depend on the layer's name only."""
    return tf.keras.initializers.GlorotUniform(seed=int.from_bytes(name.encode()[:3], "big"))
