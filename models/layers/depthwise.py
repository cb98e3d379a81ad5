"""DepthwiseConv1D/2D, and SeparableConv1D/2D as a depthwise layer and a convolution of size 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from models.layers.convolution import ConvolutionLayer
from models.layers.gradients import MATERIALISED, ParameterGradient, PerExample
from models.layers.layer import Backward, Context, Parameter
from models.layers.registry import register_layer
from models.layers.windows import Geometry, flat_positions, geometry, picked, total


@register_layer(tf.keras.layers.DepthwiseConv1D, output_activation=True)
@register_layer(tf.keras.layers.DepthwiseConv2D, output_activation=True)
def _depthwise(layer: Any, context: Context) -> DepthwiseLayer:
    return DepthwiseLayer(
        geometry(layer, context.input_shape[:-1], size="kernel_size"),
        multiplier=layer.depth_multiplier,
        use_bias=layer.use_bias,
        context=context,
    )


@register_layer(tf.keras.layers.SeparableConv1D, output_activation=True)
@register_layer(tf.keras.layers.SeparableConv2D, output_activation=True)
def _separable(layer: Any, context: Context) -> list[DepthwiseLayer | ConvolutionLayer]:
    window = geometry(layer, context.input_shape[:-1], size="kernel_size")
    depthwise = DepthwiseLayer(window, multiplier=layer.depth_multiplier, use_bias=False, context=context)
    ones = (1,) * len(window.spatial)
    point = Geometry(layer.name, window.output, size=ones, strides=ones, dilation=ones, padding="valid")
    pointwise = ConvolutionLayer(
        point,
        filters=layer.filters,
        use_bias=layer.use_bias,
        context=Context((depthwise.output_shape,), context.copies),
        role="pointwise_kernel",
    )
    return [depthwise, pointwise]


class DepthwiseLayer:
    """y[p, c·m] = Σⱼ x[table[p, j], c]·W[j, c, m] + b on [N, *spatial, C]; it saves the J shifted inputs.

    Args:
        window: where the kernel looks.
        multiplier: outputs per channel.
        use_bias: whether there is a b.
        context: of one input.
    """

    def __init__(self, window: Geometry, *, multiplier: int, use_bias: bool, context: Context) -> None:
        self._window, self._copies = window, context.copies
        self._input_shape, self._channels = context.input_shape, context.input_shape[-1]
        self._multiplier = multiplier
        self.output_shape = (*window.output, self._channels * multiplier)
        kernel = Parameter("depthwise_kernel", (*window.size, self._channels, multiplier))
        bias = Parameter("bias", (self._channels * multiplier,))
        self.parameters = (kernel, bias) if use_bias else (kernel,)

    @property
    def norm_methods(self) -> dict[str, str]:
        """See `Layer.norm_methods`."""
        return {"depthwise_kernel": MATERIALISED}

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """See `Layer.forward`."""
        x = flat_positions(inputs[0], self._window.positions)
        if self._multiplier > 1:
            x = tf.gather(x, np.repeat(np.arange(self._channels, dtype=np.int32), self._multiplier), axis=2)
        shifted = [picked(x, column) for column in self._window.table.T]
        y = total([each * tap for each, tap in zip(shifted, self._taps(weights[0]), strict=True)])
        y = y + weights[1] if len(weights) > 1 else y
        return (y if len(self.output_shape) == 2 else tf.reshape(y, [-1, *self.output_shape])), shifted

    def backward(self, weights: Sequence[tf.Tensor], saved: list[tf.Tensor], output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        gradient = flat_positions(output_gradient, self._window.outputs)
        kernels = tf.stack([tf.reduce_sum(each * gradient, 1) for each in saved], 1)
        forms: list[ParameterGradient] = [PerExample(kernels, copies=self._copies, role="depthwise_kernel")]
        if len(weights) > 1:
            forms.append(PerExample(tf.reduce_sum(gradient, 1), copies=self._copies, role="bias"))
        return (self._input_gradient(weights[0], gradient),), tuple(forms)

    def _input_gradient(self, kernel: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
        """From D [N, P, C·m] to the gradient of the input."""
        columns = self._window.inverse_by_place.T
        parts = [picked(gradient, column) * tap for column, tap in zip(columns, self._taps(kernel), strict=True)]
        dx = total(parts)
        if self._multiplier > 1:
            dx = tf.reduce_sum(tf.reshape(dx, [-1, dx.shape[1], self._channels, self._multiplier]), 3)
        return dx if len(self._input_shape) == 2 else tf.reshape(dx, [-1, *self._input_shape])

    def _taps(self, kernel: tf.Tensor) -> list[tf.Tensor]:
        """The kernel's J rows [1, 1, C·m]."""
        outputs = self._channels * self._multiplier
        return list(tf.split(tf.reshape(kernel, [1, self._window.places, outputs]), self._window.places, 1))
