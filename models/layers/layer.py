"""What a layer has to be able to do so that a graph can clip every example's gradient.

Book-keeping (Bu et al. 2022, arXiv 2210.00038): one backward pass brings the gradient of each example's loss to every
layer's output. From that and from what the layer saved on the way forward, each layer gives the gradients of its
parameters in a form (`models.layers.gradients`) that knows every example's squared norm and, once the clip factors are
known, the sum of the clipped gradients. There is no second backward pass.

N is the batch dimension of a layer, B·copies with augmentation. Every operation works on each example's rows
separately, so a NaN stays in its own example until the sums, where the gradient forms drop it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import tensorflow as tf

from models.layers.gradients import ParameterGradient
from models.specs import Shape


@dataclass(frozen=True)
class Parameter:
    """One trained tensor of a layer: its role (``kernel``, ``bias``) and shape."""

    role: str
    shape: Shape


@dataclass(frozen=True)
class Context:
    """What a layer is told when it is bound.

    Args:
        input_shapes: of one example, one per input of the layer.
        copies: how many versions of each example pass through in training; their gradients belong together.
    """

    input_shapes: tuple[Shape, ...]
    copies: int

    @property
    def input_shape(self) -> Shape:
        """The shape of the only input."""
        (shape,) = self.input_shapes
        return shape


Backward = tuple[tuple[tf.Tensor, ...], tuple[ParameterGradient, ...]]
"""Gradients with respect to each input, and those of the parameters."""


class Layer(Protocol):
    """A layer bound to the static shape of one example."""

    @property
    def output_shape(self) -> Shape:
        """The shape of one example's output."""
        ...

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """In the order of the Keras layer's weights; empty for a layer that has none."""
        ...

    @property
    def norm_methods(self) -> dict[str, str]:
        """By parameter role, how per-example norms are computed; chosen from the static shapes."""
        ...

    def forward(self, weights: Sequence[tf.Tensor], *inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """The output [N, *output_shape] of inputs [N, *input_shape], and whatever `backward` will need."""
        ...

    def backward(self, weights: Sequence[tf.Tensor], saved: Any, output_gradient: tf.Tensor) -> Backward:
        """From the gradient of each example's loss with respect to the output to those of inputs and parameters."""
        ...


class Parameterless:
    """The part of `Layer` that layers without parameters share."""

    parameters: tuple[Parameter, ...] = ()

    @property
    def norm_methods(self) -> dict[str, str]:
        """None."""
        return {}
