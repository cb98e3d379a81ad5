"""Forms in which a layer hands over the gradients of its parameters: one gradient per example, never summed too early.

`RowProduct` serves every layer that is a matrix product on rows, y = x·W + b for T rows of each example. With X [T, K]
the rows of one example and D [T, M] the gradient at its output, its kernel gradient is Xᵀ·D. Two ways to the norm:

* materialised: form Xᵀ·D. The weighted sum over examples is then one pass over what is already there, and what is
  summed is what was measured, rounding and all.
* Gram ("ghost", Li et al. 2021, arXiv 2110.05679): ‖XᵀD‖² = Σₛₜ (X·Xᵀ)ₛₜ (D·Dᵀ)ₛₜ. For one row this is ‖x‖²·‖d‖², and
  no gradient is formed; for more it cancels, and is not used.

`PerExample` serves small parameters (scales, biases, depthwise kernels) whose gradients are simply held.

**Security: no norm comes out too small, whatever the parameters and the example are** (ADR 8). Every form measures the
very tensors that it sums, and float32 has two ends at which a measured square can fall short of the true one:

* below 2^-126 some runtimes flush to zero. So every sum of n squares counts each of them as `SMALLEST_SQUARE` more;
* above 3.4e38 some runtimes saturate where others become infinite. Either is beyond `models.steps.LARGEST`, so the
  example does not count, as long as what saturated is no factor of a product: `_Gram` looks at each factor by itself.

What is left is rounding, at most 2^-11 of a norm (`total_of_squares`), and what a product of sums loses below 2^-126:
at most 1e-19 of the norm of a layer, which is nothing beside the least clip of a device, 1e-12.
"""

from __future__ import annotations

import math
from typing import Protocol

import tensorflow as tf

GRAM, MATERIALISED, BY_ROW = "gram", "materialised", "by row"

SMALLEST_SQUARE = 2.0**-126
"""The least normal float32; runtimes flush what is smaller to zero, so a square below it may be measured as nothing."""

_IN_ONE_PASS = 2**14
"""Squares that are added up at once; rounding then takes at most 2^-11 of a norm."""

_LARGEST_FACTOR = 1.0e38
"""Squared norms beyond this may have saturated (float32 ends at 3.4e38): what they are multiplied by says nothing."""


