"""`watch_features`: motion features and a linear layer, 378 parameters; made for strong privacy on little data."""

from __future__ import annotations

from fl_protocol.bundle import TrainingDefaults
from models.motion_features import MotionFeatures
from models.rotations import TetrahedralRotations
from models.smartwatch import EXERCISES, WINDOW
from models.specs import Dense, Fixed, ModelSpec

SPEC = ModelSpec(
    name="watch_features",
    description="Recognises shoulder exercises from 2.56 s of a smartwatch, with few parameters for strong privacy.",
    input=WINDOW,
    label=EXERCISES,
    layers=(
        Fixed(MotionFeatures(sampling_rate_hz=WINDOW.sampling_rate_hz)),
        Dense("logits", 7, initializer="zeros", use_bias=False),
    ),
    augmentation=TetrahedralRotations(degrees=15.0),
    defaults=TrainingDefaults(learning_rate=1.5, l2_norm_clip=0.5, server_momentum=0.9),
)
