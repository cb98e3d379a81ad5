"""Embedding: rows of a table, looked up by whole numbers that arrive as float32 like every input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from models.errors import ModelSpecError
from models.layers.gradients import BY_ROW, MATERIALISED, ParameterGradient, keep_counted, row_product, total_of_squares
from models.layers.layer import Backward, Context, Parameter
from models.layers.registry import register_layer

_LARGEST_ID = 2**24
"""Whole numbers up to here are exact in float32."""


@register_layer(tf.keras.layers.Embedding)
class EmbeddingLayer:
    """y[t] = E[id[t]]; it saves the ids [N, T] as float32, truncated and held within the table."""

    def __init__(self, layer: Any, context: Context) -> None:
        if layer.mask_zero:
            raise ModelSpecError(
                f"Layer {layer.name}: Embedding with mask_zero=True; masks are not passed on, so use mask_zero=False "
                "and let the model learn what id 0 means."
            )
        if layer.input_dim > _LARGEST_ID:
            raise ModelSpecError(f"Layer {layer.name}: Embedding of {layer.input_dim} ids; at most {_LARGEST_ID}.")
        self.vocabulary, self._units, self._copies = layer.input_dim, layer.output_dim, context.copies
        self._input_shape, self._places = context.input_shape, math.prod(context.input_shape)
        self.output_shape = (*context.input_shape, layer.output_dim)
        self.parameters = (Parameter("embeddings", (layer.input_dim, layer.output_dim)),)
        # Per example: adding up the gradients of places that share an id, or the table's gradient itself, passed over
        # for the norm and for the sum.
        places = context.copies * self._places
        by_row = places * places * (self._units + 4) < 2 * self.vocabulary * self._units
        self._method = BY_ROW if by_row else MATERIALISED

    @property
    def norm_methods(self) -> dict[str, str]:
        """See `Layer.norm_methods`."""
        return {"embeddings": self._method}

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Layer.forward`."""
        # Security: no input may read outside of the table. Held within it first, because casting what no int32 can
        # hold is undefined; and again as int32, because NaN may pass a maximum and come out of the cast as anything.
        held = tf.minimum(tf.maximum(inputs[0], 0.0), float(self.vocabulary - 1))
        ids = tf.minimum(tf.maximum(tf.cast(held, tf.int32), 0), self.vocabulary - 1)
        return tf.gather(weights[0], ids), tf.cast(tf.reshape(ids, [-1, self._places]), tf.float32)

    def backward(self, weights: Sequence[tf.Tensor], saved: tf.Tensor, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        gradient = tf.reshape(output_gradient, [-1, self._places, self._units])
        form: ParameterGradient
        if self._method == BY_ROW:
            form = _Lookup(saved, gradient, vocabulary=self.vocabulary, copies=self._copies)
        else:
            rows = tf.one_hot(tf.cast(saved, tf.int32), self.vocabulary)
            form = row_product(rows, gradient, copies=self._copies, roles=("embeddings",))
        # Steps have no slope: what computed the ids gets none.
        return (tf.reshape(saved * 0.0, [-1, *self._input_shape]),), (form,)


class _Lookup:
    """The gradient of each looked-up row, at every place that looked it up; the table's is not formed per example.

    Args:
        ids: whole numbers below `vocabulary`, float32 [B·copies, T].
        output_gradient: D, float32 [B·copies, T, M].
        vocabulary: V, rows of the table.
        copies: versions of each example, side by side.
    """

    def __init__(self, ids: tf.Tensor, output_gradient: tf.Tensor, *, vocabulary: int, copies: int) -> None:
        self.roles: tuple[str, ...] = ("embeddings",)
        places, units = copies * output_gradient.shape[1], output_gradient.shape[2]
        self._ids = tf.reshape(ids, [-1, places])
        self._vocabulary = vocabulary
        gradient = tf.reshape(output_gradient, [-1, places, units])
        if places == 1:
            self._shared, self._shares = gradient, gradient
            return
        apart = tf.reshape(self._ids, [-1, places, 1]) - tf.reshape(self._ids, [-1, 1, places])
        # 1 where whole numbers are equal, else 0.
        same = tf.nn.relu(1.0 - apart * apart)
        # Each place holds its row's whole gradient; of places with one id, each passes on its share.
        self._shared = tf.matmul(same, gradient)
        self._shares = self._shared / tf.reduce_sum(same, 2, keepdims=True)

    def squared_norms(self) -> tf.Tensor:
        """Of what is summed, rounding and all: a product of the places' gradients would cancel (ADR 8)."""
        # Every term is a square over a count, so none is negative.
        return total_of_squares(self._shared * self._shares)

    def weighted_sum(self, factors: tf.Tensor, counted: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """See `ParameterGradient`."""
        return self._scattered(keep_counted(counted, self._shares) * tf.reshape(factors, [-1, 1, 1]))

    def sum(self) -> tuple[tf.Tensor, ...]:
        """See `ParameterGradient`."""
        return self._scattered(self._shares)

    def _scattered(self, rows: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Rows [B, T, M] added up in the rows of the table that they came from."""
        units = rows.shape[2]
        ids = tf.cast(tf.reshape(self._ids, [-1, 1]), tf.int32)
        table = tf.scatter_nd(ids, tf.reshape(rows, [-1, units]), [self._vocabulary, units])
        return (tf.reshape(table, [-1]),)
