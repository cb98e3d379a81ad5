"""Which layer runs a Keras layer: a table from Keras class to our class, open to users."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from models.errors import ModelSpecError
from models.layers.layer import Context, Layer

Factory = Callable[[Any, Context], "Layer | Sequence[Layer]"]
_AnyFactory = TypeVar("_AnyFactory", bound=Factory)


@dataclass(frozen=True)
class Entry:
    """How a Keras class is run: one layer or a chain of them, then its ``activation`` if it has one."""

    factory: Factory
    output_activation: bool


_REGISTRY: dict[type[Any], Entry] = {}

_INSTEAD = {
    "BatchNormalization": "its statistics mix the examples of a batch, so no example has a gradient of its own; use "
    "GroupNormalization or LayerNormalization instead",
    "Lambda": "its function cannot be looked into; write a Keras layer and give it to models.layers.register_layer",
    "TFOpLambda": "an operator on tensors has no registered gradient; use a layer, such as keras.layers.Add for +",
    "SlicingOpLambda": "indexing a tensor has no registered gradient; use a layer",
    "SimpleRNN": "use GRU or LSTM instead",
    "Bidirectional": "it runs a layer over the future too; use GRU or LSTM, twice if need be, instead",
    "TimeDistributed": "use the layer itself: Dense works on every time step, Conv1D and Conv2D on their axes",
    "Functional": "a model inside a model is not taken apart; put its layers into the outer model",
    "Sequential": "a model inside a model is not taken apart; put its layers into the outer model",
    "SpatialDropout1D": "use Dropout instead",
    "Conv3D": "use Conv1D or Conv2D instead",
    "LocallyConnected1D": "use Conv1D or Dense instead",
    "MultiHeadAttention": "use GRU, LSTM or Conv1D instead",
}
"""What to use instead of Keras classes that people are likely to try."""


def register_layer(keras_class: type[Any], *, output_activation: bool = False) -> Callable[[_AnyFactory], _AnyFactory]:
    """Class decorator: run layers of `keras_class` (exactly it, not its subclasses) with the decorated class.

    Args:
        keras_class: a subclass of ``tf.keras.layers.Layer``.
        output_activation: the Keras layer applies its attribute ``activation`` to its output; a layer for it is added.

    Returns:
        A decorator. What it decorates is called with the Keras layer and a `Context`, and gives a `Layer`, or several
        that run one after the other and share the Keras layer's weights in order. An earlier entry is replaced.
    """

    def register(factory: _AnyFactory) -> _AnyFactory:
        _REGISTRY[keras_class] = Entry(factory, output_activation)
        return factory

    return register


def entry_for(keras_layer: Any) -> Entry:
    """The entry of a Keras layer's class.

    Raises:
        ModelSpecError: there is none; the text says what would work.
    """
    entry = _REGISTRY.get(type(keras_layer))
    if entry is None:
        kind = type(keras_layer).__name__
        known = ", ".join(sorted(each.__name__ for each in _REGISTRY))
        advice = _INSTEAD.get(kind, f"use one of {known}, or register yours with models.layers.register_layer")
        raise ModelSpecError(f"Layer {keras_layer.name}: {kind} cannot be trained with per-example clipping: {advice}.")
    return entry


def registered_classes() -> list[type[Any]]:
    """The Keras classes that can be run, by name."""
    return sorted(_REGISTRY, key=lambda each: each.__name__)
