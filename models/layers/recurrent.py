"""GRU and LSTM, unrolled over the time steps of a window and differentiated backwards through time.

One matrix product projects the inputs of all steps; a step then adds its product with the previous state. On the way
back a step's gate gradients are the gradient of its state, repeated for each gate, times slopes that are computed for
all steps at once; so the loop holds few operators, each of which costs a runtime a microsecond or more whatever its
size. The two kernels see rows: the inputs, and the states before each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from models.errors import ModelSpecError
from models.layers.gradients import norm_method, row_product
from models.layers.layer import Backward, Context, Parameter
from models.layers.registry import register_layer

_UNSUPPORTED = ("go_backwards", "stateful", "return_state", "time_major", "dropout", "recurrent_dropout")


class _RecurrentLayer:
    """What GRU and LSTM share: shapes, parameters, and rows for the gradient forms."""

    gates: int
    bias_roles: tuple[str, ...]

    def __init__(self, layer: Any, context: Context) -> None:
        _check(layer, context)
        self._steps, inputs = context.input_shape
        self._units, self._sequences, self._copies = layer.units, layer.return_sequences, context.copies
        self.output_shape = (self._steps, self._units) if self._sequences else (self._units,)
        width = self.gates * self._units
        kernels = (Parameter("kernel", (inputs, width)), Parameter("recurrent_kernel", (self._units, width)))
        biases = tuple(Parameter(role, (width,)) for role in self.bias_roles) if layer.use_bias else ()
        self.parameters = (*kernels, *biases)
        rows = context.copies * self._steps
        self.norm_methods = dict.fromkeys(("kernel", "recurrent_kernel"), norm_method(rows=rows))

    def _output(self, states: list[tf.Tensor]) -> tf.Tensor:
        """The states that Keras gives: all or the last."""
        return tf.stack(states, 1) if self._sequences else states[-1]

    def _arriving(self, output_gradient: tf.Tensor) -> list[tf.Tensor | None]:
        """The gradient that reaches each step's state from outside."""
        if self._sequences:
            return list(tf.unstack(output_gradient, axis=1))
        return [None] * (self._steps - 1) + [output_gradient]

    def _finished(
        self, kernel: tf.Tensor, x: tf.Tensor, before: tf.Tensor, to_input: tf.Tensor, to_state: tf.Tensor
    ) -> Backward:
        """Gate gradients [N, T, gates·u] as seen by the input kernel and by the recurrent one, handed over."""
        biases = tuple(parameter.role for parameter in self.parameters[2:])
        roles = [("kernel", *biases[:1]), ("recurrent_kernel", *biases[1:])]
        pairs = zip([(x, to_input), (before, to_state)], roles, strict=True)
        forms = tuple(row_product(*pair, copies=self._copies, roles=role) for pair, role in pairs)
        return (tf.matmul(to_input, kernel, transpose_b=True),), forms


