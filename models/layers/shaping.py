"""Flatten, Reshape and Rescaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from models.errors import ModelSpecError
from models.layers.layer import Backward, Context, Parameterless
from models.layers.registry import register_layer
from models.specs import Shape


class ReshapeLayer(Parameterless):
    """The same values in another shape."""

    def __init__(self, output_shape: Shape, context: Context) -> None:
        self._input_shape, self.output_shape = context.input_shape, output_shape

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, None]:
        """See `Layer.forward`."""
        return tf.reshape(inputs[0], [-1, *self.output_shape]), None

    def backward(self, weights: Sequence[tf.Tensor], saved: None, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        return (tf.reshape(output_gradient, [-1, *self._input_shape]),), ()


@register_layer(tf.keras.layers.Flatten)
def _flatten(layer: Any, context: Context) -> ReshapeLayer:
    if layer.data_format == "channels_first":
        raise ModelSpecError(f"Layer {layer.name}: data_format must be channels_last.")
    return ReshapeLayer((math.prod(context.input_shape),), context)


@register_layer(tf.keras.layers.Reshape)
def _reshape(layer: Any, context: Context) -> ReshapeLayer:
    return ReshapeLayer(tuple(layer.compute_output_shape((None, *context.input_shape))[1:]), context)


@register_layer(tf.keras.layers.Rescaling)
class RescalingLayer(Parameterless):
    """y = x·scale + offset, both public constants."""

    def __init__(self, layer: Any, context: Context) -> None:
        if not isinstance(layer.scale, int | float) or not isinstance(layer.offset, int | float):
            raise ModelSpecError(f"Layer {layer.name}: Rescaling takes one number as scale and one as offset here.")
        self._scale, self._offset = float(layer.scale), float(layer.offset)
        self.output_shape = context.input_shape

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, None]:
        """See `Layer.forward`."""
        return inputs[0] * self._scale + self._offset, None

    def backward(self, weights: Sequence[tf.Tensor], saved: None, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        return (output_gradient * self._scale,), ()
