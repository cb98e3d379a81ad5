"""Conv1D: a matrix product on the windows of each example (im2col).

TensorFlow's filter gradient (Conv2DBackpropFilter) has no TFLite builtin, so forward and backward both work on the
windows: one GATHER with constant indices copies them out, which took a third of the time of slices and a concat.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.errors import ModelSpecError
from models.layers import rows
from models.layers.layer import ExampleGradients, Parameter
from models.specs import Conv1D, Shape


class Conv1DLayer:
    """y[t] = Σⱼ x[t+j]·W[j] + b on [B, samples, channels]; it saves the windows [B, T, kernel_size·channels]."""

    def __init__(self, spec: Conv1D, input_shape: Shape, copies: int = 1) -> None:
        if len(input_shape) != 2 or input_shape[0] < spec.kernel_size:
            raise ModelSpecError(
                f"Conv1D {spec.name}: expected (samples, channels) with at least {spec.kernel_size} samples, "
                f"got {input_shape}."
            )
        self.name = spec.name
        self._samples, self._channels = input_shape
        self._size, self._copies = spec.kernel_size, copies
        self.output_shape: Shape = (self._samples - spec.kernel_size + 1, spec.filters)
        self.parameters = (
            Parameter("kernel", (spec.kernel_size, self._channels, spec.filters), spec.initializer),
            Parameter("bias", (spec.filters,), "zeros"),
        )
        self.norm_method = rows.cheaper_norm_method(
            rows=copies * self.output_shape[0], inputs=spec.kernel_size * self._channels, outputs=spec.filters
        )

    def forward(self, weights: Sequence[tf.Tensor], x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Layer.forward`."""
        kernel, bias = weights
        samples, filters = self.output_shape
        windows = _windows(x, count=samples, size=self._size)
        return tf.matmul(windows, tf.reshape(kernel, [-1, filters])) + bias, windows

    def input_gradient(self, weights: Sequence[tf.Tensor], saved: tf.Tensor, output_gradient: tf.Tensor) -> tf.Tensor:
        """See `Layer.input_gradient`."""
        # dx[t] = Σⱼ D[t−j]·W[j]ᵀ: a convolution of the zero-padded D with the kernel reversed in time.
        edge = self._size - 1
        padded = tf.pad(output_gradient, [[0, 0], [edge, edge], [0, 0]])
        windows = _windows(padded, count=self._samples, size=self._size)
        reversed_kernel = tf.gather(weights[0], np.arange(self._size)[::-1].astype(np.int32))
        turned = tf.reshape(tf.transpose(reversed_kernel, [0, 2, 1]), [-1, self._channels])
        return tf.matmul(windows, turned)

    def example_gradients(self, saved: tf.Tensor, output_gradient: tf.Tensor) -> ExampleGradients:
        """See `TrainedLayer.example_gradients`."""
        return rows.example_gradients(self.norm_method, self._rows(saved), self._rows(output_gradient), use_bias=True)

    def summed_gradient(self, saved: tf.Tensor, output_gradient: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """See `TrainedLayer.summed_gradient`."""
        return rows.summed_gradient(self._rows(saved), self._rows(output_gradient), use_bias=True)

    def _rows(self, x: tf.Tensor) -> tf.Tensor:
        """[B·copies, T, n] as the rows of each example, [B, copies·T, n]."""
        return x if self._copies == 1 else tf.reshape(x, [-1, self._copies * x.shape[1], x.shape[2]])


def _windows(x: tf.Tensor, *, count: int, size: int) -> tf.Tensor:
    """The first `count` windows of `size` samples, [B, count, size·channels]."""
    indices: NDArray[np.int32] = np.add.outer(np.arange(count, dtype=np.int32), np.arange(size, dtype=np.int32))
    return tf.reshape(tf.gather(x, indices, axis=1), [-1, count, size * x.shape[2]])
