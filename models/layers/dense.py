"""Dense: one row per example."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from models.errors import ModelSpecError
from models.layers import rows
from models.layers.layer import ExampleGradients, Parameter
from models.specs import Dense, Shape


class DenseLayer:
    """y = x·W + b on [B, K]; it saves its input."""

    def __init__(self, spec: Dense, input_shape: Shape) -> None:
        if len(input_shape) != 1:
            raise ModelSpecError(f"Dense {spec.name}: expected [features], got {input_shape}; put Flatten before it.")
        self.name = spec.name
        self.output_shape: Shape = (spec.units,)
        self.parameters = (
            Parameter("kernel", (input_shape[0], spec.units), spec.initializer),
            Parameter("bias", (spec.units,), "zeros"),
        )
        self.norm_method = rows.cheaper_norm_method(rows=1, inputs=input_shape[0], outputs=spec.units)

    def forward(self, weights: Sequence[tf.Tensor], x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        kernel, bias = weights
        return tf.matmul(x, kernel) + bias, x

    def input_gradient(self, weights: Sequence[tf.Tensor], saved: tf.Tensor, output_gradient: tf.Tensor) -> tf.Tensor:
        return tf.matmul(output_gradient, weights[0], transpose_b=True)

    def example_gradients(self, saved: tf.Tensor, output_gradient: tf.Tensor) -> ExampleGradients:
        return rows.example_gradients(self.norm_method, saved[:, None, :], output_gradient[:, None, :])

    def summed_gradient(self, saved: tf.Tensor, output_gradient: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return rows.summed_gradient(saved, output_gradient)
