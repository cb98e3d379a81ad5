"""The oracle: the Keras model itself, differentiated by TensorFlow one example at a time.

It shares with `models.layers` only the order of the flat vector: no hand-written forward pass or gradient, no batched
norm. Tests and the benchmark hold the converted graphs to it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from fl_protocol.model_manifest import ClipGroup, ParameterSpec
from models.keras_losses import ending
from models.losses import FINAL_ACTIVATION
from models.network import Network

Floats = NDArray[np.float32]


class Reference:
    """Outputs, losses and gradients of a network's Keras model.

    Args:
        network: gives the model and the layout of the flat vector.
    """

    def __init__(self, network: Network) -> None:
        self._spec, self._layout = network.spec, network.parameters
        self._model = tf.keras.models.clone_model(network.spec.model, clone_function=_masked)
        self._model.set_weights(network.spec.model.get_weights())
        self._masks = {mask.layer: mask.units for mask in network.dropout}
        self._target = _first_trained_input(self._model)
        self._one = tf.function(self._loss_and_gradients, autograph=False)

    def output(self, params: Floats, x: Floats) -> Floats:
        """What the model gives for x [B, ...], a final softmax or sigmoid that the loss contains undone: [B, K]."""
        self._assign(params)
        self._set_masks(None)
        scores: Floats = self._model(tf.constant(x)).numpy()
        contained = FINAL_ACTIVATION.get(self._spec.loss.name)
        if ending(self._model) == contained:
            scores = np.log(scores) if contained == "softmax" else np.log(scores) - np.log1p(-scores)
        return scores

    def losses(self, params: Floats, x: Floats, y: NDArray[Any]) -> Floats:
        """The loss of each example as it is, without augmentation or dropout, float32 [B]."""
        self._assign(params)
        self._set_masks(None)
        return np.array([self._loss(tf.constant(a[None]), tf.constant(b)).numpy() for a, b in zip(x, y, strict=True)])

    def example_gradients(
        self, params: Floats, x: Floats, y: NDArray[Any], dropout: Floats | None = None
    ) -> tuple[Floats, Floats]:
        """Losses float32 [B] and gradients float32 [B, d], as in training."""
        self._assign(params)
        masks = np.zeros((len(x), 0), np.float32) if dropout is None else dropout
        losses, gradients = [], []
        for row in zip(x, y, masks, strict=True):
            loss, by_variable = self._one(*map(tf.constant, row))
            losses.append(loss.numpy())
            gradients.append(self._flat([part.numpy() for part in by_variable]))
        return np.array(losses, np.float32), np.stack(gradients)

    def _loss_and_gradients(self, x: tf.Tensor, y: tf.Tensor, dropout: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        self._set_masks(dropout if self._masks else None)
        augmentation = self._spec.augmentation
        versions = x[None] if augmentation is None else augmentation.apply(x[None])
        with tf.GradientTape() as tape:
            loss = self._loss(versions, y)
        variables = self._model.trainable_variables
        gradients = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        # An embedding's comes as the rows that were used.
        return loss, [tf.convert_to_tensor(each) for each in gradients]

    def _loss(self, versions: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """The mean loss of one example's versions, by Keras's own loss functions."""
        scores, loss = self._model(versions), self._spec.loss
        from_logits = ending(self._model) != FINAL_ACTIVATION.get(loss.name)
        copies = len(versions) if versions.shape[0] is None else versions.shape[0]
        if self._spec.label.kind == "class":
            labels = tf.fill([copies], y)
            values = tf.keras.losses.sparse_categorical_crossentropy(labels, scores, from_logits=from_logits)
        elif self._spec.label.kind == "binary":
            labels = tf.tile(y[None], [copies, 1])
            values = tf.keras.losses.binary_crossentropy(labels, scores, from_logits=from_logits)
        else:
            target = self._target(versions) if self._spec.label.kind == "input" else tf.tile(y[None], [copies, 1])
            target, scores = (tf.reshape(each, [copies, -1]) for each in (target, scores))
            huber = loss.name == "huber"
            kind = tf.keras.losses.Huber(loss.delta, "none") if huber else tf.keras.losses.MeanSquaredError("none")
            values = kind(target, scores)
        return tf.reduce_mean(values)

    def _assign(self, params: Floats) -> None:
        pieces = {spec.name: _piece(params, spec) for spec in self._layout}
        for layer in self._model.layers:
            own = [piece for name, piece in pieces.items() if name.rpartition("/")[0] == layer.name]
            at, flat = 0, np.concatenate([piece.ravel() for piece in own]) if own else np.zeros(0, np.float32)
            for variable in layer.trainable_variables:
                size = math.prod(variable.shape)
                variable.assign(flat[at : at + size].reshape(variable.shape))
                at += size

    def _flat(self, by_variable: list[Floats]) -> Floats:
        """Gradients by variable, as the flat vector."""
        by_layer: dict[str, list[Floats]] = {}
        pairs = iter(by_variable)
        for layer in self._model.layers:
            by_layer[layer.name] = [next(pairs).ravel() for _ in layer.trainable_variables]
        names = dict.fromkeys(spec.name.rpartition("/")[0] for spec in self._layout)
        return np.concatenate([part for name in names for part in by_layer[name]])

    def _set_masks(self, dropout: tf.Tensor | None) -> None:
        at = 0
        for name, units in self._masks.items():
            layer = self._model.get_layer(name)
            layer.mask = None if dropout is None else tf.slice(dropout, [at], [units])
            at += units


def clipped_sum(
    gradients: Floats, *, mask: Floats, clip: float, groups: tuple[ClipGroup, ...], layout: tuple[ParameterSpec, ...]
) -> tuple[Floats, Floats]:
    """Σᵢ maskᵢ·clipped(gᵢ) [d] and the norms [B] before clipping (zero where masked), computed in float64."""
    wide = gradients.astype(np.float64)
    clipped = np.zeros(wide.shape)
    for group in groups:
        members = np.zeros(wide.shape[1], bool)
        for spec in layout:
            if spec.name.rpartition("/")[0] in group.layers:
                members[spec.offset : spec.offset + math.prod(spec.shape)] = True
        norms = np.linalg.norm(wide[:, members], axis=1)
        factors = mask * np.minimum(1.0, clip * group.share / np.maximum(norms, np.finfo(np.float64).tiny))
        clipped[:, members] = factors[:, None] * wide[:, members]
    norms = np.linalg.norm(wide, axis=1)
    return clipped.sum(0).astype(np.float32), np.where(mask != 0, norms, 0.0).astype(np.float32)


class _MaskedDropout(tf.keras.layers.Layer):  # type: ignore[misc]  # TensorFlow publishes no types
    """Dropout with a mask that is set from outside."""

    def __init__(self, rate: float, **rest: Any) -> None:
        super().__init__(**rest)
        self.rate, self.mask = rate, None

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Scale what is kept."""
        if self.mask is None:
            return x
        return x * tf.reshape(self.mask, [1, *x.shape[1:]]) / (1.0 - self.rate)


def _masked(layer: Any) -> Any:
    """A copy of a layer, dropout with masks from outside."""
    if isinstance(layer, tf.keras.layers.Dropout):
        return _MaskedDropout(layer.rate, name=layer.name)
    return type(layer).from_config(layer.get_config())


def _first_trained_input(model: Any) -> Any:
    """A model from the input to what the first layer with weights sees."""
    first = next(layer for layer in model.layers if layer.trainable_variables)
    seen = first.input
    # What dropout leaves out is to be reconstructed all the same.
    dropped = {id(layer.output): layer.input for layer in model.layers if isinstance(layer, _MaskedDropout)}
    while id(seen) in dropped:
        seen = dropped[id(seen)]
    return tf.keras.Model(model.input, seen)


def _piece(params: Floats, spec: ParameterSpec) -> Floats:
    """One tensor of the flat vector."""
    return params[spec.offset : spec.offset + math.prod(spec.shape)].reshape(spec.shape)
