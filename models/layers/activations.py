"""Elementwise functions and softmax, each with a gradient in builtin operators (ReluGrad and its kin have none)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from models.errors import ModelSpecError
from models.layers.layer import Backward, Context, Parameterless
from models.layers.registry import register_layer

_Function = tuple[Callable[[tf.Tensor], Any], Callable[[Any, tf.Tensor], tf.Tensor]]


def is_positive(y: tf.Tensor) -> tf.Tensor:
    """1 where y > 0 and 0 where y = 0, for y ≥ 0; GREATER and CAST took ten times as long, outside XNNPACK."""
    return tf.math.ceil(tf.minimum(y, 1.0))


def _relu_gradient(y: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
    return gradient * is_positive(y)


def _relu6_gradient(y: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
    return gradient * (is_positive(y) * is_positive(6.0 - y))


def _tanh_gradient(y: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
    return gradient * (1.0 - y * y)


def _sigmoid_gradient(y: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
    return gradient * (y * (1.0 - y))


def _softmax_gradient(y: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
    return y * (gradient - tf.reduce_sum(gradient * y, -1, keepdims=True))


def normal_cdf(x: tf.Tensor) -> tf.Tensor:
    """Φ(x), the standard normal distribution function, to 1e-7; TFLite has no ERF.

    Abramowitz & Stegun 1964, formula 7.1.26: erfc(z) ≈ poly(1/(1 + p·z))·exp(−z²) for z ≥ 0, error at most 1.5e-7.
    """
    z = tf.maximum(x, -x) * (1.0 / math.sqrt(2.0))
    t = 1.0 / (1.0 + 0.3275911 * z)
    coefficients = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    polynomial = tf.zeros([]) * t
    for coefficient in coefficients:
        polynomial = (polynomial + coefficient) * t
    half_tail = 0.5 * polynomial * tf.exp(-z * z)
    return 0.5 + tf.sign(x) * (0.5 - half_tail)


def _gelu(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    cdf = normal_cdf(x)
    density = tf.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
    return x * cdf, cdf + x * density


def _of_output(function: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """A function whose gradient needs its output only."""

    def forward(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        y = function(x)
        return y, y

    return forward


_FUNCTIONS: dict[str, _Function] = {
    "relu": (_of_output(tf.nn.relu), _relu_gradient),
    "relu6": (_of_output(tf.nn.relu6), _relu6_gradient),
    "tanh": (_of_output(tf.tanh), _tanh_gradient),
    "sigmoid": (_of_output(tf.sigmoid), _sigmoid_gradient),
    "softmax": (_of_output(tf.nn.softmax), _softmax_gradient),
    # Hendrycks & Gimpel 2016, arXiv 1606.08415; it saves its own derivative.
    "gelu": (_gelu, lambda derivative, gradient: gradient * derivative),
}
MONOTONE = frozenset({"relu"})
"""Functions that commute with a maximum, gradient and all."""


class ActivationLayer(Parameterless):
    """A named function, value by value (softmax: over the last axis).

    Args:
        function: ``relu``, ``relu6``, ``tanh``, ``sigmoid``, ``softmax`` or ``gelu``.
        context: of one input.
    """

    def __init__(self, function: str, context: Context) -> None:
        self.function = function
        self._forward, self._gradient = _FUNCTIONS[function]
        self.output_shape = context.input_shape

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """See `Layer.forward`."""
        output: tuple[tf.Tensor, Any] = self._forward(inputs[0])
        return output

    def backward(self, weights: Sequence[tf.Tensor], saved: Any, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        return (self._gradient(saved, output_gradient),), ()


def activation_name(function: Any) -> str | None:
    """The name of one of Keras's or TensorFlow's own functions; None of any other, whatever it is called."""
    if function is None:
        return "linear"
    name = str(getattr(function, "__name__", ""))
    own = getattr(tf.keras.activations, name, None), getattr(tf.nn, name, None), getattr(tf.math, name, None)
    return name if any(function is each for each in own) else None


def activation_layer(owner: str, function: Any, context: Context) -> ActivationLayer | None:
    """The layer of a Keras activation function, or None for the identity.

    Raises:
        ModelSpecError: the function is not a known one.
    """
    name = activation_name(function)
    if name == "linear":
        return None
    if name not in _FUNCTIONS:
        called = name or f"{getattr(function, '__name__', type(function).__name__)} (not of Keras)"
        raise ModelSpecError(
            f"Layer {owner}: the activation {called} is not supported; use one of linear, {', '.join(_FUNCTIONS)}."
        )
    return ActivationLayer(name, context)


@register_layer(tf.keras.layers.Activation)
def _activation(layer: Any, context: Context) -> list[ActivationLayer]:
    made = activation_layer(layer.name, layer.activation, context)
    return [] if made is None else [made]


@register_layer(tf.keras.layers.Softmax)
def _softmax(layer: Any, context: Context) -> ActivationLayer:
    if layer.axis not in (-1, len(context.input_shape)):
        raise ModelSpecError(f"Layer {layer.name}: Softmax over axis {layer.axis}; only the last axis is supported.")
    return ActivationLayer("softmax", context)


@register_layer(tf.keras.layers.ReLU)
def _relu(layer: Any, context: Context) -> ActivationLayer:
    limit = layer.max_value
    if limit not in (None, 6.0) or layer.negative_slope != 0 or layer.threshold != 0:
        raise ModelSpecError(
            f"Layer {layer.name}: ReLU with max_value={limit}, negative_slope={layer.negative_slope}, "
            f"threshold={layer.threshold}; only the plain one and max_value=6 are supported."
        )
    return ActivationLayer("relu" if limit is None else "relu6", context)
