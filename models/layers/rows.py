"""Per-example gradients of any layer that is a matrix product on rows: y = x·W + b for T rows of each example.

With X [T, K] the rows of one example and D [T, N] the gradient at its output, its kernel gradient is Xᵀ·D. Two ways to
the norm:

* materialised: form Xᵀ·D. The weighted sum over examples is then one pass over what is already there.
* Gram ("ghost", Li et al. 2021, arXiv 2110.05679): ‖XᵀD‖² = Σₛₜ (X·Xᵀ)ₛₜ (D·Dᵀ)ₛₜ needs only T×T matrices, but the
  sum must be formed afterwards from rescaled output gradients.
"""

from __future__ import annotations

import tensorflow as tf

from models.layers.layer import GRAM, MATERIALISED, ExampleGradients


def cheaper_norm_method(*, rows: int, inputs: int, outputs: int) -> str:
    """The cheaper way to the norms of T=`rows`, K=`inputs`, N=`outputs`.

    Both must multiply T·K·N times for the gradient itself. On top, Gram takes T²·(K+N) multiplications per example and
    the materialised form two passes over K·N values, one for the norm and one for the weighted sum.
    """
    return GRAM if rows * rows * (inputs + outputs) < 2 * inputs * outputs else MATERIALISED


def example_gradients(method: str, rows: tf.Tensor, output_gradient: tf.Tensor) -> ExampleGradients:
    """The gradients in the chosen form, from rows [B, T, K] and output gradient [B, T, N]."""
    if method == GRAM:
        return _Gram(rows, output_gradient)
    return _Materialised(rows, output_gradient)


def summed_gradient(rows: tf.Tensor, output_gradient: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The kernel [K·N] and bias [N] gradients summed over the batch, in one matrix product."""
    inputs, outputs = rows.shape[-1], output_gradient.shape[-1]
    flat_gradient = tf.reshape(output_gradient, [-1, outputs])
    kernel = tf.matmul(flat_gradient, tf.reshape(rows, [-1, inputs]), transpose_a=True)
    return _kernel_order(kernel), tf.reduce_sum(flat_gradient, 0)


def keep_counted(counted: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """`values` [B, ...] with the rows that do not count set to zero; a product would keep their NaN."""
    # The first version of where takes a condition per row (builtin SELECT), which copies whole rows; the second
    # broadcasts element by element (SELECT_V2), a hundred times slower on the reference kernel.
    return tf.compat.v1.where(counted, values, tf.zeros_like(values))


def _kernel_order(transposed: tf.Tensor) -> tf.Tensor:
    """A gradient [N, K] as the flat kernel [K·N]."""
    return tf.reshape(tf.transpose(transposed), [-1])


class _Materialised:
    """Each example's gradient, held as [B, N, K]."""

    def __init__(self, rows: tf.Tensor, output_gradient: tf.Tensor) -> None:
        self._inputs, self._outputs = rows.shape[-1], output_gradient.shape[-1]
        # Dᵀ·X rather than Xᵀ·D: the runtime copies the transposed operand, and D is the smaller one.
        kernel = tf.matmul(output_gradient, rows, transpose_a=True)
        self._kernel = tf.reshape(kernel, [-1, self._outputs * self._inputs])
        self._bias = tf.reduce_sum(output_gradient, 1)

    def squared_norms(self) -> tf.Tensor:
        return tf.reduce_sum(self._kernel * self._kernel, 1) + tf.reduce_sum(self._bias * self._bias, 1)

    def weighted_sum(self, factors: tf.Tensor, counted: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # A row [1, B] by broadcasting, not by a reshape: TensorFlow 2.15's converter merges a reshape before a product
        # with the one after it into a product of vectors, which is invalid. Factors are never negative.
        row = tf.maximum(factors, tf.zeros([1, factors.shape[0]]))
        kernel = tf.matmul(row, keep_counted(counted, self._kernel))
        bias = tf.matmul(row, keep_counted(counted, self._bias))
        return _kernel_order(tf.reshape(kernel, [self._outputs, self._inputs])), tf.reshape(bias, [-1])


class _Gram:
    """Rows and output gradients, kept apart until the clip factors are known."""

    def __init__(self, rows: tf.Tensor, output_gradient: tf.Tensor) -> None:
        self._rows = rows
        self._output_gradient = output_gradient

    def squared_norms(self) -> tf.Tensor:
        if self._rows.shape[1] == 1:
            return _row_squares(self._output_gradient) * (_row_squares(self._rows) + 1.0)
        inputs = tf.matmul(self._rows, self._rows, transpose_b=True)
        outputs = tf.matmul(self._output_gradient, self._output_gradient, transpose_b=True)
        # The bias sees a row of ones, whose Gram matrix is 1 everywhere.
        return tf.reduce_sum((inputs + 1.0) * outputs, [1, 2])

    def weighted_sum(self, factors: tf.Tensor, counted: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        rescaled = self._output_gradient * tf.reshape(factors, [-1, 1, 1])
        return summed_gradient(keep_counted(counted, self._rows), keep_counted(counted, rescaled))


def _row_squares(x: tf.Tensor) -> tf.Tensor:
    """The squared L2 norm of each example, [B]."""
    return tf.reduce_sum(x * x, [1, 2])
