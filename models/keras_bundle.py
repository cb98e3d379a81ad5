"""From a verified bundle back to the Keras model and its weights.

A configuration can name any class or function of any Python module, and Keras imports what it names. The bundle is
signed, but a signature says who wrote it, not that it is harmless: `models.keras_config` looks at it before Keras does.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from fl_protocol.bundle import KERAS, ModelBundle
from fl_protocol.errors import BundleError, CoveyError
from models.keras_config import check_config, custom_classes


def keras_model(bundle: ModelBundle, params: NDArray[np.float32] | None = None) -> Any:
    """The Keras model as its publisher wrote it, final activation included, with its weights.

    Args:
        bundle: verified.
        params: float32 [d] in place of the bundle's own.

    Raises:
        BundleError: the configuration holds code, or does not fit the parameters.
        LocalMisuseError: it needs a class that is not registered here.
    """
    custom = custom_classes()
    try:
        check_config(json.loads(bundle.keras_json), source=f"The bundle's {KERAS}")
        model = tf.keras.models.model_from_json(bundle.keras_json.decode(), custom_objects=custom)
    except CoveyError:
        raise
    # Keras checks a configuration by trying it: TypeError, ValueError, KeyError, AttributeError and more.
    except Exception as error:
        raise BundleError(f"The bundle's {KERAS} is no Keras model that TensorFlow {tf.__version__} reads.") from error
    _assign(model, bundle, bundle.params if params is None else params)
    return model


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
