"""What a layer has to be able to do so that a graph can clip every example's gradient.

Book-keeping (Bu et al. 2022, arXiv 2210.00038): one backward pass brings the gradient of each example's loss to every
layer's output. From that and from what the layer saved on the way forward, each trained layer gives the squared norm
of each example's own gradient and, once the clip factors are known, the sum of the clipped gradients. There is no
second backward pass.

Every operation works on each example's rows separately, so a NaN stays in its own example until the sums, where
`models.layers.rows` drops it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import tensorflow as tf

from models.specs import Initializer, Shape

GRAM, MATERIALISED = "gram", "materialised"


@dataclass(frozen=True)
class Parameter:
    """One tensor of a layer: its role (``kernel``, ``bias``), shape, and how it starts."""

    role: str
    shape: Shape
    initializer: Initializer


class Layer(Protocol):
    """A layer bound to the static shape of one example; B is the batch dimension throughout."""

    @property
    def output_shape(self) -> Shape:
        """The shape of one example's output."""
        ...

    def forward(self, weights: Sequence[tf.Tensor], x: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """The output [B, *output_shape], and whatever the backward pass will need."""
        ...

    def input_gradient(self, weights: Sequence[tf.Tensor], saved: Any, output_gradient: tf.Tensor) -> tf.Tensor:
        """The gradient of each example's loss with respect to this layer's input."""
        ...


class ExampleGradients(Protocol):
    """The parameter gradients of one layer, one per example, in whatever form is cheapest."""

    def squared_norms(self) -> tf.Tensor:
        """The squared L2 norm of each example's gradient over all parameters of the layer, float32 [B]."""
        ...

    def weighted_sum(self, factors: tf.Tensor, counted: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The sum over examples of factor times gradient, one flat tensor per parameter.

        Args:
            factors: float32 [B].
            counted: bool [B]; where false the example contributes exactly zero, be its gradient NaN or infinite.
        """
        ...


@runtime_checkable
class TrainedLayer(Layer, Protocol):
    """A layer with parameters."""

    @property
    def name(self) -> str:
        """Unique within the model."""
        ...

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """In the order in which they lie in the flat vector."""
        ...

    @property
    def norm_method(self) -> str:
        """``gram`` or ``materialised``, chosen from the static shapes."""
        ...

    def example_gradients(self, saved: Any, output_gradient: tf.Tensor) -> ExampleGradients:
        """The gradients of each example, for the private step."""
        ...

    def summed_gradient(self, saved: Any, output_gradient: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The plain sum over the batch, one flat tensor per parameter, for the non-private step."""
        ...
