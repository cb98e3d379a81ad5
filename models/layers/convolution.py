"""Conv1D and Conv2D: a matrix product on the windows of each example (im2col).

TensorFlow's filter gradient (Conv2DBackpropFilter) has no TFLite builtin, so forward and backward both work on the
windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from models.errors import ModelSpecError
from models.layers.gradients import norm_method, row_product
from models.layers.layer import Backward, Context, Parameter
from models.layers.registry import register_layer
from models.layers.windows import Geometry, flat_positions, geometry, image_windows, picked, total, windows


@register_layer(tf.keras.layers.Conv1D, output_activation=True)
@register_layer(tf.keras.layers.Conv2D, output_activation=True)
def _convolution(layer: Any, context: Context) -> ConvolutionLayer:
    if layer.groups != 1:
        raise ModelSpecError(
            f"Layer {layer.name}: {layer.groups} groups; use groups=1, or a depthwise layer for one group per channel."
        )
    window = geometry(layer, context.input_shape[:-1], size="kernel_size")
    return ConvolutionLayer(window, filters=layer.filters, use_bias=layer.use_bias, context=context)


class ConvolutionLayer:
    """y[p] = Σⱼ x[table[p, j]]·W[j] + b on [N, *spatial, C]; it saves the windows [N, P, J·C].

    Args:
        window: where the kernel looks.
        filters: M, outputs per position.
        use_bias: whether there is a b.
        context: of one input.
        role: of the kernel.
    """

    def __init__(
        self, window: Geometry, *, filters: int, use_bias: bool, context: Context, role: str = "kernel"
    ) -> None:
        self._window, self._channels, self._copies = window, context.input_shape[-1], context.copies
        self._input_shape = context.input_shape
        self.output_shape = (*window.output, filters)
        kernel = Parameter(role, (*window.size, self._channels, filters))
        self.parameters = (kernel, Parameter("bias", (filters,))) if use_bias else (kernel,)
        self.norm_methods = {self.parameters[0].role: norm_method(rows=context.copies * window.outputs)}
        # GATHER takes its time by the piece, so few channels are first joined along the last axis.
        self._in_two_steps = len(window.spatial) == 2 and self._channels < 8
        # Two ways back to the input: gather the output gradients that a position was used for and multiply by the
        # kernel, or multiply first and gather the products. With strides most gathered gradients would be zeros.
        used = np.count_nonzero(window.inverse_by_place < window.outputs)
        self._multiply_first = used < 0.6 * window.inverse_by_place.size

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Layer.forward`."""
        window, filters = self._window, self.output_shape[-1]
        x = flat_positions(inputs[0], window.positions)
        rows = image_windows(x, window) if self._in_two_steps else windows(x, window.table)
        y = tf.matmul(rows, tf.reshape(weights[0], [-1, filters]))
        y = y + weights[1] if len(weights) > 1 else y
        return (y if len(self.output_shape) == 2 else tf.reshape(y, [-1, *self.output_shape])), rows

    def backward(self, weights: Sequence[tf.Tensor], saved: tf.Tensor, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        gradient = flat_positions(output_gradient, self._window.outputs)
        dx = self._input_gradient(weights[0], gradient)
        product = row_product(
            saved,
            gradient,
            copies=self._copies,
            roles=tuple(parameter.role for parameter in self.parameters),
        )
        return (dx if len(self._input_shape) == 2 else tf.reshape(dx, [-1, *self._input_shape]),), (product,)

    def _input_gradient(self, kernel: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
        """From D [N, P, M] to the gradient of the input, [N, S, C]."""
        window, filters, channels = self._window, self.output_shape[-1], self._channels
        by_place = tf.reshape(kernel, [window.places, channels, filters])
        if not self._multiply_first:
            # dx[s] = Σⱼ D[output whose place j lies on s]·W[j]ᵀ.
            return tf.matmul(
                windows(gradient, window.inverse_by_place),
                tf.reshape(tf.transpose(by_place, [0, 2, 1]), [-1, channels]),
            )
        products = tf.matmul(gradient, tf.reshape(by_place, [-1, filters]), transpose_b=True)
        rows = tf.reshape(products, [-1, window.outputs * window.places, channels])
        # Rows are numbered output first here, place first in `inverse`.
        place, output = np.divmod(window.inverse, window.outputs)
        missing = window.inverse == window.places * window.outputs
        numbers = np.where(missing, window.places * window.outputs, output * window.places + place).astype(np.int32)
        return total([picked(rows, column) for column in numbers.T])
