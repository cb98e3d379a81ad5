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


def example_gradients(method: str, rows: tf.Tensor, output_gradient: tf.Tensor, *, use_bias: bool) -> ExampleGradients:
    """The gradients in the chosen form, from rows [B, T, K] and output gradient [B, T, N]."""
    form = _Gram if method == GRAM else _Materialised
    return form(rows, output_gradient, use_bias=use_bias)


def summed_gradient(rows: tf.Tensor, output_gradient: tf.Tensor, *, use_bias: bool) -> tuple[tf.Tensor, ...]:
    """The kernel [K·N] and, if there is one, bias [N] gradient summed over the batch."""
    # One product per example and a sum measured faster than one product over all rows, which copies them to reshape.
    kernel = _flat_kernel(tf.reduce_sum(_transposed_kernels(rows, output_gradient), 0))
    return (kernel, tf.reduce_sum(output_gradient, [0, 1])) if use_bias else (kernel,)


def keep_counted(counted: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """`values` [B, ...] with the rows that do not count set to zero; a product would keep their NaN."""
    # Zeros that the converter cannot know: as a constant they would fill the file (650 kB for a 5k kernel at B=32).
    never = tf.reduce_any(counted & ~counted)
    zeros = tf.fill(values.shape, tf.cast(never, tf.float32))
    # The first version of where takes a condition per row (builtin SELECT), which copies whole rows; the second
    # broadcasts element by element (SELECT_V2), a hundred times slower on the reference kernel.
    return tf.compat.v1.where(counted, values, zeros)


def _transposed_kernels(rows: tf.Tensor, output_gradient: tf.Tensor) -> tf.Tensor:
    """Each example's kernel gradient as Dᵀ·X [B, N, K]; the runtime copies the transposed operand, and D is smaller."""
    return tf.matmul(output_gradient, rows, transpose_a=True)


def _flat_kernel(transposed: tf.Tensor) -> tf.Tensor:
    """A gradient [N, K] as the flat kernel [K·N]."""
    return tf.reshape(tf.transpose(transposed), [-1])


class _Materialised:
    """Each example's gradient, held as one tensor [B, ...] per parameter."""

    def __init__(self, rows: tf.Tensor, output_gradient: tf.Tensor, *, use_bias: bool) -> None:
        self._kernels = _transposed_kernels(rows, output_gradient)
        self._biases = tf.reduce_sum(output_gradient, 1) if use_bias else None

    def squared_norms(self) -> tf.Tensor:
        kernel = tf.reduce_sum(self._kernels * self._kernels, [1, 2])
        return kernel if self._biases is None else kernel + tf.reduce_sum(self._biases * self._biases, 1)

    def weighted_sum(self, factors: tf.Tensor, counted: tf.Tensor) -> tuple[tf.Tensor, ...]:
        # A product and a sum: as one matrix product the converter transposes the whole stack of gradients first.
        kernels = keep_counted(counted, self._kernels) * tf.reshape(factors, [-1, 1, 1])
        kernel = _flat_kernel(tf.reduce_sum(kernels, 0))
        if self._biases is None:
            return (kernel,)
        return kernel, tf.reduce_sum(keep_counted(counted, self._biases) * tf.reshape(factors, [-1, 1]), 0)


class _Gram:
    """Rows and output gradients, kept apart until the clip factors are known."""

    def __init__(self, rows: tf.Tensor, output_gradient: tf.Tensor, *, use_bias: bool) -> None:
        self._rows, self._output_gradient, self._use_bias = rows, output_gradient, use_bias

    def squared_norms(self) -> tf.Tensor:
        # A bias is a weight on a constant input of 1, which adds 1 to every entry of X·Xᵀ.
        constant_input = 1.0 if self._use_bias else 0.0
        if self._rows.shape[1] == 1:
            return _row_squares(self._output_gradient) * (_row_squares(self._rows) + constant_input)
        inputs = tf.matmul(self._rows, self._rows, transpose_b=True)
        outputs = tf.matmul(self._output_gradient, self._output_gradient, transpose_b=True)
        return tf.reduce_sum((inputs + constant_input) * outputs, [1, 2])

    def weighted_sum(self, factors: tf.Tensor, counted: tf.Tensor) -> tuple[tf.Tensor, ...]:
        rescaled = keep_counted(counted, self._output_gradient) * tf.reshape(factors, [-1, 1, 1])
        return summed_gradient(keep_counted(counted, self._rows), rescaled, use_bias=self._use_bias)


def _row_squares(x: tf.Tensor) -> tf.Tensor:
    """The squared L2 norm of each example, [B]."""
    return tf.reduce_sum(x * x, [1, 2])