@register_layer(tf.keras.layers.GRU)
class GRULayer(_RecurrentLayer):
    """z, r = σ(x·W + b + h·U + c), ĥ = tanh(x·W + b + r∘(h·U + c)), h ← z∘h + (1 − z)∘ĥ.

    Cho et al. 2014, arXiv 1406.1078, in the form of Keras's ``reset_after=True``, gates in the order z, r, ĥ.
    """

    gates, bias_roles = 3, ("input_bias", "recurrent_bias")

    def __init__(self, layer: Any, context: Context) -> None:
        if not layer.reset_after:
            raise ModelSpecError(f"Layer {layer.name}: GRU with reset_after=False; use reset_after=True.")
        super().__init__(layer, context)

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """See `Layer.forward`; it saves x and by step z, r, h·U of ĥ, ĥ and h."""
        (x,), cut = inputs, [2 * self._units, self._units]
        projected = tf.matmul(x, weights[0])
        to_gates, to_candidate = tf.split(projected if len(weights) == 2 else projected + weights[2], cut, 2)
        bias = None
        if len(weights) > 2:
            gates_bias, bias = tf.split(weights[3], cut)
            to_gates = to_gates + gates_bias
        kept: list[tuple[Any, ...]] = []
        for gates, outer in zip(tf.unstack(to_gates, axis=1), tf.unstack(to_candidate, axis=1), strict=True):
            state = kept[-1][4] if kept else None
            recurrent, inner = tf.split(tf.matmul(state, weights[1]), cut, 1) if kept else (None, None)
            z, r = tf.split(tf.sigmoid(_sum(gates, recurrent)), 2, 1)
            biased = inner if bias is None else _sum(inner, bias)
            candidate = tf.tanh(outer if biased is None else outer + r * biased)
            new = candidate + z * (state - candidate) if kept else candidate - z * candidate
            kept.append((z, r, inner, candidate, new))
        return self._output([step[4] for step in kept]), (x, kept)

    def backward(self, weights: Sequence[tf.Tensor], saved: Any, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        x, kept = saved
        before = _after_zero([step[4] for step in kept])
        z, r, candidate = (tf.stack([step[i] for step in kept], 1) for i in (0, 1, 3))
        inner = _after_zero([step[2] for step in kept[1:]] + [kept[0][4]])
        inner = inner + tf.split(weights[3], 3)[2] if len(weights) > 2 else inner
        # From ∂L/∂h to each gate before its function; the candidate's as h·U sees it, and as the inputs do.
        to_candidate = (1.0 - z) * (1.0 - candidate * candidate)
        through_reset = to_candidate * r
        slopes = [(before - candidate) * z * (1.0 - z), through_reset * inner * (1.0 - r), through_reset]
        by_step = tf.unstack(tf.concat(slopes, 2), axis=1)
        carried, states, gates = None, [], []
        for step, arriving in zip(reversed(range(self._steps)), reversed(self._arriving(output_gradient)), strict=True):
            state = _sum(carried, arriving)
            gates.append(tf.concat([state, state, state], 1) * by_step[step])
            states.append(state)
            if step:
                carried = state * kept[step][0] + _through(weights[1], gates[-1])
        to_state = tf.stack(gates[::-1], 1)
        shared = tf.split(to_state, [2 * self._units, self._units], 2)[0]
        to_input = tf.concat([shared, tf.stack(states[::-1], 1) * to_candidate], 2)
        return self._finished(weights[0], x, before, to_input, to_state)


@register_layer(tf.keras.layers.LSTM)
class LSTMLayer(_RecurrentLayer):
    """i, f, g, o = σ, σ, tanh, σ of x·W + b + h·U, c ← f∘c + i∘g, h = o∘tanh(c) (Hochreiter & Schmidhuber 1997)."""

    gates, bias_roles = 4, ("bias",)

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """See `Layer.forward`; it saves x and by step i, f, g, o, tanh(c), c and h."""
        projected = tf.matmul(inputs[0], weights[0])
        projected = projected + weights[2] if len(weights) > 2 else projected
        kept: list[tuple[tf.Tensor, ...]] = []
        for row in tf.unstack(projected, axis=1):
            total = row + tf.matmul(kept[-1][6], weights[1]) if kept else row
            # σ of all four at once, though g does not use its own: one operator less.
            i, f, _, o = tf.split(tf.sigmoid(total), 4, 1)
            g = tf.tanh(tf.split(total, 4, 1)[2])
            cell = f * kept[-1][5] + i * g if kept else i * g
            shown = tf.tanh(cell)
            kept.append((i, f, g, o, shown, cell, o * shown))
        return self._output([step[6] for step in kept]), (inputs[0], kept)

    def backward(self, weights: Sequence[tf.Tensor], saved: Any, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        x, kept = saved
        i, f, g, o, shown = (tf.stack([step[n] for step in kept], 1) for n in range(5))
        cells_before = _after_zero([step[5] for step in kept])
        # From ∂L/∂c to i, f and g before their functions, and from ∂L/∂h to o and to c.
        slopes = [g * i * (1.0 - i), cells_before * f * (1.0 - f), i * (1.0 - g * g), shown * o * (1.0 - o)]
        by_step = tf.unstack(tf.concat(slopes, 2), axis=1)
        to_cell = tf.unstack(o * (1.0 - shown * shown), axis=1)
        carried, carried_cell, gates = None, None, []
        for step, arriving in zip(reversed(range(self._steps)), reversed(self._arriving(output_gradient)), strict=True):
            state = _sum(carried, arriving)
            cell = _sum(carried_cell, state * to_cell[step])
            gates.append(tf.concat([cell, cell, cell, state], 1) * by_step[step])
            if step:
                carried = _through(weights[1], gates[-1])
                carried_cell = cell * kept[step][1]
        to_gates, before = tf.stack(gates[::-1], 1), _after_zero([step[6] for step in kept])
        return self._finished(weights[0], x, before, to_gates, to_gates)


def _sum(first: tf.Tensor | None, second: tf.Tensor | None) -> tf.Tensor:
    """The sum of the gradients that are there; one is."""
    return second if first is None else first if second is None else first + second


def _through(kernel: tf.Tensor, gates: tf.Tensor) -> tf.Tensor:
    """Gate gradients [N, gates·u] back to the state; as three axes, since XNNPACK refuses a product of two here."""
    product = tf.matmul(tf.reshape(gates, [1, -1, kernel.shape[1]]), kernel, transpose_b=True)
    return tf.reshape(product, [-1, kernel.shape[0]])


def _after_zero(states: list[tf.Tensor]) -> tf.Tensor:
    """Zeros, then all of T states but the last: what each step has before it, [N, T, u]."""
    if len(states) == 1:
        return tf.expand_dims(states[0] * 0.0, 1)
    return tf.pad(tf.stack(states[:-1], 1), [[0, 0], [1, 0], [0, 0]])


def _check(layer: Any, context: Context) -> None:
    """The layer is one that this file runs."""
    kind = type(layer).__name__
    if len(context.input_shapes) != 1:
        raise ModelSpecError(f"Layer {layer.name}: {kind} with an initial state is not supported; leave it out.")
    for option, wanted in {"activation": "tanh", "recurrent_activation": "sigmoid"}.items():
        found = getattr(getattr(layer, option), "__name__", "unknown")
        if found != wanted:
            raise ModelSpecError(f"Layer {layer.name}: {kind} with {option}={found}; only {wanted} is supported.")
    for option in _UNSUPPORTED:
        if getattr(layer, option, None):
            raise ModelSpecError(f"Layer {layer.name}: {kind} with {option}={getattr(layer, option)}; leave it out.")
