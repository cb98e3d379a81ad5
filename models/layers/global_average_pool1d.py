"""GlobalAveragePool1D."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from models.errors import ModelSpecError
from models.specs import GlobalAveragePool1D, Shape


class GlobalAveragePool1DLayer:
    """The mean over time; every sample gets an equal share of the gradient."""

    def __init__(self, spec: GlobalAveragePool1D, input_shape: Shape, copies: int = 1) -> None:
        if len(input_shape) != 2:
            raise ModelSpecError(f"GlobalAveragePool1D: expected (samples, channels), got {input_shape}.")
        self._samples, channels = input_shape
        self.output_shape: Shape = (channels,)

    def forward(self, weights: Sequence[tf.Tensor], x: tf.Tensor) -> tuple[tf.Tensor, None]:
        """See `Layer.forward`."""
        return tf.reduce_mean(x, 1), None

    def input_gradient(self, weights: Sequence[tf.Tensor], saved: None, output_gradient: tf.Tensor) -> tf.Tensor:
        """See `Layer.input_gradient`."""
        share = tf.expand_dims(output_gradient / float(self._samples), 1)
        # Not broadcast_to: the converter would store a full tensor of ones for it.
        return share * tf.ones([1, self._samples, 1])
