"""The models that Covey ships; listing them does not import TensorFlow, loading one does."""

from __future__ import annotations

import importlib

from models.errors import ModelSpecError
from models.specs import ModelSpec

MODELS = {
    "watch_cnn": "convolutional network on raw smartwatch windows, 8,711 parameters",
    "watch_features": "motion features and a linear layer, 378 parameters, for strong privacy on little data",
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
