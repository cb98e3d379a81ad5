"""From a Keras model to bound layers in the order in which they run; what cannot be trained is refused by name."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

import models.layers  # noqa: F401  # fills the registry
from models.errors import ModelSpecError
from models.layers.activations import MONOTONE, ActivationLayer, activation_layer
from models.layers.layer import Context, Layer
from models.layers.pooling import MaxPoolingLayer
from models.layers.registry import entry_for
from models.specs import Shape

_NAME = re.compile(r"[A-Za-z0-9.][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Node:
    """One layer in its place.

    Args:
        name: of the Keras layer; the nodes of one Keras layer share it.
        kind: the Keras class.
        layer: bound to its shapes.
        inputs: numbers of the values it reads; 0 is the model's input, n + 1 the output of node n.
        initial: its weights in the Keras model, each as in `layer.parameters`.
        frozen: the weights are constants of the graph.
    """

    name: str
    kind: str
    layer: Layer
    inputs: tuple[int, ...]
    initial: tuple[NDArray[np.float32], ...]
    frozen: bool

    @property
    def is_trained(self) -> bool:
        """Whether there are parameters of it in the flat vector."""
        return bool(self.layer.parameters) and not self.frozen


def input_shape(model: Any) -> Shape:
    """The static shape of one example.

    Raises:
        ModelSpecError: the model is no graph of layers, has several inputs or outputs, or a shape that is not static.
    """
    name = getattr(model, "name", type(model).__name__)
    if not getattr(model, "_is_graph_network", False):
        raise ModelSpecError(
            f"Model {name}: expected a tf.keras Sequential or functional model with a known input shape, got "
            f"{type(model).__name__}; begin it with keras.Input(shape=...)."
        )
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ModelSpecError(
            f"Model {name}: expected one input and one output, got {len(model.inputs)} and {len(model.outputs)}; "
            "concatenate them into one tensor."
        )
    return _static(f"Input {model.inputs[0].name}", model.inputs[0])


def bound_nodes(model: Any, *, copies: int) -> list[Node]:
    """The model's layers, bound and in the order in which they run.

    Raises:
        ModelSpecError: a layer cannot be trained with per-example clipping; the text names it and what would work.
    """
    shapes: list[Shape] = [input_shape(model)]
    # A Keras tensor is known by its object.
    values = {id(model.inputs[0]): 0}
    nodes: list[Node] = []
    seen: set[int] = set()
    for layer, inputs, output, options in _calls(model):
        _check_layer(layer, is_again=id(layer) in seen)
        seen.add(id(layer))
        _static(f"Layer {layer.name}", output)
        sources = tuple(values[id(tensor)] for tensor in inputs)
        for node in _nodes_of(layer, sources, shapes, copies):
            nodes.append(node)
            shapes.append(node.layer.output_shape)
            sources = (len(nodes),)
        _check_ignored(layer, options)
        values[id(output)] = sources[0]
        if shapes[sources[0]] != tuple(output.shape[1:]):
            raise ModelSpecError(
                f"Layer {layer.name}: Keras says its output is {tuple(output.shape[1:])}, covey's layer says "
                f"{shapes[sources[0]]}; the registered layer is wrong."
            )
    if values[id(model.outputs[0])] != len(nodes):
        raise ModelSpecError(f"Model {model.name}: its last layer is not its output; leave unused branches out.")
    return nodes


def _check_layer(layer: Any, *, is_again: bool) -> None:
    """Refuse what no kind of layer may be."""
    if is_again and (layer.weights or isinstance(layer, tf.keras.layers.Dropout)):
        raise ModelSpecError(
            f"Layer {layer.name}: it is used more than once, and the gradients of shared weights do not come apart "
            "per example; use a layer for each place."
        )
    if not _NAME.fullmatch(layer.name):
        raise ModelSpecError(
            f"Layer {layer.name}: a name takes letters, digits, dots, dashes and underscores; name it so with name=..."
        )
    if layer.compute_dtype != "float32":
        raise ModelSpecError(
            f"Layer {layer.name}: it computes in {layer.compute_dtype}, devices in float32; build the model without a "
            "dtype policy."
        )


def frozen_weights(model: Any) -> NDArray[np.float32]:
    """The weights of all frozen layers, layer by layer in Keras's order, as one vector."""
    found = [weight.ravel() for layer in model.layers if not layer.trainable for weight in layer.get_weights()]
    return np.asarray(np.concatenate([np.zeros(0, np.float32), *found]), np.float32)


