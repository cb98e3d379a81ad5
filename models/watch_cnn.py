"""`watch_cnn`: a small convolutional network on raw smartwatch windows, about 8.7k parameters."""

from __future__ import annotations

import math

from fl_protocol.bundle import TrainingDefaults
from models.smartwatch import EXERCISES, WINDOW
from models.specs import Conv1D, Dense, Fixed, GlobalAveragePool1D, MaxPool1D, ModelSpec, ReLU
from models.stages import ChannelScale

# 1 g is what a watch at rest reads; half a turn a second (π rad/s) is a brisk arm movement.
_SCALE = ChannelScale(units_per_one=(1.0, 1.0, 1.0, math.pi, math.pi, math.pi))

SPEC = ModelSpec(
    name="watch_cnn",
    description="Recognises shoulder exercises from 2.56 s of a smartwatch's accelerometer and gyroscope.",
    input=WINDOW,
    label=EXERCISES,
    layers=(
        Fixed(_SCALE),
        Conv1D("conv1", filters=32, kernel_size=5),
        # The rectifier commutes with the maximum; after the pool it has half as much to do.
        MaxPool1D(2),
        ReLU(),
        Conv1D("conv2", filters=32, kernel_size=5),
        ReLU(),
        GlobalAveragePool1D(),
        Dense("hidden", 64),
        ReLU(),
        Dense("logits", 7),
    ),
    defaults=TrainingDefaults(learning_rate=0.3, l2_norm_clip=1.0, server_momentum=0.9),
)
