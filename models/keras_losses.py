"""Which of our losses a compiled Keras model is trained with, and whether its output fits it."""

from __future__ import annotations

import re
from typing import Any

import tensorflow as tf

from fl_protocol.model_manifest import LossName, LossSpec
from models.errors import ModelSpecError
from models.layers.activations import activation_name
from models.losses import FINAL_ACTIVATION, LABEL_KINDS

_KERAS_NAMES: dict[str, LossName] = {
    "sparse_categorical_crossentropy": "softmax_cross_entropy",
    "categorical_crossentropy": "softmax_cross_entropy",
    "binary_crossentropy": "binary_cross_entropy",
    "mean_squared_error": "mean_squared_error",
    "mse": "mean_squared_error",
    "huber": "huber",
    "huber_loss": "huber",
}
"""As a string or function, and of the class in snake case."""


def compiled_loss(model: Any) -> LossSpec:
    """The loss that ``model.compile`` was given.

    Raises:
        ModelSpecError: there is none, it is not one of ours, or the model's output is not what it expects.
    """
    given = getattr(model, "loss", None)
    if given is None or isinstance(given, dict | list):
        raise ModelSpecError(
            f"Model {model.name}: it is not compiled with one loss; call model.compile(loss=...) or give --loss "
            f"(one of {', '.join(LABEL_KINDS)})."
        )
    config = given.get_config() if hasattr(given, "get_config") else {}
    keras_name = _keras_name(given)
    name = _KERAS_NAMES.get(keras_name)
    if name is None:
        raise ModelSpecError(
            f"Model {model.name}: the loss {keras_name} is not supported; use one of "
            f"{', '.join(sorted(set(_KERAS_NAMES) - {'mse', 'huber_loss'}))}."
        )
    if config.get("label_smoothing") or config.get("ignore_class") is not None:
        raise ModelSpecError(f"Model {model.name}: label_smoothing and ignore_class are not supported; leave them out.")
    _check_output(model, name, from_logits=bool(config.get("from_logits", False)))
    return LossSpec(name, float(config.get("delta", 1.0)))


def _keras_name(given: Any) -> str:
    """The loss's name in `_KERAS_NAMES`; of a loss that is not Keras's own, something that is not in it."""
    if isinstance(given, str):
        return given
    is_object = hasattr(given, "get_config")
    own = type(given) if is_object else given
    name = str(getattr(own, "__name__", given))
    if not str(getattr(own, "__module__", "")).startswith("keras."):
        return f"{name} (not of Keras)"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() if is_object else name


def ending(model: Any) -> str:
    """The name of the activation that the model's output went through last; ``linear`` if none."""
    (last,) = model._output_layers
    if isinstance(last, tf.keras.layers.Softmax):
        return "softmax"
    return activation_name(getattr(last, "activation", None)) or "unknown"


def _check_output(model: Any, name: LossName, *, from_logits: bool) -> None:
    """Probabilities where the loss expects them, logits where it expects those."""
    wanted = FINAL_ACTIVATION.get(name)
    if wanted is None or (ending(model) == wanted) != from_logits:
        return
    last = model._output_layers[0].name
    if from_logits:
        raise ModelSpecError(
            f"Layer {last}: it ends in {wanted}, but the loss says from_logits=True, which would apply {wanted} twice; "
            "leave one of them out."
        )
    raise ModelSpecError(
        f"Layer {last}: the loss expects probabilities, but the model does not end in {wanted}; compile it with "
        "from_logits=True."
    )
