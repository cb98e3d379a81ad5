"""LayerNormalization and GroupNormalization: statistics of one example alone, so that every example has a gradient.

With x̂ = (x − μ)/√(σ² + ε) over the m values of a group and y = x̂·γ + β, the gradient g = ∂L/∂x̂ goes back as
∂L/∂x = (g − mean(g) − x̂·mean(g·x̂))/√(σ² + ε) (Ba, Kiros & Hinton 2016, arXiv 1607.06450; Wu & He 2018, arXiv
1803.08494, for groups of channels).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from models.errors import ModelSpecError
from models.layers.gradients import MATERIALISED, ParameterGradient, PerExample
from models.layers.layer import Backward, Context, Parameter
from models.layers.registry import register_layer
from models.specs import Shape


@register_layer(tf.keras.layers.LayerNormalization)
def _layer_normalization(layer: Any, context: Context) -> NormalisationLayer:
    rank = len(context.input_shape)
    # Keras counts the batch dimension.
    axes = sorted(axis % (rank + 1) for axis in layer.axis)
    if axes != list(range(rank + 1 - len(axes), rank + 1)) or 0 in axes:
        raise ModelSpecError(
            f"Layer {layer.name}: LayerNormalization over the axes {axes}; only the last axis or several last ones are "
            "supported: put what is normalised last."
        )
    scaled = context.input_shape[rank - len(axes) :]
    rows, values = math.prod(context.input_shape[: rank - len(axes)]), math.prod(scaled)
    return NormalisationLayer(layer, context, scaled=scaled, grouped=(rows, values), mean=_mean_of_rows)


@register_layer(tf.keras.layers.GroupNormalization)
def _group_normalization(layer: Any, context: Context) -> NormalisationLayer:
    *spatial, channels = context.input_shape
    if layer.axis not in (-1, len(context.input_shape)):
        raise ModelSpecError(
            f"Layer {layer.name}: GroupNormalization over axis {layer.axis}; only the last axis is supported: put the "
            "channels last."
        )
    groups = channels if layer.groups == -1 else layer.groups
    if groups == 1:
        whole = (1, math.prod(context.input_shape))
        return NormalisationLayer(layer, context, scaled=(channels,), grouped=whole, mean=_mean_of_rows)
    return NormalisationLayer(
        layer,
        context,
        scaled=(channels,),
        grouped=(math.prod(spatial), channels),
        mean=_mean_of_groups(channels, groups),
    )


def _mean_of_rows(x: tf.Tensor) -> tf.Tensor:
    """[N, rows, values] to [N, rows, 1]."""
    return tf.reduce_mean(x, 2, keepdims=True)


def _mean_of_groups(channels: int, groups: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function from [N, positions, channels] to [N, 1, channels]: at each channel the mean of its group."""
    # A product with a constant matrix spreads a group's mean over its channels, so that all that follows broadcasts
    # whole rows: less than half the time of reducing over two of four axes.
    size = channels // groups
    share = np.kron(np.eye(groups), np.full((size, size), 1 / size)).astype(np.float32)

    return lambda x: tf.matmul(tf.reduce_mean(x, 1, keepdims=True), share)


class NormalisationLayer:
    """y = x̂·γ + β; it saves x̂ and 1/√(σ² + ε).

    Args:
        layer: the Keras layer: ``epsilon``, ``scale`` (whether there is a γ) and ``center`` (a β).
        context: of one input.
        scaled: the shape of γ and β, the last axes of the input.
        grouped: a shape of two axes, in which x is normalised.
        mean: from there to the mean of each value's group, in a shape that broadcasts.
    """

    def __init__(
        self,
        layer: Any,
        context: Context,
        *,
        scaled: Shape,
        grouped: Shape,
        mean: Callable[[tf.Tensor], tf.Tensor],
    ) -> None:
        self.output_shape, self._copies = context.input_shape, context.copies
        self._grouped, self._mean, self._epsilon = grouped, mean, float(layer.epsilon)
        # Where γ and β apply: rows of as many values as they have.
        self._values = math.prod(scaled)
        self._rows = math.prod(context.input_shape) // self._values
        roles = (["gamma"] if layer.scale else []) + (["beta"] if layer.center else [])
        self.parameters = tuple(Parameter(role, scaled) for role in roles)

    @property
    def norm_methods(self) -> dict[str, str]:
        """See `Layer.norm_methods`."""
        return {parameter.role: MATERIALISED for parameter in self.parameters}

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """See `Layer.forward`."""
        x = _shaped(inputs[0], self._grouped)
        deviation = x - self._mean(x)
        variance = self._mean(deviation * deviation)
        inverse = tf.math.rsqrt(variance + self._epsilon)
        normal = deviation * inverse
        y, named = _shaped(normal, (self._rows, self._values)), self._named(weights)
        y = y * named["gamma"] if "gamma" in named else y
        y = y + named["beta"] if "beta" in named else y
        return _shaped(y, self.output_shape), (normal, inverse)

    def backward(self, weights: Sequence[tf.Tensor], saved: Any, output_gradient: tf.Tensor) -> Backward:
        """See `Layer.backward`."""
        normal, inverse = saved
        gradient, named = _shaped(output_gradient, (self._rows, self._values)), self._named(weights)
        held = {"gamma": gradient * _shaped(normal, (self._rows, self._values)), "beta": gradient}
        forms: list[ParameterGradient] = [
            PerExample(tf.reduce_sum(held[role], 1), copies=self._copies, role=role) for role in named
        ]
        g = _shaped(gradient * named["gamma"] if "gamma" in named else gradient, self._grouped)
        dx = (g - self._mean(g) - normal * self._mean(g * normal)) * inverse
        return (_shaped(dx, self.output_shape),), tuple(forms)

    def _named(self, weights: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
        """The weights that there are, flat, by role."""
        pairs = zip(self.parameters, weights, strict=True)
        return {parameter.role: tf.reshape(weight, [self._values]) for parameter, weight in pairs}


def _shaped(x: tf.Tensor, shape: Shape) -> tf.Tensor:
    """The same examples in another shape."""
    return x if tuple(x.shape[1:]) == tuple(shape) else tf.reshape(x, [-1, *shape])
