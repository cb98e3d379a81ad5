"""Fixed stages: parameter-free Keras layers in front of the trained ones, run as they are and never differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from models.errors import ModelSpecError
from models.layers.layer import Backward, Context, Parameterless
from models.layers.registry import register_layer


class FixedStage(tf.keras.layers.Layer):  # type: ignore[misc]  # TensorFlow publishes no types
    """A stage without weights, such as feature extraction; subclasses write ``call`` in builtin operators.

    It must treat each example alone, and nothing in it may come from recordings: a constant learnt from people's data
    would leave the privacy ledger. It may only stand before the first trained layer, since nothing asks for its
    gradient.
    """

    @property
    def description(self) -> str:
        """What it computes, for people; goes into the bundle's manifest."""
        raise ModelSpecError(f"Layer {self.name}: a fixed stage needs a description, which devices are told.")


class FixedLayer(Parameterless):
    """Runs a fixed stage forward."""

    def __init__(self, layer: Any, context: Context) -> None:
        if layer.weights:
            raise ModelSpecError(f"Layer {layer.name}: a fixed stage has no weights; use constants.")
        self._layer, self._name = layer, layer.name
        self.description = str(layer.description)
        self.output_shape = tuple(layer.compute_output_shape((None, *context.input_shape))[1:])

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, None]:
        """See `Layer.forward`."""
        return self._layer.call(inputs[0]), None

    def backward(self, weights: Sequence[tf.Tensor], saved: None, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        raise ModelSpecError(f"Layer {self._name}: a fixed stage has no gradient; put it before the trained layers.")


def register_fixed(keras_class: type[FixedStage]) -> type[FixedStage]:
    """Class decorator for a `FixedStage`: it can be built into models and read back from a bundle."""
    register_layer(keras_class)(FixedLayer)
    registered: type[FixedStage] = tf.keras.saving.register_keras_serializable(package="covey")(keras_class)
    return registered
