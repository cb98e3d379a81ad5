"""A fixed stage that several models begin with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from models.errors import ModelSpecError
from models.layers.fixed import FixedStage, register_fixed


@register_fixed
class ChannelScale(FixedStage):
    """Divide each channel by a public constant, so that a typical value is about 1.

    Args:
        units_per_one: one divisor per channel, in the channel's unit. A choice of the publisher from what the sensor
            and the human body can do, never a statistic of recordings.
    """

    def __init__(self, units_per_one: Sequence[float], **rest: Any) -> None:
        super().__init__(**rest)
        self._units_per_one = tuple(float(each) for each in units_per_one)

    @property
    def description(self) -> str:
        """The constants, for the manifest."""
        return f"Channels are divided by the constants {', '.join(f'{c:.6g}' for c in self._units_per_one)}."

    def build(self, input_shape: Any) -> None:
        """There must be one constant per channel."""
        if input_shape[-1] != len(self._units_per_one):
            raise ModelSpecError(
                f"Layer {self.name}: {len(self._units_per_one)} constants for input {tuple(input_shape)}."
            )
        super().build(input_shape)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Scale [N, ..., channels]."""
        return x * np.reciprocal(np.asarray(self._units_per_one, np.float32))

    def get_config(self) -> dict[str, Any]:
        """The constants, so that a bundle's Keras model can be read back."""
        return {**super().get_config(), "units_per_one": self._units_per_one}
