"""From a verified bundle back to the Keras model and its weights.

A configuration can name any class or function of any Python module, and Keras imports what it names. The bundle is
signed, but a signature says who wrote it, not that it is harmless: before Keras reads it, every name in it is held to
the layers that covey trains, Keras's own initializers and the like, and classes that this process has registered.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from fl_protocol.bundle import KERAS, ModelBundle
from fl_protocol.errors import BundleError, CoveyError, LocalMisuseError
from models.layers.registry import registered_classes

_STAGES = ("channel_scale", "motion_features")
"""The modules of `models.zoo` that register layers of their own."""
_MODELS = ("Sequential", "Functional")
_PARTS = ("keras.initializers", "keras.regularizers", "keras.constraints")
_CODE = ("Lambda", "__lambda__")
"""What a configuration holds as Python bytecode."""


def keras_model(bundle: ModelBundle, params: NDArray[np.float32] | None = None) -> Any:
    """The Keras model as its publisher wrote it, final activation included, with its weights.

    Args:
        bundle: verified.
        params: float32 [d] in place of the bundle's own.

    Raises:
        BundleError: the configuration holds code, or does not fit the parameters.
        LocalMisuseError: it needs a class that is not registered here.
    """
    for name in _STAGES:
        importlib.import_module(f"models.zoo.{name}")
    custom = {each.__name__: each for each in registered_classes() if not each.__module__.startswith("keras.")}
    try:
        _check(json.loads(bundle.keras_json), custom)
        model = tf.keras.models.model_from_json(bundle.keras_json.decode(), custom_objects=custom)
    except CoveyError:
        raise
    # Keras checks a configuration by trying it: TypeError, ValueError, KeyError, AttributeError and more.
    except Exception as error:
        raise BundleError(f"The bundle's {KERAS} is no Keras model that TensorFlow {tf.__version__} reads.") from error
    _assign(model, bundle, bundle.params if params is None else params)
    return model


def _check(config: Any, custom: dict[str, Any]) -> None:
    """Security: nothing is named that Keras would look up outside of what is known."""
    if not isinstance(config, dict) or config.get("class_name") not in _MODELS:
        raise BundleError(f"The bundle's {KERAS} is no {' or '.join(_MODELS)} model: build it again.")
    layers = {each.__name__ for each in registered_classes()} | {"InputLayer"}
    for each in _objects(config.get("config")):
        name, module = str(each["class_name"]), each.get("module")
        if name in _CODE:
            raise BundleError(
                f"The bundle's {KERAS} holds a {name.strip('_').title()}, that is program code, which is never run: "
                "use a registered layer instead."
            )
        known = (module == "keras.layers" and name in layers) or module in _PARTS
        if not known and tf.keras.saving.get_registered_object(_registered(each), custom) is None:
            raise LocalMisuseError(
                f"The model uses {_registered(each)}, which is not known here: import the file that registers it with "
                "--custom MODULE.py."
            )


def _registered(each: dict[str, Any]) -> str:
    """The name under which a class or function has to be registered."""
    name = each["config"] if each["class_name"] == "function" else each.get("registered_name")
    return str(name or each["class_name"])


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object that a configuration describes, however deep."""
    if isinstance(value, dict):
        if "class_name" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _objects(each)


def _assign(model: Any, bundle: ModelBundle, params: NDArray[np.float32]) -> None:
    """Give every layer its part of the flat vector, whose order within a layer is that of Keras's weights."""
    by_layer: dict[str, list[NDArray[np.float32]]] = {}
    for spec in bundle.manifest.parameters:
        piece = params[spec.offset : spec.offset + math.prod(spec.shape)]
        by_layer.setdefault(spec.name.rpartition("/")[0], []).append(piece)
    frozen = bundle.frozen
    for layer in model.layers:
        count = sum(math.prod(weight.shape) for weight in layer.weights)
        if layer.trainable:
            flat = np.concatenate([np.zeros(0, np.float32), *by_layer.pop(layer.name, [])])
        else:
            flat, frozen = frozen[:count], frozen[count:]
        if flat.size != count:
            raise BundleError(
                f"Layer {layer.name} has {count} weights in {KERAS}, the bundle holds {flat.size} for it: build the "
                "bundle again."
            )
        ends = np.cumsum([math.prod(weight.shape) for weight in layer.weights])[:-1]
        pieces = np.split(flat, ends) if count else []
        layer.set_weights([piece.reshape(w.shape) for piece, w in zip(pieces, layer.weights, strict=True)])
    if by_layer or frozen.size:
        raise BundleError(f"The bundle has weights that {KERAS} has no layer for: build it again.")
