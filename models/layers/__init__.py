"""One file per kind of layer, found by the class of its spec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models.errors import ModelSpecError
from models.layers.conv1d import Conv1DLayer
from models.layers.dense import DenseLayer
from models.layers.fixed import FixedLayer
from models.layers.flatten import FlattenLayer
from models.layers.global_average_pool1d import GlobalAveragePool1DLayer
from models.layers.layer import Layer
from models.layers.max_pool1d import MaxPool1DLayer
from models.layers.relu import ReLULayer
from models.specs import Conv1D, Dense, Fixed, Flatten, GlobalAveragePool1D, MaxPool1D, ReLU, Shape

REGISTRY: dict[type[Any], Callable[[Any, Shape, int], Layer]] = {
    Conv1D: Conv1DLayer,
    Dense: DenseLayer,
    Fixed: FixedLayer,
    Flatten: FlattenLayer,
    GlobalAveragePool1D: GlobalAveragePool1DLayer,
    MaxPool1D: MaxPool1DLayer,
    ReLU: ReLULayer,
}
"""Spec class to layer class; a new kind of layer is one more line."""


def bind(spec: Any, input_shape: Shape, *, copies: int) -> Layer:
    """The layer of `spec`, bound to the shape of one example's input.

    Args:
        spec: of a registered class.
        input_shape: of one window, without the batch dimension.
        copies: how many versions of each example pass through the layer in training; their gradients belong together.

    Raises:
        ModelSpecError: no layer is registered for the spec, or the shape does not fit it.
    """
    layer = REGISTRY.get(type(spec))
    if layer is None:
        known = ", ".join(sorted(kind.__name__ for kind in REGISTRY))
        raise ModelSpecError(f"No layer for {type(spec).__name__}: register it in models.layers (known: {known}).")
    return layer(spec, input_shape, copies)
