"""Maximum and average pooling of one and two axes, over windows and globally (MaxPoolGrad has no TFLite builtin)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from models.layers.activations import is_positive
from models.layers.layer import Backward, Context, Parameterless
from models.layers.registry import register_layer
from models.layers.windows import flat_positions, geometry, picked, total

_LOWEST = -3.0e38
"""Stands for "nothing there" in a maximum."""


class _WindowPooling(Parameterless):
    """What pooling over windows has in common."""

    def __init__(self, layer: Any, context: Context) -> None:
        self._input_shape = context.input_shape
        self._window = geometry(layer, context.input_shape[:-1], size="pool_size")
        self.output_shape = (*self._window.output, context.input_shape[-1])

    def _members(self, x: tf.Tensor, fill: float) -> list[tf.Tensor]:
        """The J values that each output looks at, each [N, P, C]."""
        x = flat_positions(x, self._window.positions)
        return [picked(x, column, fill=fill) for column in self._window.table.T]

    def _scattered(self, shares: list[tf.Tensor]) -> tf.Tensor:
        """The gradient of the input, from the share [N, P, C] of each place."""
        stacked = tf.concat(shares, 1)
        dx = total([picked(stacked, column) for column in self._window.inverse.T])
        return tf.reshape(dx, [-1, *self._input_shape])

    def _shaped(self, y: tf.Tensor) -> tf.Tensor:
        """[N, P, C] or with an axis more as the output."""
        return y if len(y.shape) == len(self.output_shape) + 1 else tf.reshape(y, [-1, *self.output_shape])


@register_layer(tf.keras.layers.MaxPooling1D)
@register_layer(tf.keras.layers.MaxPooling2D)
class MaxPoolingLayer(_WindowPooling):
    """The maximum; among equals the first place takes the gradient, as in TensorFlow."""

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """See `Layer.forward`."""
        members = self._members(inputs[0], _LOWEST)
        largest = functools.reduce(tf.maximum, members)
        return self._shaped(largest), (members, largest)

    def backward(self, weights: Sequence[tf.Tensor], saved: Any, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        members, largest = saved
        remaining = flat_positions(output_gradient, self._window.outputs)
        shares = []
        for member in members[:-1]:
            passed_on = remaining * is_positive(largest - member)
            shares.append(remaining - passed_on)
            remaining = passed_on
        return (self._scattered([*shares, remaining]),), ()


@register_layer(tf.keras.layers.AveragePooling1D)
@register_layer(tf.keras.layers.AveragePooling2D)
class AveragePoolingLayer(_WindowPooling):
    """The mean of the values that are there."""

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, None]:
        """See `Layer.forward`."""
        # The builtin leaves out what hangs over the edge, as TensorFlow does.
        (x,), window = inputs, self._window
        image = tf.reshape(x, [-1, *((*window.spatial, 1)[:2]), x.shape[-1]])
        size, strides = ((*each, 1)[:2] for each in (window.size, window.strides))
        return self._shaped(tf.nn.avg_pool2d(image, size, strides, window.padding.upper())), None

    def backward(self, weights: Sequence[tf.Tensor], saved: None, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        share = flat_positions(output_gradient, self._window.outputs) * self._share()
        missing, places = self._window.places * self._window.outputs, self._window.outputs
        numbers = np.where(self._window.inverse == missing, places, self._window.inverse % places).astype(np.int32)
        dx = total([picked(share, column) for column in numbers.T])
        return (tf.reshape(dx, [-1, *self._input_shape]),), ()

    def _share(self) -> Any:
        """One over the number of values of each output, [P, 1]; a plain number where all have the same."""
        counts = (self._window.table < self._window.positions).sum(1)
        if (counts == counts[0]).all():
            return float(1 / counts[0])
        return (1.0 / counts[:, None]).astype(np.float32)


class _GlobalPooling(Parameterless):
    """What pooling over everything has in common."""

    def __init__(self, layer: Any, context: Context) -> None:
        *spatial, channels = context.input_shape
        self._input_shape, self._positions = context.input_shape, int(np.prod(spatial))
        self.output_shape = (*([1] * len(spatial) if layer.keepdims else []), channels)

    def _shaped(self, y: tf.Tensor) -> tf.Tensor:
        """[N, C] as the output."""
        return y if len(self.output_shape) == 1 else tf.reshape(y, [-1, *self.output_shape])

    def _spread(self, output_gradient: tf.Tensor, x: tf.Tensor) -> tuple[tuple[tf.Tensor], tuple[()]]:
        """A gradient [N, C] times the shares x [N or 1, S, C or 1] of every position."""
        dx = tf.reshape(output_gradient, [-1, 1, self._input_shape[-1]]) * x
        return (dx if len(self._input_shape) == 2 else tf.reshape(dx, [-1, *self._input_shape]),), ()


@register_layer(tf.keras.layers.GlobalAveragePooling1D)
@register_layer(tf.keras.layers.GlobalAveragePooling2D)
class GlobalAveragePoolingLayer(_GlobalPooling):
    """The mean over all positions; every one gets an equal share of the gradient."""

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, None]:
        """See `Layer.forward`."""
        return self._shaped(tf.reduce_mean(flat_positions(inputs[0], self._positions), 1)), None

    def backward(self, weights: Sequence[tf.Tensor], saved: None, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        # Not broadcast_to: the converter would store a full tensor of ones for it.
        return self._spread(output_gradient / float(self._positions), tf.ones([1, self._positions, 1]))


@register_layer(tf.keras.layers.GlobalMaxPooling1D)
@register_layer(tf.keras.layers.GlobalMaxPooling2D)
class GlobalMaxPoolingLayer(_GlobalPooling):
    """The maximum over all positions; equals share the gradient, as in TensorFlow."""

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Layer.forward`."""
        x = flat_positions(inputs[0], self._positions)
        largest = tf.reduce_max(x, 1, keepdims=True)
        return self._shaped(tf.reshape(largest, [-1, x.shape[2]])), tf.nn.relu(1.0 - tf.math.ceil(largest - x))

    def backward(self, weights: Sequence[tf.Tensor], saved: tf.Tensor, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        return self._spread(output_gradient, saved / tf.reduce_sum(saved, 1, keepdims=True))