class ParameterGradient(Protocol):
    """The gradients of some parameters of one layer, one per example, in whatever form is cheapest."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Which parameters of the layer these are, in the order of what the sums return."""
        ...

    def squared_norms(self) -> tf.Tensor:
        """The squared L2 norm of each example's gradient over these parameters, float32 [B]."""
        ...

    def weighted_sum(self, factors: tf.Tensor, counted: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The sum over examples of factor times gradient, one flat tensor per parameter.

        Args:
            factors: float32 [B].
            counted: bool [B]; where false the example contributes exactly zero, be its gradient NaN or infinite.
        """
        ...

    def sum(self) -> tuple[tf.Tensor, ...]:
        """The plain sum over the batch, one flat tensor per parameter, for the non-private step."""
        ...


def norm_method(*, rows: int) -> str:
    """How to find the norms of T=`rows` rows of an example: Gram for one, which is cheaper, materialised for more.

    Security: of more rows the Gram form cancels in float32. With rows that nearly cancel, its norm can come out far too
    small, and the clipped gradient was measured up to 480 times longer than the clip at inputs of 1e6 (ADR 8).
    """
    return GRAM if rows == 1 else MATERIALISED


def row_product(
    rows: tf.Tensor, output_gradient: tf.Tensor, *, copies: int, roles: tuple[str, ...]
) -> ParameterGradient:
    """The gradients of y = x·W + b, in the form that `norm_method` names for the rows of an example.

    Args:
        rows: X, float32 [B·copies, T, K].
        output_gradient: D, float32 [B·copies, T, M].
        copies: versions of each example, side by side.
        roles: of W and, if there is one, of b.
    """
    merged = _merged(rows, copies)
    form = _Gram if norm_method(rows=merged.shape[1]) == GRAM else _Materialised
    return form(merged, _merged(output_gradient, copies), roles)


def keep_counted(counted: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """`values` [B, ...] with the rows that do not count set to zero; a product would keep their NaN."""
    # Zeros that the converter cannot know: as a constant they would fill the file (650 kB for a 5k kernel at B=32).
    never = tf.reduce_any(counted & ~counted)
    zeros = tf.fill(values.shape, tf.cast(never, tf.float32))
    # The first version of where takes a condition per row (builtin SELECT), which copies whole rows; the second
    # broadcasts element by element (SELECT_V2), a hundred times slower on the reference kernel.
    return tf.compat.v1.where(counted, values, zeros)


def total_of_squares(squares: tf.Tensor) -> tf.Tensor:
    """The sum of each example's squares [B, ...] as [B], every one counted as `SMALLEST_SQUARE` more than it came out.

    Runtimes that add one after the other lose up to 2^-24 of the sum with each: measured 3% of a million, when the
    first is the largest. So many are added up in pieces. Of ordinary gradients what is counted more changes no bit.
    """
    values = _size(squares)
    if values <= _IN_ONE_PASS:
        return _rounded_up(tf.reduce_sum(squares, list(range(1, len(squares.shape)))), values)
    flat, piece = tf.reshape(squares, [-1, values]), math.isqrt(values)
    whole = values // piece * piece
    pieces = tf.reshape(tf.slice(flat, [0, 0], [-1, whole]), [-1, whole // piece, piece])
    total = tf.reduce_sum(tf.reduce_sum(pieces, 2), 1)
    if whole < values:
        total = total + tf.reduce_sum(tf.slice(flat, [0, whole], [-1, values - whole]), 1)
    return _rounded_up(total, values)


class PerExample:
    """Gradients held as they are.

    Args:
        values: float32 [B·copies, ...].
        copies: versions of each example, side by side.
        role: of the one parameter.
    """

    def __init__(self, values: tf.Tensor, *, copies: int, role: str) -> None:
        flat = tf.reshape(values, [-1, copies, _size(values)])
        self._values = tf.reduce_sum(flat, 1) if copies > 1 else tf.reshape(values, [-1, _size(values)])
        self.roles = (role,)

    def squared_norms(self) -> tf.Tensor:
        """See `ParameterGradient`."""
        return total_of_squares(self._values * self._values)

    def weighted_sum(self, factors: tf.Tensor, counted: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """See `ParameterGradient`."""
        return (tf.reduce_sum(keep_counted(counted, self._values) * tf.reshape(factors, [-1, 1]), 0),)

    def sum(self) -> tuple[tf.Tensor, ...]:
        """See `ParameterGradient`."""
        return (tf.reduce_sum(self._values, 0),)


class _Materialised:
    """Each example's gradient, held as one tensor [B, ...] per parameter."""

    def __init__(self, rows: tf.Tensor, output_gradient: tf.Tensor, roles: tuple[str, ...]) -> None:
        self.roles = roles
        self._kernels = _transposed_kernels(rows, output_gradient)
        self._biases = tf.reduce_sum(output_gradient, 1) if len(roles) > 1 else None

    def squared_norms(self) -> tf.Tensor:
        squares, count = self._kernels * self._kernels, _size(self._kernels)
        if count > _IN_ONE_PASS:
            kernel = total_of_squares(squares)
        else:
            # A mean times its count: XNNPACK of tflite-runtime 2.14 runs MEAN and leaves SUM to a kernel eight times
            # slower. The mean can be flushed to zero like the squares, so each is counted twice.
            kernel = _rounded_up(tf.reduce_mean(squares, [1, 2]) * float(count), 2 * count)
        return kernel if self._biases is None else kernel + total_of_squares(self._biases * self._biases)

    def weighted_sum(self, factors: tf.Tensor, counted: tf.Tensor) -> tuple[tf.Tensor, ...]:
        # A product and a sum: as one matrix product the converter transposes the whole stack of gradients first.
        kernels = keep_counted(counted, self._kernels) * tf.reshape(factors, [-1, 1, 1])
        kernel = _flat_kernel(tf.reduce_sum(kernels, 0))
        if self._biases is None:
            return (kernel,)
        return kernel, tf.reduce_sum(keep_counted(counted, self._biases) * tf.reshape(factors, [-1, 1]), 0)

    def sum(self) -> tuple[tf.Tensor, ...]:
        kernel = _flat_kernel(tf.reduce_sum(self._kernels, 0))
        return (kernel,) if self._biases is None else (kernel, tf.reduce_sum(self._biases, 0))


class _Gram:
    """Rows and output gradients, kept apart until the clip factors are known."""

    def __init__(self, rows: tf.Tensor, output_gradient: tf.Tensor, roles: tuple[str, ...]) -> None:
        self.roles = roles
        self._rows, self._output_gradient = rows, output_gradient

    def squared_norms(self) -> tf.Tensor:
        # A bias is a weight on a constant input of 1.
        constant_input = 1.0 if len(self.roles) > 1 else 0.0
        outputs, inputs = _row_squares(self._output_gradient), _row_squares(self._rows)
        # A factor that saturated must not be made harmless by a small other one: the larger stands for the product
        # then, four times over, so that what saturated is beyond what counts. Between 1e38 and there it only clips
        # more.
        saturated = tf.maximum(tf.maximum(outputs, inputs) - _LARGEST_FACTOR, 0.0)
        return outputs * (inputs + constant_input) + 4.0 * saturated

    def weighted_sum(self, factors: tf.Tensor, counted: tf.Tensor) -> tuple[tf.Tensor, ...]:
        rescaled = keep_counted(counted, self._output_gradient) * tf.reshape(factors, [-1, 1, 1])
        return self._product(keep_counted(counted, self._rows), rescaled)

    def sum(self) -> tuple[tf.Tensor, ...]:
        return self._product(self._rows, self._output_gradient)

    def _product(self, rows: tf.Tensor, output_gradient: tf.Tensor) -> tuple[tf.Tensor, ...]:
        inputs, outputs = rows.shape[2], output_gradient.shape[2]
        flat_gradient = tf.reshape(output_gradient, [-1, outputs])
        kernel = tf.reshape(tf.matmul(tf.reshape(rows, [-1, inputs]), flat_gradient, transpose_a=True), [-1])
        return (kernel,) if len(self.roles) == 1 else (kernel, tf.reduce_sum(flat_gradient, 0))


def _merged(x: tf.Tensor, copies: int) -> tf.Tensor:
    """[B·copies, T, n] as the rows of each example, [B, copies·T, n]."""
    return x if copies == 1 else tf.reshape(x, [-1, copies * x.shape[1], x.shape[2]])


def _size(x: tf.Tensor) -> int:
    """How many values an example has."""
    return int(x.shape[1:].num_elements())


def _transposed_kernels(rows: tf.Tensor, output_gradient: tf.Tensor) -> tf.Tensor:
    """Each example's kernel gradient as Dᵀ·X [B, M, K]; the runtime copies the transposed operand, and D is smaller."""
    return tf.matmul(output_gradient, rows, transpose_a=True)


def _flat_kernel(transposed: tf.Tensor) -> tf.Tensor:
    """A gradient [M, K] as the flat kernel [K·M]."""
    return tf.reshape(tf.transpose(transposed), [-1])


def _row_squares(x: tf.Tensor) -> tf.Tensor:
    """The squared L2 norm of each example, [B]."""
    return total_of_squares(x * x)


def _rounded_up(sums: tf.Tensor, squares: int) -> tf.Tensor:
    """Sums [B] of so many squares, each counted as `SMALLEST_SQUARE` more."""
    # Added, not a maximum: that of NaN and a number is the number on some runtimes, and the example would count.
    return sums + squares * SMALLEST_SQUARE
