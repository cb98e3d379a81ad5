"""The oracle: a model in TensorFlow's own operators, differentiated one example at a time.

It shares the specs with `models.layers` and nothing else: no hand-written gradient, no batched norm. Tests and the
benchmark hold the converted graphs to it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.specs import Conv1D, Dense, Fixed, Flatten, GlobalAveragePool1D, MaxPool1D, ModelSpec, ReLU

Floats = NDArray[np.float32]


def logits(spec: ModelSpec, params: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Logits [B, K] of windows x [B, ...]."""
    cut = _Cutter(params)
    for layer in spec.layers:
        x = _apply(layer, x, cut)
    return x


class ExampleGradients:
    """Losses and gradients of single examples by automatic differentiation.

    Args:
        spec: the model.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._one = tf.function(self._loss_and_gradient)

    def __call__(self, params: Floats, x: Floats, y: NDArray[np.int32]) -> tuple[Floats, Floats]:
        """Losses float32 [B] and gradients float32 [B, d]."""
        pairs = [self._one(tf.constant(params), tf.constant(a), tf.constant(b)) for a, b in zip(x, y, strict=True)]
        return np.stack([loss.numpy() for loss, _ in pairs]), np.stack([gradient.numpy() for _, gradient in pairs])

    def _loss_and_gradient(self, params: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The cross-entropy of one example, and its gradient [d]."""
        with tf.GradientTape() as tape:
            tape.watch(params)
            augmentation = self._spec.augmentation
            versions = x[None] if augmentation is None else augmentation.apply(x[None])
            scores = logits(self._spec, params, versions)
            labels = tf.fill([self._spec.copies], y)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(logits=scores, labels=labels))
        return loss, tape.gradient(loss, params)


def clipped_sum(gradients: Floats, *, mask: Floats, clip: float) -> tuple[Floats, Floats]:
    """Σᵢ maskᵢ·gᵢ·min(1, clip/‖gᵢ‖₂) [d] and the norms [B] (zero where masked), computed in float64."""
    wide = gradients.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    factors = mask * np.minimum(1.0, clip / np.maximum(norms, np.finfo(np.float64).tiny))
    return (factors @ wide).astype(np.float32), np.where(mask != 0, norms, 0.0).astype(np.float32)


class _Cutter:
    """Hands out consecutive pieces of the flat vector."""

    def __init__(self, params: tf.Tensor) -> None:
        self._params, self._at = params, 0

    def __call__(self, *shape: int) -> tf.Tensor:
        start, self._at = self._at, self._at + math.prod(shape)
        return tf.reshape(self._params[start : self._at], shape)


@functools.singledispatch
def _apply(layer: Any, x: tf.Tensor, cut: _Cutter) -> tf.Tensor:
    raise TypeError(f"The reference does not know {type(layer).__name__}.")


@_apply.register
def _(layer: Dense, x: tf.Tensor, cut: _Cutter) -> tf.Tensor:
    kernel = cut(x.shape[-1], layer.units)
    scores = tf.linalg.matmul(x, kernel)
    return scores + cut(layer.units) if layer.use_bias else scores


@_apply.register
def _(layer: Conv1D, x: tf.Tensor, cut: _Cutter) -> tf.Tensor:
    kernel = cut(layer.kernel_size, x.shape[-1], layer.filters)
    return tf.nn.conv1d(x, kernel, stride=1, padding="VALID") + cut(layer.filters)


@_apply.register
def _(layer: MaxPool1D, x: tf.Tensor, cut: _Cutter) -> tf.Tensor:
    return tf.nn.max_pool1d(x, layer.pool_size, layer.pool_size, "VALID")


@_apply.register
def _(layer: GlobalAveragePool1D, x: tf.Tensor, cut: _Cutter) -> tf.Tensor:
    return tf.reduce_mean(x, axis=1)


@_apply.register
def _(layer: ReLU, x: tf.Tensor, cut: _Cutter) -> tf.Tensor:
    return tf.nn.relu(x)


@_apply.register
def _(layer: Flatten, x: tf.Tensor, cut: _Cutter) -> tf.Tensor:
    return tf.reshape(x, [x.shape[0], -1])


@_apply.register
def _(layer: Fixed, x: tf.Tensor, cut: _Cutter) -> tf.Tensor:
    return layer.stage.apply(x)
