"""`watch_features`: motion features and a linear layer, 378 parameters; made for strong privacy on little data."""

from __future__ import annotations

import tensorflow as tf

from fl_protocol.model_manifest import LossSpec, TrainingDefaults
from models.specs import ModelSpec
from models.zoo.motion_features import MotionFeatures
from models.zoo.rotations import TetrahedralRotations
from models.zoo.smartwatch import EXERCISES, RECORDINGS, WINDOW


def make_model() -> ModelSpec:
    """The model with its initial parameters, all zero."""
    classes = len(EXERCISES.names)
    model = tf.keras.Sequential(
        [
            tf.keras.Input(WINDOW.shape),
            MotionFeatures(sampling_rate_hz=WINDOW.sampling_rate_hz, name="features"),
            tf.keras.layers.Dense(classes, use_bias=False, kernel_initializer="zeros", name="logits"),
        ],
        name="watch_features",
    )
    return ModelSpec(
        name="watch_features",
        description="Recognises shoulder exercises from 2.56 s of a smartwatch; few parameters for strong privacy.",
        model=model,
        input=WINDOW,
        label=EXERCISES,
        loss=LossSpec("softmax_cross_entropy"),
        defaults=TrainingDefaults(learning_rate=1.5, l2_norm_clip=0.5, server_momentum=0.9),
        augmentation=TetrahedralRotations(degrees=15.0),
        data=RECORDINGS,
    )
