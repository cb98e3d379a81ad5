"""Fixed: a parameter-free stage in front of the trained layers."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from models.errors import ModelSpecError
from models.specs import Fixed, Shape


class FixedLayer:
    """Runs the stage forward; there is nothing to train before it, so nothing asks for its input's gradient."""

    def __init__(self, spec: Fixed, input_shape: Shape, copies: int = 1) -> None:
        self._stage = spec.stage
        self.output_shape = spec.stage.output_shape(input_shape)

    def forward(self, weights: Sequence[tf.Tensor], x: tf.Tensor) -> tuple[tf.Tensor, None]:
        """See `Layer.forward`."""
        return self._stage.apply(x), None

    def input_gradient(self, weights: Sequence[tf.Tensor], saved: None, output_gradient: tf.Tensor) -> tf.Tensor:
        """See `Layer.input_gradient`."""
        raise ModelSpecError("Fixed: a fixed stage has no gradient; put it before the first trained layer.")
