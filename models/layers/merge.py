"""Add (residual connections) and Concatenate: layers of several inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from models.errors import ModelSpecError
from models.layers.layer import Backward, Context, Parameterless
from models.layers.registry import register_layer


@register_layer(tf.keras.layers.Add)
class AddLayer(Parameterless):
    """The sum of inputs of one shape; each gets the whole gradient."""

    def __init__(self, layer: Any, context: Context) -> None:
        if len(set(context.input_shapes)) != 1:
            raise ModelSpecError(f"Layer {layer.name}: Add takes inputs of one shape, got {context.input_shapes}.")
        self._count, self.output_shape = len(context.input_shapes), context.input_shapes[0]

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, None]:
        """See `Layer.forward`."""
        return tf.add_n(inputs), None

    def backward(self, weights: Sequence[tf.Tensor], saved: None, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        return (output_gradient,) * self._count, ()


@register_layer(tf.keras.layers.Concatenate)
class ConcatenateLayer(Parameterless):
    """Inputs side by side along one axis; each gets its part of the gradient."""

    def __init__(self, layer: Any, context: Context) -> None:
        first = context.input_shapes[0]
        # Keras counts the batch dimension.
        self._axis = layer.axis % (len(first) + 1)
        if self._axis == 0:
            raise ModelSpecError(f"Layer {layer.name}: Concatenate along the batch mixes examples; use another axis.")
        self._sizes = [shape[self._axis - 1] for shape in context.input_shapes]
        self.output_shape = (*first[: self._axis - 1], sum(self._sizes), *first[self._axis :])

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, None]:
        """See `Layer.forward`."""
        return tf.concat(inputs, self._axis), None

    def backward(self, weights: Sequence[tf.Tensor], saved: None, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        return tuple(tf.split(output_gradient, self._sizes, self._axis)), ()
