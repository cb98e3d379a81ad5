"""`har_gru`: one strided convolution and a recurrent layer on raw motion windows, about 3.7k parameters.

Stride 4 leaves 32 recurrent steps at 12.5 Hz, well above the few hertz of human movement, and keeps the unrolled graph
short. On ten people a larger network of this kind does no better (docs/zoo.md); tanh keeps activations bounded, which
helps under DP-SGD (Papernot et al. 2021, arXiv 2007.14191).
"""

from __future__ import annotations

import math

import tensorflow as tf

from fl_protocol.model_manifest import LossSpec, TrainingDefaults
from models.specs import ModelSpec
from models.zoo.channel_scale import ChannelScale
from models.zoo.smartwatch import EXERCISES, RECORDINGS, WINDOW


def make_model() -> ModelSpec:
    """The model with its initial parameters."""
    layers, glorot = tf.keras.layers, tf.keras.initializers.GlorotUniform
    model = tf.keras.Sequential(
        [
            tf.keras.Input(WINDOW.shape),
            ChannelScale((1.0, 1.0, 1.0, math.pi, math.pi, math.pi), name="scale"),
            layers.Conv1D(
                16, 5, strides=4, padding="same", activation="tanh", kernel_initializer=glorot(seed=0), name="conv"
            ),
            layers.GRU(
                24,
                kernel_initializer=glorot(seed=1),
                recurrent_initializer=tf.keras.initializers.Orthogonal(seed=2),
                name="gru",
            ),
            layers.Dense(len(EXERCISES.names), kernel_initializer=glorot(seed=3), name="logits"),
        ],
        name="har_gru",
    )
    return ModelSpec(
        name="har_gru",
        description="Recognises movements from 2.56 s of a watch's or phone's accelerometer and gyroscope.",
        model=model,
        input=WINDOW,
        label=EXERCISES,
        loss=LossSpec("softmax_cross_entropy"),
        defaults=TrainingDefaults(learning_rate=0.5, l2_norm_clip=1.0, server_momentum=0.9),
        data=RECORDINGS,
    )
