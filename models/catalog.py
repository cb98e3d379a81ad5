"""The models that Covey ships; listing them does not import TensorFlow, loading one does."""

from __future__ import annotations

import importlib

from models.errors import ModelSpecError
from models.specs import ModelSpec

MODELS = {
    "watch_cnn": "convolutional network on raw smartwatch windows, 8,711 parameters",
    "watch_features": "motion features and a linear layer, 378 parameters, for strong privacy on little data",
    "har_gru": "strided convolution and GRU on raw motion windows, 3,695 parameters",
    "ppg_heart_rate": "heart rate from photoplethysmogram and accelerometer, 21,913 parameters",
    "ecg_beat": "kinds of heartbeat on one ECG lead, 1-D residual, 14,757 parameters",
    "image_cnn": "28x28 grey images, 26,010 parameters, for comparison with published DP results",
    "autoencoder": "unusual movements by reconstruction error, 25,928 parameters",
}
"""Name (also the module's) and one line for people."""


def load(name: str) -> ModelSpec:
    """The specification of a model.

    Raises:
        ModelSpecError: there is no model of that name.
    """
    if name not in MODELS:
        raise ModelSpecError(f"There is no model {name!r}; the catalogue has {', '.join(MODELS)}.")
    spec: ModelSpec = importlib.import_module(f"models.zoo.{name}").make_model()
    return spec
