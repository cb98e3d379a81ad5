"""`image_cnn`: a small network on 28x28 grey images for comparison with published results, about 26k parameters.

The layout of Papernot et al. 2021 (arXiv 2007.14191), whose tanh keeps gradients bounded, in the sizes of Tramèr &
Boneh 2021 (arXiv 2011.11660); TensorFlow's ``same`` padding makes the first layer 14x14 where theirs is 13x13.
"""

from __future__ import annotations

import tensorflow as tf

from fl_protocol.model_manifest import InputSchema, LabelSchema, LossSpec, TrainingDefaults
from models.specs import ModelSpec

_IMAGE = InputSchema(shape=(28, 28, 1), channels=("grey",), units=("1/255",), sampling_rate_hz=0.0)
_CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


def make_model() -> ModelSpec:
    """The model with its initial parameters."""
    layers, glorot = tf.keras.layers, tf.keras.initializers.GlorotUniform
    model = tf.keras.Sequential(
        [
            tf.keras.Input(_IMAGE.shape),
            layers.Rescaling(1.0 / 255.0, name="scale"),
            layers.Conv2D(
                16, 8, strides=2, padding="same", activation="tanh", kernel_initializer=glorot(seed=0), name="conv1"
            ),
            layers.MaxPooling2D(2, 1, name="pool1"),
            layers.Conv2D(32, 4, strides=2, activation="tanh", kernel_initializer=glorot(seed=1), name="conv2"),
            layers.MaxPooling2D(2, 1, name="pool2"),
            layers.Flatten(name="flatten"),
            layers.Dense(32, activation="tanh", kernel_initializer=glorot(seed=2), name="hidden"),
            layers.Dense(len(_CLASSES), kernel_initializer=glorot(seed=3), name="logits"),
        ],
        name="image_cnn",
    )
    return ModelSpec(
        name="image_cnn",
        description="Tells ten kinds of clothing apart on 28x28 grey images; for comparison with published DP results.",
        model=model,
        input=_IMAGE,
        label=LabelSchema(kind="class", names=_CLASSES),
        loss=LossSpec("softmax_cross_entropy"),
        defaults=TrainingDefaults(learning_rate=0.5, l2_norm_clip=1.0, server_momentum=0.9),
        data="Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747; MIT licence); starts from random parameters.",
    )
