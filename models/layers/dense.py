"""Dense: one row per version of an example."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from models.errors import ModelSpecError
from models.layers import rows
from models.layers.layer import ExampleGradients, Parameter
from models.specs import Dense, Shape


class DenseLayer:
    """y = x·W + b on [B, K]; it saves its input."""

    def __init__(self, spec: Dense, input_shape: Shape, copies: int = 1) -> None:
        if len(input_shape) != 1:
            raise ModelSpecError(f"Dense {spec.name}: expected [features], got {input_shape}; put Flatten before it.")
        self.name = spec.name
        self.output_shape: Shape = (spec.units,)
        self._use_bias, self._copies = spec.use_bias, copies
        kernel = Parameter("kernel", (input_shape[0], spec.units), spec.initializer)
        bias = Parameter("bias", (spec.units,), "zeros")
        self.parameters = (kernel, bias) if spec.use_bias else (kernel,)
        self.norm_method = rows.cheaper_norm_method(rows=copies, inputs=input_shape[0], outputs=spec.units)

    def forward(self, weights: Sequence[tf.Tensor], x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Layer.forward`."""
        y = tf.matmul(x, weights[0])
        return (y + weights[1] if self._use_bias else y), x

    def input_gradient(self, weights: Sequence[tf.Tensor], saved: tf.Tensor, output_gradient: tf.Tensor) -> tf.Tensor:
        """See `Layer.input_gradient`."""
        return tf.matmul(output_gradient, weights[0], transpose_b=True)

    def example_gradients(self, saved: tf.Tensor, output_gradient: tf.Tensor) -> ExampleGradients:
        """See `TrainedLayer.example_gradients`."""
        row, gradient = self._rows(saved), self._rows(output_gradient)
        return rows.example_gradients(self.norm_method, row, gradient, use_bias=self._use_bias)

    def summed_gradient(self, saved: tf.Tensor, output_gradient: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """See `TrainedLayer.summed_gradient`."""
        return rows.summed_gradient(self._rows(saved), self._rows(output_gradient), use_bias=self._use_bias)

    def _rows(self, x: tf.Tensor) -> tf.Tensor:
        """[B·copies, features] as the rows of each example, [B, copies, features]."""
        return tf.reshape(x, [-1, self._copies, x.shape[1]])
