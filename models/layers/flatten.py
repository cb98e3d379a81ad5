"""Flatten."""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf

from models.specs import Flatten, Shape


class FlattenLayer:
    """All values of an example in one row."""

    def __init__(self, spec: Flatten, input_shape: Shape, copies: int = 1) -> None:
        self._input_shape = input_shape
        self.output_shape: Shape = (math.prod(input_shape),)

    def forward(self, weights: Sequence[tf.Tensor], x: tf.Tensor) -> tuple[tf.Tensor, None]:
        """See `Layer.forward`."""
        return tf.reshape(x, [-1, *self.output_shape]), None

    def input_gradient(self, weights: Sequence[tf.Tensor], saved: None, output_gradient: tf.Tensor) -> tf.Tensor:
        """See `Layer.input_gradient`."""
        return tf.reshape(output_gradient, [-1, *self._input_shape])
