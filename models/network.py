"""A Keras model's layers over one flat parameter vector, forward and back."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from fl_protocol.bundle import MAX_MEMBER_BYTES
from fl_protocol.model_manifest import ClipGroup, DropoutMask, LayerInfo, ParameterSpec
from models.errors import ModelSpecError
from models.keras_nodes import Node, bound_nodes, input_shape, maximum_first
from models.layers.activations import ActivationLayer
from models.layers.dropout import DropoutLayer
from models.layers.fixed import FixedLayer
from models.layers.gradients import ParameterGradient
from models.losses import FINAL_ACTIVATION, Loss
from models.specs import ModelSpec


@dataclass(frozen=True)
class Pass:
    """What a forward pass leaves for the way back."""

    output: tf.Tensor
    window: tf.Tensor
    saved: list[Any]


class Network:
    """The layers of a model, bound to their shapes and laid out in one vector, shared layers before personal ones.

    Args:
        spec: the model.

    Raises:
        ModelSpecError: the model cannot be trained with per-example clipping; the text names the layer.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._check_input()
        nodes = self._without_final_activation(bound_nodes(spec.model, copies=spec.copies))
        self._output_shapes = {node.name: node.layer.output_shape for node in nodes}
        self.nodes = maximum_first(nodes)
        self._trained = [index for index, node in enumerate(self.nodes) if node.is_trained]
        self._check_names()
        # Stable: within each part the order of the forward pass.
        self._layout = sorted(self._trained, key=lambda index: self.nodes[index].name in spec.personal_layers)
        self._needed = self._needs_gradient()
        if 4 * self.num_parameters > MAX_MEMBER_BYTES // 2:
            raise ModelSpecError(
                f"{spec.name}: {self.num_parameters:,} parameters are more than a bundle holds "
                f"({MAX_MEMBER_BYTES // 8:,}); use smaller layers."
            )
        self._first_window = self._window_before_dropout(self.nodes[self._trained[0]].inputs[0])
        shapes = [spec.input.shape, *(node.layer.output_shape for node in self.nodes)]
        self.loss = Loss(spec, output_shape=shapes[-1], target_shape=shapes[self._first_window])
        self.norm_clips = self._checked_norm_clips()

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """The layout of the flat vector."""
        named = [(f"{self.nodes[i].name}/{p.role}", p.shape) for i in self._layout for p in self._parameters(i)]
        offsets = itertools.accumulate((math.prod(shape) for _, shape in named), initial=0)
        return tuple(
            ParameterSpec(name=name, shape=shape, offset=offset)
            for (name, shape), offset in zip(named, offsets, strict=False)
        )

    @property
    def num_parameters(self) -> int:
        """d, the length of the flat vector."""
        return sum(math.prod(p.shape) for i in self._layout for p in self._parameters(i))

    @property
    def num_shared_parameters(self) -> int:
        """How many of them, from the start, are not of personal layers."""
        personal = self.spec.personal_layers
        shared = [i for i in self._layout if self.nodes[i].name not in personal]
        return sum(math.prod(p.shape) for i in shared for p in self._parameters(i))

    @property
    def initial_parameters(self) -> NDArray[np.float32]:
        """The Keras model's own weights as the flat vector, float32 [d]."""
        return np.concatenate([weight.ravel() for i in self._layout for weight in self.nodes[i].initial])

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """One entry per Keras layer, in the order of the Keras model."""
        found = []
        for name, shape in self._output_shapes.items():
            own = [node for node in self.nodes if node.name == name]
            trained = [node.layer for node in own if node.is_trained]
            found.append(
                LayerInfo(
                    name=name,
                    kind=own[0].kind,
                    output_shape=shape,
                    num_parameters=sum(math.prod(p.shape) for layer in trained for p in layer.parameters),
                    norm_methods={role: how for layer in trained for role, how in layer.norm_methods.items()},
                )
            )
        return tuple(found)

    @property
    def dropout(self) -> tuple[DropoutMask, ...]:
        """The masks that the host feeds, in the order of their columns."""
        return tuple(
            DropoutMask(layer=node.name, rate=node.layer.rate, units=node.layer.units)
            for node in self.nodes
            if isinstance(node.layer, DropoutLayer)
        )

    @property
    def preprocessing(self) -> str:
        """What the graph does to an example before the trained layers; the host hands over raw samples."""
        stages = [node.layer.description for node in self.nodes if isinstance(node.layer, FixedLayer)]
        text = " Then: ".join(stages) if stages else "None: the samples enter the layers as they are."
        augmentation = self.spec.augmentation
        return text if augmentation is None else f"{text} In training only, augmentation: {augmentation.description}"

    def split(self, params: tf.Tensor) -> list[list[tf.Tensor]]:
        """Each node's own tensors: cut from the flat vector [d], or constants if it is frozen."""
        weights = [[tf.constant(weight) for weight in node.initial] if node.frozen else [] for node in self.nodes]
        at = 0
        for index in self._layout:
            for parameter in self._parameters(index):
                size = math.prod(parameter.shape)
                # tf.slice, not an index: StridedSlice brings fusions and a gradient without a builtin.
                weights[index].append(tf.reshape(tf.slice(params, [at], [size]), parameter.shape))
                at += size
        return weights

    def forward(self, weights: list[list[tf.Tensor]], x: tf.Tensor, *, dropout: tf.Tensor | None = None) -> Pass:
        """Run the model.

        Args:
            weights: of `split`.
            x: float32 [N, ...].
            dropout: masks [N, units of all layers]; without them dropout does nothing.
        """
        values, saved = [x], []
        masks = iter(() if dropout is None or not self.dropout else self._masks(dropout))
        for node, own in zip(self.nodes, weights, strict=True):
            inputs = [values[source] for source in node.inputs]
            if isinstance(node.layer, DropoutLayer) and dropout is not None:
                inputs.append(next(masks))
            value, kept = node.layer.forward(own, *inputs)
            values.append(value)
            saved.append(kept)
        return Pass(output=values[-1], window=values[self._first_window], saved=saved)

    def backward(
        self, weights: list[list[tf.Tensor]], saved: list[Any], output_gradient: tf.Tensor
    ) -> dict[int, tuple[ParameterGradient, ...]]:
        """Walk back from the gradient at the output; the parameter gradients of every trained node, by its number."""
        found: dict[int, tuple[ParameterGradient, ...]] = {}
        waiting: dict[int, list[tf.Tensor]] = {len(self.nodes): [output_gradient]}
        for index in range(len(self.nodes) - 1, -1, -1):
            node, arrived = self.nodes[index], waiting.pop(index + 1, [])
            if not self._needed[index + 1] or not arrived:
                continue
            gradient = arrived[0] if len(arrived) == 1 else tf.add_n(arrived)
            to_inputs, own = node.layer.backward(weights[index], saved[index], gradient)
            if node.is_trained:
                found[index] = own
            for source, part in zip(node.inputs, to_inputs, strict=True):
                if self._needed[source]:
                    waiting.setdefault(source, []).append(part)
        return found

    def joined(self, sums: Mapping[int, Sequence[tuple[tuple[str, ...], tuple[tf.Tensor, ...]]]]) -> tf.Tensor:
        """One flat vector [d] from what each node's gradient forms summed up: roles and their flat tensors."""
        parts = []
        for index in self._layout:
            by_role = {role: part for roles, tensors in sums[index] for role, part in zip(roles, tensors, strict=True)}
            parts += [by_role[parameter.role] for parameter in self._parameters(index)]
        return tf.concat(parts, 0)

    def clip_group(self, index: int) -> int:
        """Which of `norm_clips` a node belongs to."""
        name = self.nodes[index].name
        return next(number for number, group in enumerate(self.norm_clips) if name in group.layers)

    def _parameters(self, index: int) -> tuple[Any, ...]:
        return self.nodes[index].layer.parameters

    def _masks(self, dropout: tf.Tensor) -> list[tf.Tensor]:
        """The columns of each dropout layer."""
        return list(tf.split(dropout, [mask.units for mask in self.dropout], 1))

    def _check_input(self) -> None:
        spec = self.spec
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", spec.name):
            raise ModelSpecError(
                f"The name {spec.name!r} is to be a file's: letters, digits, dots, dashes and underscores only."
            )
        if input_shape(spec.model) != spec.input.shape:
            raise ModelSpecError(
                f"{spec.name}: the model takes {input_shape(spec.model)}, its input is described as {spec.input.shape}."
            )
        if not len(spec.input.channels) == len(spec.input.units) == spec.input.shape[-1]:
            raise ModelSpecError(
                f"{spec.name}: expected {spec.input.shape[-1]} channel names and units, got {spec.input.channels} and "
                f"{spec.input.units}."
            )

    def _check_names(self) -> None:
        trained = {self.nodes[index].name for index in self._trained}
        if not trained:
            raise ModelSpecError(f"{self.spec.name}: no layer has parameters to train.")
        for name in self.spec.personal_layers:
            if name not in trained:
                raise ModelSpecError(
                    f"{self.spec.name}: there is no trained layer {name!r} to be personal; there are {sorted(trained)}."
                )
        if trained <= set(self.spec.personal_layers):
            raise ModelSpecError(f"{self.spec.name}: every layer is personal; leave one to train together.")

    def _without_final_activation(self, nodes: list[Node]) -> list[Node]:
        """The loss contains it, and computes it with its logarithm, which does not overflow."""
        last = nodes[-1].layer if nodes else None
        wanted = FINAL_ACTIVATION.get(self.spec.loss.name)
        ends_so = isinstance(last, ActivationLayer) and last.function == wanted
        return nodes[:-1] if ends_so else nodes

    def _needs_gradient(self) -> list[bool]:
        """By value: whether a trained layer comes before it."""
        needed = [False]
        for node in self.nodes:
            after_trained = any(needed[source] for source in node.inputs)
            if after_trained and isinstance(node.layer, FixedLayer):
                raise ModelSpecError(
                    f"Layer {node.name}: a fixed stage has no gradient; put it before the first trained layer."
                )
            needed.append(after_trained or node.is_trained)
        return needed

    def _window_before_dropout(self, value: int) -> int:
        """An autoencoder's target is what goes into a dropout, not what comes out of it."""
        while value and isinstance(self.nodes[value - 1].layer, DropoutLayer):
            value = self.nodes[value - 1].inputs[0]
        return value

    def _checked_norm_clips(self) -> tuple[ClipGroup, ...]:
        """The clip groups, which hold every trained layer once; one flat group if none are given."""
        trained = list(dict.fromkeys(self.nodes[index].name for index in self._layout))
        groups = self.spec.norm_clips or (ClipGroup(tuple(trained), 1.0),)
        named = [name for group in groups for name in group.layers]
        if sorted(named) != sorted(trained):
            raise ModelSpecError(
                f"{self.spec.name}: norm_clips name the layers {named}; expected each trained layer once: {trained}."
            )
        squares = math.fsum(group.share**2 for group in groups)
        if not all(group.share > 0 for group in groups) or not abs(squares - 1) <= 1e-6:
            raise ModelSpecError(
                f"{self.spec.name}: the squares of the shares of norm_clips add up to {squares:.6g}; expected 1, so "
                "that the noise fits the whole gradient."
            )
        return groups