def maximum_first(nodes: Sequence[Node]) -> list[Node]:
    """Swap a rectifier and the maximum pooling that follows it: the same function, on half the values or fewer."""
    result = list(nodes)
    uses = [source for node in nodes for source in node.inputs]
    for index in range(len(result) - 1):
        first, second = result[index], result[index + 1]
        if (
            isinstance(first.layer, ActivationLayer)
            and first.layer.function in MONOTONE
            and isinstance(second.layer, MaxPoolingLayer)
            and second.inputs == (index + 1,)
            and uses.count(index + 1) == 1
        ):
            after = ActivationLayer(first.layer.function, Context((second.layer.output_shape,), 1))
            result[index] = _replaced(second, second.layer, first.inputs)
            result[index + 1] = _replaced(first, after, (index + 1,))
    return result


def _replaced(node: Node, layer: Layer, inputs: tuple[int, ...]) -> Node:
    """`node` with another layer and other inputs."""
    return Node(node.name, node.kind, layer, inputs, node.initial, node.frozen)


def _calls(model: Any) -> Iterator[tuple[Any, list[Any], Any, list[str]]]:
    """Each call of a layer that leads to the output, in order: layer, input tensors, output, named arguments."""
    # Keras 2.15 has no public name for the order of its own forward pass.
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if not node.is_input:
                options = [name for name, value in node.call_kwargs.items() if value is not None]
                yield node.layer, list(node.keras_inputs), node.outputs, options


def _chain(layer: Any, shapes: tuple[Shape, ...], copies: int) -> list[Layer]:
    """The layers that run one Keras layer: its own, then its activation."""
    entry = entry_for(layer)
    made = entry.factory(layer, Context(shapes, copies))
    chain = list(made) if isinstance(made, Sequence) else [made]
    if entry.output_activation:
        after = activation_layer(layer.name, layer.activation, Context((chain[-1].output_shape,), copies))
        chain += [] if after is None else [after]
    return chain


def _nodes_of(layer: Any, sources: tuple[int, ...], shapes: list[Shape], copies: int) -> Iterator[Node]:
    """The nodes of one Keras layer, each reading the one before; `shapes` grows while the caller takes them."""
    weights = [np.asarray(weight, np.float32) for weight in layer.get_weights()]
    for weight in weights:
        if not np.isfinite(weight).all():
            raise ModelSpecError(
                f"Layer {layer.name}: an initial weight is NaN or infinite; check the initializer or the saved model."
            )
    flat = np.concatenate([weight.ravel() for weight in weights]) if weights else np.zeros(0, np.float32)
    for each in _chain(layer, tuple(shapes[source] for source in sources), copies):
        own, flat = _cut(flat, each)
        frozen = bool(own) and not layer.trainable
        yield Node(layer.name, type(layer).__name__, each, sources, own, frozen)
        sources = (len(shapes) - 1,)
    if flat.size:
        raise ModelSpecError(f"Layer {layer.name}: {flat.size} of its weights are not used by the registered layer.")


def _cut(flat: NDArray[np.float32], layer: Layer) -> tuple[tuple[NDArray[np.float32], ...], NDArray[np.float32]]:
    """The layer's weights from the front of `flat`, and the rest."""
    ends = np.cumsum([0, *(math.prod(parameter.shape) for parameter in layer.parameters)])
    pieces = [flat[start:end] for start, end in itertools.pairwise(ends)]
    shaped = tuple(piece.reshape(p.shape) for piece, p in zip(pieces, layer.parameters, strict=True))
    return shaped, flat[ends[-1] :]


def _check_ignored(layer: Any, options: list[str]) -> None:
    """Nothing that Keras would do for this layer is left out without a word."""
    if options:
        raise ModelSpecError(f"Layer {layer.name}: it is called with {', '.join(options)}; call it on its input alone.")
    if layer.losses or any(variable.constraint is not None for variable in layer.weights):
        raise ModelSpecError(
            f"Layer {layer.name}: regularizers and constraints are not part of an example's loss and would be ignored; "
            "leave them out."
        )


def _static(owner: str, tensor: Any) -> Shape:
    """The shape of one example of a tensor."""
    if isinstance(tensor, list | tuple | dict):
        raise ModelSpecError(f"{owner}: it has {len(tensor)} outputs; only layers with one output are supported.")
    shape = tuple(tensor.shape[1:])
    if not shape or any(side is None for side in shape):
        raise ModelSpecError(
            f"{owner}: its shape is {tuple(tensor.shape)}; only the batch may be unknown, because memory on a device "
            "is planned ahead: give every other size a number."
        )
    return tuple(int(side) for side in shape)
