"""The pure functions of a trainable graph: state lives on the host, noise is added on the host.

Every example counts or does not. It counts when its mask is not zero and its loss and gradient are finite; one that
does not count contributes exactly zero to every output, whatever its row holds (NaN included), and its norm and loss
read zero. So padding needs no particular content, and no recording can make a released sum anything but finite with
each example's share at most `clip` long.
"""

from __future__ import annotations

import tensorflow as tf

from models.layers.rows import keep_counted
from models.network import Network

LARGEST = 3.0e38
"""Losses and squared norms beyond this (float32's maximum is 3.4e38) count as not finite; NaN compares false too."""

SMALLEST_NORM = 1.0e-30
"""Keeps clip/norm defined where the gradient vanishes; the factor is then 1 and the share zero."""


def clipped_step(
    network: Network, *, params: tf.Tensor, x: tf.Tensor, y: tf.Tensor, mask: tf.Tensor, clip: tf.Tensor
) -> dict[str, tf.Tensor]:
    """One DP-SGD micro-batch without noise (Abadi et al. 2016, algorithm 1, arXiv 1607.00133).

    Args:
        network: the model.
        params: float32 [d].
        x: float32 [B, ...] raw windows in the units of the manifest.
        y: int32 [B] class indices.
        mask: float32 [B], 1 for an example and 0 for padding.
        clip: float32 [], the L2 norm clip, not negative.

    Returns:
        ``grad`` float32 [d] = Σᵢ maskᵢ·gᵢ·min(1, clip/‖gᵢ‖₂), ``norms`` float32 [B] before clipping, ``loss`` [B].
        With augmentation gᵢ and the loss are means over the versions of window i.
    """
    weights = network.split(params)
    logits, saved = network.forward(weights, _versions(network, x))
    losses, logits_gradient = cross_entropy(logits, y, copies=network.spec.copies)
    examples = network.backward(
        weights,
        saved,
        tf.reshape(logits_gradient, logits.shape),
        lambda layer, kept, gradient: layer.example_gradients(kept, gradient),
    )
    squared_norms = tf.add_n([gradients.squared_norms() for gradients in examples])
    counted = _counts(mask, losses) & (squared_norms < LARGEST)
    norms = keep_counted(counted, tf.sqrt(squared_norms))
    factors = mask * tf.minimum(1.0, clip / tf.maximum(norms, SMALLEST_NORM))
    sums = [part for gradients in examples for part in gradients.weighted_sum(factors, counted)]
    return {"grad": tf.concat(sums, 0), "norms": norms, "loss": keep_counted(counted, losses)}


def plain_step(
    network: Network, *, params: tf.Tensor, x: tf.Tensor, y: tf.Tensor, mask: tf.Tensor
) -> dict[str, tf.Tensor]:
    """The same step without privacy, for measuring what privacy costs: ``grad`` [d] = Σᵢ maskᵢ·gᵢ and ``loss`` [B]."""
    weights = network.split(params)
    logits, saved = network.forward(weights, _versions(network, x))
    losses, logits_gradient = cross_entropy(logits, y, copies=network.spec.copies)
    sums = network.backward(
        weights,
        saved,
        tf.reshape(logits_gradient * tf.reshape(mask, [-1, 1, 1]), logits.shape),
        lambda layer, kept, gradient: layer.summed_gradient(kept, gradient),
    )
    return {"grad": tf.concat([part for layer in sums for part in layer], 0), "loss": losses * mask}


def infer(network: Network, *, params: tf.Tensor, x: tf.Tensor) -> dict[str, tf.Tensor]:
    """``logits`` float32 [B, K] of windows x [B, ...]."""
    return {"logits": network.forward(network.split(params), x)[0]}


def evaluate(
    network: Network, *, params: tf.Tensor, x: tf.Tensor, y: tf.Tensor, mask: tf.Tensor
) -> dict[str, tf.Tensor]:
    """``loss_sum`` [] = Σᵢ maskᵢ·lossᵢ and ``correct`` [] = Σᵢ maskᵢ·[argmax = y], over the examples that count."""
    logits, _ = network.forward(network.split(params), x)
    losses, _ = cross_entropy(logits, y, copies=1)
    counted = _counts(mask, losses)
    hits = tf.cast(tf.equal(tf.argmax(logits, 1, output_type=tf.int32), y), tf.float32)
    return {
        "loss_sum": tf.reduce_sum(mask * keep_counted(counted, losses)),
        "correct": tf.reduce_sum(mask * keep_counted(counted, hits)),
    }


def cross_entropy(logits: tf.Tensor, y: tf.Tensor, *, copies: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Softmax cross-entropy [B], the mean over each example's versions, and its gradient [B, copies, K].

    Args:
        logits: float32 [B·copies, K].
        y: int32 [B].
        copies: versions of each example, side by side.
    """
    log_probabilities = tf.reshape(tf.nn.log_softmax(logits), [-1, copies, logits.shape[1]])
    target = tf.reshape(tf.one_hot(y, logits.shape[1]), [-1, 1, logits.shape[1]])
    losses = -tf.reduce_sum(target * log_probabilities, [1, 2])
    gradient = tf.exp(log_probabilities) - target
    return (losses, gradient) if copies == 1 else (losses / copies, gradient / copies)


def _versions(network: Network, x: tf.Tensor) -> tf.Tensor:
    """What the model is trained on: the windows, or their augmented versions."""
    augmentation = network.spec.augmentation
    return x if augmentation is None else augmentation.apply(x)


def _counts(mask: tf.Tensor, losses: tf.Tensor) -> tf.Tensor:
    """Which examples are not padding and have a finite loss, bool [B]."""
    return tf.not_equal(mask, 0.0) & (losses < LARGEST)
