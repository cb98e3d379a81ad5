"""Dropout, with masks that the host feeds: a graph has no source of randomness of its own.

N. Srivastava et al. 2014, "Dropout", in the inverted form of Keras: kept values are scaled by 1/(1 − rate) in
training, and nothing happens in inference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from models.errors import ModelSpecError
from models.layers.layer import Backward, Context, Parameterless
from models.layers.registry import register_layer


@register_layer(tf.keras.layers.Dropout)
class DropoutLayer(Parameterless):
    """y = x·mask/(1 − rate); in training the mask comes as a second input [N, units], else y = x."""

    def __init__(self, layer: Any, context: Context) -> None:
        if layer.noise_shape is not None:
            raise ModelSpecError(f"Layer {layer.name}: Dropout with noise_shape is not supported; leave it out.")
        if not 0 <= layer.rate < 1:
            raise ModelSpecError(f"Layer {layer.name}: Dropout at rate {layer.rate} keeps nothing; use less than 1.")
        self.rate, self.units = float(layer.rate), math.prod(context.input_shape)
        self.output_shape = context.input_shape

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """See `Layer.forward`."""
        if len(inputs) == 1:
            return inputs[0], None
        x, mask = inputs
        scale = tf.reshape(mask, [-1, *self.output_shape]) * (1.0 / (1.0 - self.rate))
        return x * scale, scale

    def backward(self, weights: Sequence[tf.Tensor], saved: tf.Tensor, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        return (output_gradient * saved,), ()
