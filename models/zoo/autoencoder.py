"""`autoencoder`: how unlike the usual a movement is, from its own reconstruction error, about 26k parameters.

A bottleneck of 8 numbers for 2.56 s of acceleration. The score of a window is its mean squared reconstruction error,
and
a threshold belongs to the wearer: a high percentile of the errors of their own recent windows, kept on the device (a
threshold computed from recordings and sent away would be a release without privacy). The input stays in g, because an
unusual strength of movement is part of what is unusual.
"""

from __future__ import annotations

import tensorflow as tf

from fl_protocol.model_manifest import InputSchema, LabelSchema, LossSpec, TrainingDefaults
from models.specs import ModelSpec

_WINDOW = InputSchema(shape=(64, 3), channels=("ax", "ay", "az"), units=("g", "g", "g"), sampling_rate_hz=25.0)


def make_model() -> ModelSpec:
    """The model with its initial parameters."""
    layers, glorot = tf.keras.layers, tf.keras.initializers.GlorotUniform
    samples, channels = _WINDOW.shape
    model = tf.keras.Sequential(
        [
            tf.keras.Input(_WINDOW.shape),
            layers.Flatten(name="flatten"),
            layers.Dense(64, activation="tanh", kernel_initializer=glorot(seed=0), name="encoder"),
            layers.Dense(8, activation="tanh", kernel_initializer=glorot(seed=1), name="code"),
            layers.Dense(64, activation="tanh", kernel_initializer=glorot(seed=2), name="decoder"),
            layers.Dense(samples * channels, kernel_initializer=glorot(seed=3), name="samples"),
            layers.Reshape((samples, channels), name="window"),
        ],
        name="autoencoder",
    )
    return ModelSpec(
        name="autoencoder",
        description="Reconstructs 2.56 s of acceleration; a window that it reconstructs badly is unusual.",
        model=model,
        input=_WINDOW,
        label=LabelSchema(kind="input", tolerance=0.5),
        loss=LossSpec("mean_squared_error"),
        defaults=TrainingDefaults(learning_rate=0.5, l2_norm_clip=0.5, server_momentum=0.9),
        data="Any accelerometer at 25 Hz, such as every second sample of seglearn's (BSD-3-Clause); random start.",
    )
