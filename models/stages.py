"""Fixed stages that several models use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import ModelSpecError
from models.specs import Shape


@dataclass(frozen=True)
class ChannelScale:
    """Divide each channel by a public constant, so that a typical value is about 1.

    Args:
        units_per_one: one divisor per channel, in the channel's unit. A choice of the publisher from what the sensor
            and the human body can do, never a statistic of recordings.
    """

    units_per_one: tuple[float, ...]

    @property
    def description(self) -> str:
        """The constants, for the manifest."""
        return f"Channels are divided by the constants {', '.join(f'{c:.6g}' for c in self.units_per_one)}."

    def output_shape(self, input_shape: Shape) -> Shape:
        """Unchanged; there must be one constant per channel."""
        if input_shape[-1] != len(self.units_per_one):
            raise ModelSpecError(f"ChannelScale: {len(self.units_per_one)} constants for input {input_shape}.")
        return input_shape

    def apply(self, x: Any) -> Any:
        """Scale [B, samples, channels]."""
        return x * np.reciprocal(np.asarray(self.units_per_one, np.float32))
