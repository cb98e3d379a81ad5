"""A model's layers chained over one flat parameter vector."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from fl_protocol.bundle import ParameterSpec
from models.errors import ModelSpecError
from models.layers import bind
from models.layers.layer import Layer, TrainedLayer
from models.specs import ModelSpec


class Network:
    """The layers of a model, bound to their shapes.

    Args:
        spec: the model.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.layers: list[Layer] = []
        shape = spec.input.shape
        for layer_spec in spec.layers:
            self.layers.append(bind(layer_spec, shape, copies=spec.copies))
            shape = self.layers[-1].output_shape
        if shape != (len(spec.label.names),):
            raise ModelSpecError(f"{spec.name}: the last layer gives {shape}, expected {len(spec.label.names)} logits.")
        self.trained = [layer for layer in self.layers if isinstance(layer, TrainedLayer)]
        names = [layer.name for layer in self.trained]
        if not names or len(set(names)) != len(names):
            raise ModelSpecError(f"{spec.name}: expected at least one trained layer and unique names, got {names}.")
        self._first_trained = self.layers.index(self.trained[0])

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """The layout of the flat vector, layer by layer in the order of the forward pass."""
        named = [(f"{layer.name}/{p.role}", p.shape) for layer in self.trained for p in layer.parameters]
        offsets = itertools.accumulate((math.prod(shape) for _, shape in named), initial=0)
        return tuple(
            ParameterSpec(name=name, shape=shape, offset=offset)
            for (name, shape), offset in zip(named, offsets, strict=False)
        )

    @property
    def num_parameters(self) -> int:
        """d, the length of the flat vector."""
        return sum(math.prod(p.shape) for layer in self.trained for p in layer.parameters)

    @property
    def norm_methods(self) -> dict[str, str]:
        """Per trained layer, ``gram`` or ``materialised``."""
        return {layer.name: layer.norm_method for layer in self.trained}

    def split(self, params: tf.Tensor) -> list[list[tf.Tensor]]:
        """Each layer's own tensors, cut from the flat vector [d]."""
        pieces = iter(
            # tf.slice, not an index: the gradient and the converter's fusions of StridedSlice have no builtin.
            tf.reshape(tf.slice(params, [p.offset], [math.prod(p.shape)]), p.shape)
            for p in self.parameters
        )
        return [
            [next(pieces) for _ in layer.parameters] if isinstance(layer, TrainedLayer) else [] for layer in self.layers
        ]

    def forward(self, weights: list[list[tf.Tensor]], x: tf.Tensor) -> tuple[tf.Tensor, list[Any]]:
        """Logits [B, K] of windows x [B, ...], and what each layer saved."""
        saved = []
        for layer, own in zip(self.layers, weights, strict=True):
            x, kept = layer.forward(own, x)
            saved.append(kept)
        return x, saved

    def backward(
        self,
        weights: list[list[tf.Tensor]],
        saved: list[Any],
        logits_gradient: tf.Tensor,
        visit: Callable[[TrainedLayer, Any, tf.Tensor], Any],
    ) -> list[Any]:
        """Walk back from the logits and call `visit(layer, saved, output_gradient)` at each trained layer.

        Returns:
            What `visit` returned, in the order of the flat vector.
        """
        visited = []
        gradient = logits_gradient
        for index in range(len(self.layers) - 1, self._first_trained - 1, -1):
            layer = self.layers[index]
            if isinstance(layer, TrainedLayer):
                visited.append(visit(layer, saved[index], gradient))
            if index > self._first_trained:
                gradient = layer.input_gradient(weights[index], saved[index], gradient)
        return visited[::-1]
