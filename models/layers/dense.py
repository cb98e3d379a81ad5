"""Dense: a matrix product on the last axis, however many axes come before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from models.layers.gradients import norm_method, row_product
from models.layers.layer import Backward, Context, Parameter
from models.layers.registry import register_layer


@register_layer(tf.keras.layers.Dense, output_activation=True)
class DenseLayer:
    """y = x·W + b on [N, ..., K]; it saves its rows [N, T, K]."""

    def __init__(self, layer: Any, context: Context) -> None:
        *self._leading, inputs = context.input_shape
        self.output_shape = (*self._leading, layer.units)
        self._copies, self._input_shape = context.copies, context.input_shape
        kernel, bias = Parameter("kernel", (inputs, layer.units)), Parameter("bias", (layer.units,))
        self.parameters = (kernel, bias) if layer.use_bias else (kernel,)
        self.norm_methods = {self.parameters[0].role: norm_method(rows=context.copies * math.prod(self._leading))}

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Layer.forward`."""
        (x,) = inputs
        if len(self._leading) > 1:
            x = tf.reshape(x, [-1, math.prod(self._leading), x.shape[-1]])
        y = tf.matmul(x, weights[0])
        y = y + weights[1] if len(weights) > 1 else y
        return (tf.reshape(y, [-1, *self.output_shape]) if len(self._leading) > 1 else y), self._rows(x)

    def backward(self, weights: Sequence[tf.Tensor], saved: tf.Tensor, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        if len(self._leading) > 1:
            output_gradient = tf.reshape(output_gradient, [-1, math.prod(self._leading), output_gradient.shape[-1]])
        # Three axes always: a product of two becomes FULLY_CONNECTED, which XNNPACK refuses if the weights are
        # computed.
        wide = output_gradient if self._leading else tf.reshape(output_gradient, [1, -1, self.output_shape[-1]])
        dx = tf.matmul(wide, weights[0], transpose_b=True)
        gradient = row_product(
            saved,
            self._rows(output_gradient),
            copies=self._copies,
            roles=tuple(parameter.role for parameter in self.parameters),
        )
        return (dx if len(self._leading) == 1 else tf.reshape(dx, [-1, *self._input_shape]),), (gradient,)

    @staticmethod
    def _rows(x: tf.Tensor) -> tf.Tensor:
        """[N, features] as [N, 1, features]; with more axes it is rows already."""
        return tf.reshape(x, [-1, 1, x.shape[1]]) if len(x.shape) == 2 else x
