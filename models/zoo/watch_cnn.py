"""`watch_cnn`: a small convolutional network on raw smartwatch windows, about 8.7k parameters."""

from __future__ import annotations

import math

import tensorflow as tf

from fl_protocol.model_manifest import LossSpec, TrainingDefaults
from models.specs import ModelSpec
from models.zoo.channel_scale import ChannelScale
from models.zoo.smartwatch import EXERCISES, RECORDINGS, WINDOW

# 1 g is what a watch at rest reads; half a turn a second (π rad/s) is a brisk arm movement.
_SCALE = (1.0, 1.0, 1.0, math.pi, math.pi, math.pi)


def make_model() -> ModelSpec:
    """The model with its initial parameters."""
    layers = tf.keras.layers
    seeds = (tf.keras.initializers.GlorotUniform(seed=seed) for seed in range(4))
    model = tf.keras.Sequential(
        [
            tf.keras.Input(WINDOW.shape),
            ChannelScale(_SCALE, name="scale"),
            layers.Conv1D(32, 5, activation="relu", kernel_initializer=next(seeds), name="conv1"),
            layers.MaxPooling1D(2, name="pool"),
            layers.Conv1D(32, 5, activation="relu", kernel_initializer=next(seeds), name="conv2"),
            layers.GlobalAveragePooling1D(name="mean"),
            layers.Dense(64, activation="relu", kernel_initializer=next(seeds), name="hidden"),
            layers.Dense(len(EXERCISES.names), kernel_initializer=next(seeds), name="logits"),
        ],
        name="watch_cnn",
    )
    return ModelSpec(
        name="watch_cnn",
        description="Recognises shoulder exercises from 2.56 s of a smartwatch's accelerometer and gyroscope.",
        model=model,
        input=WINDOW,
        label=EXERCISES,
        loss=LossSpec("softmax_cross_entropy"),
        defaults=TrainingDefaults(learning_rate=0.3, l2_norm_clip=1.0, server_momentum=0.9),
        data=RECORDINGS,
    )
