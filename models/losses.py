"""The losses: each gives the loss of every example and its gradient at the model's output, in builtin operators."""

from __future__ import annotations

import math
from collections.abc import Callable

import tensorflow as tf

from fl_protocol.model_manifest import LabelSchema, LossName, LossSpec
from models.errors import ModelSpecError
from models.specs import ModelSpec, Shape

LABEL_KINDS: dict[LossName, tuple[str, ...]] = {
    "softmax_cross_entropy": ("class",),
    "binary_cross_entropy": ("binary",),
    "mean_squared_error": ("value", "input"),
    "huber": ("value", "input"),
}
"""Which labels each loss is for."""

FINAL_ACTIVATION: dict[LossName, str] = {"softmax_cross_entropy": "softmax", "binary_cross_entropy": "sigmoid"}
"""The function that these losses contain, so that a model that ends in it is trained on what comes before."""

_Outcome = tuple[tf.Tensor, tf.Tensor]


class Loss:
    """A loss bound to a model's label and number of outputs.

    Args:
        spec: of the model.
        output_shape: of the model's last layer; K values an example.
        target_shape: of what an autoencoder's output is compared with.

    Raises:
        ModelSpecError: loss, label and outputs do not fit together.
    """

    def __init__(self, spec: ModelSpec, *, output_shape: Shape, target_shape: Shape) -> None:
        self._loss, self._label = spec.loss, spec.label
        _check(spec.name, spec.loss, spec.label, output_shape, target_shape)
        self.outputs = math.prod(output_shape)

    def label_tensor(self, batch_size: int) -> tf.TensorSpec:
        """The input ``y``: int32 [B], or float32 [B, K]."""
        if self._label.kind in ("class", "input"):
            return tf.TensorSpec([batch_size], tf.int32, name="y")
        return tf.TensorSpec([batch_size, self.outputs], tf.float32, name="y")

    def __call__(self, output: tf.Tensor, y: tf.Tensor, window: tf.Tensor, *, copies: int) -> _Outcome:
        """The losses and their gradients.

        Args:
            output: float32 [B·copies, ...] of the last layer.
            y: labels, one per example.
            window: float32 [B·copies, ...], what the first trained layer sees; the target of an autoencoder.
            copies: versions of each example, side by side.

        Returns:
            Float32 [B], the mean over each example's versions, and the gradient in the shape of `output`.
        """
        scores = tf.reshape(output, [-1, copies, self.outputs])
        losses, gradient = _LOSSES[self._loss.name](scores, self._target(y, window, copies), self._loss)
        if copies > 1:
            losses, gradient = losses / copies, gradient / copies
        return tf.reduce_sum(losses, 1), tf.reshape(gradient, [-1, *output.shape[1:]])

    def hits(self, output: tf.Tensor, y: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
        """Float32 [B], 1 where the prediction is correct: the right class, every binary label, or within tolerance."""
        scores = tf.reshape(output, [-1, self.outputs])
        if self._label.kind == "class":
            return tf.cast(tf.equal(tf.argmax(scores, 1, output_type=tf.int32), y), tf.float32)
        target = tf.reshape(self._target(y, window, 1), [-1, self.outputs])
        if self._label.kind == "binary":
            # Right when score and label lie on the same side: (2y − 1)·score > 0.
            worst = tf.reduce_min((2.0 * target - 1.0) * scores, 1)
            return tf.cast(worst > 0.0, tf.float32)
        off = tf.reduce_max(tf.maximum(scores - target, target - scores), 1)
        return tf.cast(off <= self._label.tolerance, tf.float32)

    def _target(self, y: tf.Tensor, window: tf.Tensor, copies: int) -> tf.Tensor:
        """What the outputs [B, copies, K] are compared with: [B, 1, K], or [B, copies, K] of an autoencoder."""
        if self._label.kind == "input":
            return tf.reshape(window, [-1, copies, self.outputs])
        if self._label.kind == "class":
            return tf.reshape(tf.one_hot(y, self.outputs), [-1, 1, self.outputs])
        return tf.reshape(y, [-1, 1, self.outputs])


def _softmax_cross_entropy(scores: tf.Tensor, target: tf.Tensor, loss: LossSpec) -> _Outcome:
    log_probabilities = tf.nn.log_softmax(scores)
    return -tf.reduce_sum(target * log_probabilities, 2), tf.exp(log_probabilities) - target


def _binary_cross_entropy(scores: tf.Tensor, target: tf.Tensor, loss: LossSpec) -> _Outcome:
    # max(s, 0) − s·y + log(1 + exp(−|s|)), which cannot overflow.
    magnitude = tf.maximum(scores, -scores)
    losses = tf.nn.relu(scores) - scores * target + tf.math.log(1.0 + tf.exp(-magnitude))
    return tf.reduce_mean(losses, 2), (tf.sigmoid(scores) - target) / float(scores.shape[2])


def _mean_squared_error(scores: tf.Tensor, target: tf.Tensor, loss: LossSpec) -> _Outcome:
    error = scores - target
    return tf.reduce_mean(error * error, 2), error * (2.0 / scores.shape[2])


def _huber(scores: tf.Tensor, target: tf.Tensor, loss: LossSpec) -> _Outcome:
    # P. J. Huber 1964: with c the error held within ±δ, c·(error − c/2) is square inside and linear outside.
    error = scores - target
    held = tf.minimum(tf.maximum(error, -loss.delta), loss.delta)
    return tf.reduce_mean(held * (error - 0.5 * held), 2), held / float(scores.shape[2])


_LOSSES: dict[LossName, Callable[[tf.Tensor, tf.Tensor, LossSpec], _Outcome]] = {
    "softmax_cross_entropy": _softmax_cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "mean_squared_error": _mean_squared_error,
    "huber": _huber,
}
"""From scores [B, copies, K] and target to losses [B, copies] and the gradient in the scores' shape."""


def _check(name: str, loss: LossSpec, label: LabelSchema, output_shape: Shape, target_shape: Shape) -> None:
    """Loss, label and outputs fit together."""
    if not isinstance(loss, LossSpec):
        raise ModelSpecError(f"{name}: its loss is {loss!r}; give a LossSpec, such as LossSpec('huber', 1.0).")
    if loss.name not in LABEL_KINDS:
        raise ModelSpecError(f"{name}: there is no loss {loss.name!r}; use one of {', '.join(LABEL_KINDS)}.")
    if loss.delta <= 0:
        raise ModelSpecError(f"{name}: huber with delta={loss.delta}; expected more than 0.")
    if label.kind not in LABEL_KINDS[loss.name]:
        fitting = [each for each, kinds in LABEL_KINDS.items() if label.kind in kinds]
        raise ModelSpecError(
            f"{name}: the loss {loss.name} does not fit a label of kind {label.kind}; use {' or '.join(fitting)}."
        )
    if label.kind == "input":
        if math.prod(output_shape) != math.prod(target_shape):
            raise ModelSpecError(
                f"{name}: an autoencoder's last layer gives {output_shape}, expected as many values as the "
                f"{target_shape} that its first trained layer sees."
            )
    elif output_shape != (len(label.names),):
        raise ModelSpecError(
            f"{name}: the last layer gives {output_shape}, expected ({len(label.names)},) for the labels "
            f"{', '.join(label.names)}; end the model with Dense({len(label.names)})."
        )
