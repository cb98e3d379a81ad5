"""MaxPool1D, with a gradient in builtin operators (MaxPoolGrad has none)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import tensorflow as tf

from models.errors import ModelSpecError
from models.specs import MaxPool1D, Shape

_Saved = tuple[list[tf.Tensor], tf.Tensor]


class MaxPool1DLayer:
    """The maximum over groups of samples; among equals the first one takes the gradient, as in TensorFlow."""

    def __init__(self, spec: MaxPool1D, input_shape: Shape, copies: int = 1) -> None:
        if len(input_shape) != 2 or input_shape[0] < spec.pool_size or spec.pool_size < 1:
            raise ModelSpecError(
                f"MaxPool1D: expected (samples, channels) with at least {spec.pool_size} samples, got {input_shape}."
            )
        self._samples, self._channels = input_shape
        self._size = spec.pool_size
        self.output_shape: Shape = (self._samples // spec.pool_size, self._channels)

    def forward(self, weights: Sequence[tf.Tensor], x: tf.Tensor) -> tuple[tf.Tensor, _Saved]:
        """See `Layer.forward`."""
        groups, channels = self.output_shape
        kept = groups * self._size
        used = x if kept == self._samples else tf.split(x, [kept, self._samples - kept], 1)[0]
        # Members of a group lie side by side in memory, so each is one contiguous piece per group. Split, not slice:
        # the converter would write B into a slice, and tflite-runtime then misreads batches of another size silently.
        members = tf.split(tf.reshape(used, [-1, groups, self._size * channels]), self._size, 2)
        largest = functools.reduce(tf.maximum, members)
        return largest, (members, largest)

    def input_gradient(self, weights: Sequence[tf.Tensor], saved: _Saved, output_gradient: tf.Tensor) -> tf.Tensor:
        """See `Layer.input_gradient`."""
        members, largest = saved
        remaining = output_gradient
        shares = []
        for member in members[:-1]:
            # sign(max − x) is 0 where x is the maximum, else 1; a comparison and cast took ten times as long.
            passed_on = remaining * tf.sign(largest - member)
            shares.append(remaining - passed_on)
            remaining = passed_on
        groups, channels = self.output_shape
        used = tf.reshape(tf.concat([*shares, remaining], 2), [-1, groups * self._size, channels])
        dropped = self._samples - groups * self._size
        return tf.pad(used, [[0, 0], [0, dropped], [0, 0]]) if dropped else used
