"""The pure functions of a trainable graph: state lives on the host, noise is added on the host.

Every example counts or does not. It counts when its mask is not zero and its loss and gradient are finite; one that
does not count contributes exactly zero to every output, whatever its row holds (NaN included), and its norm and loss
read zero. So padding needs no particular content, and no recording can make a released sum anything but finite with
each example's share at most `clip` long.
"""

from __future__ import annotations

import tensorflow as tf

from models.layers.gradients import keep_counted
from models.network import Network

LARGEST = 3.0e38
"""Losses and squared norms beyond this (float32's maximum is 3.4e38) count as not finite; NaN compares false too."""

SMALLEST_NORM = 1.0e-30
"""Keeps clip/norm defined where the gradient vanishes; the factor is then 1 and the share zero."""


def clipped_step(
    network: Network,
    *,
    params: tf.Tensor,
    x: tf.Tensor,
    y: tf.Tensor,
    mask: tf.Tensor,
    clip: tf.Tensor,
    dropout: tf.Tensor | None = None,
) -> dict[str, tf.Tensor]:
    """One DP-SGD micro-batch without noise (Abadi et al. 2016, algorithm 1, arXiv 1607.00133).

    Args:
        network: the model.
        params: float32 [d].
        x: float32 [B, ...] raw examples in the units of the manifest.
        y: labels, int32 [B] or float32 [B, K].
        mask: float32 [B], 1 for an example and 0 for padding.
        clip: float32 [], the L2 norm clip, not negative.
        dropout: float32 [B, units], 1 where a unit is kept; only for a model with dropout.

    Returns:
        ``grad`` float32 [d] = Σᵢ maskᵢ·gᵢ·min(1, clip/‖gᵢ‖₂), ``norms`` float32 [B] before clipping, ``loss`` [B].
        With augmentation gᵢ and the loss are means over the versions of example i. With several clip groups each
        group's part of gᵢ is clipped to its share of `clip`; shares are such that the whole is at most `clip` long.
    """
    weights = network.split(params)
    run = network.forward(weights, _versions(network, x), dropout=_for_versions(network, dropout))
    losses, gradient = network.loss(run.output, y, run.window, copies=network.spec.copies)
    examples = network.backward(weights, run.saved, gradient)
    by_group: list[list[tf.Tensor]] = [[] for _ in network.norm_clips]
    for index, forms in examples.items():
        by_group[network.clip_group(index)] += [form.squared_norms() for form in forms]
    squares = [tf.add_n(parts) for parts in by_group]
    total = tf.add_n(squares)
    # A sum of squares that is negative or NaN is a layer's mistake; such an example must not pass unclipped.
    counted = _counts(mask, losses) & (total >= 0.0) & (total < LARGEST)
    factors = []
    for group, square in zip(network.norm_clips, squares, strict=True):
        norms = tf.sqrt(keep_counted(counted, square))
        limit = clip if group.share == 1 else clip * group.share
        factors.append(mask * tf.minimum(1.0, limit / tf.maximum(norms, SMALLEST_NORM)))
    sums = {
        index: [(form.roles, form.weighted_sum(factors[network.clip_group(index)], counted)) for form in forms]
        for index, forms in examples.items()
    }
    return {
        "grad": network.joined(sums),
        "norms": tf.sqrt(keep_counted(counted, total)),
        "loss": keep_counted(counted, losses),
    }


def plain_step(
    network: Network,
    *,
    params: tf.Tensor,
    x: tf.Tensor,
    y: tf.Tensor,
    mask: tf.Tensor,
    dropout: tf.Tensor | None = None,
) -> dict[str, tf.Tensor]:
    """The same step without privacy, for measuring what privacy costs: ``grad`` [d] = Σᵢ maskᵢ·gᵢ and ``loss`` [B]."""
    weights = network.split(params)
    run = network.forward(weights, _versions(network, x), dropout=_for_versions(network, dropout))
    losses, gradient = network.loss(run.output, y, run.window, copies=network.spec.copies)
    rows = tf.reshape(gradient, [-1, network.spec.copies, network.loss.outputs]) * tf.reshape(mask, [-1, 1, 1])
    examples = network.backward(weights, run.saved, tf.reshape(rows, [-1, *gradient.shape[1:]]))
    sums = {index: [(form.roles, form.sum()) for form in forms] for index, forms in examples.items()}
    return {"grad": network.joined(sums), "loss": losses * mask}


def infer(network: Network, *, params: tf.Tensor, x: tf.Tensor) -> dict[str, tf.Tensor]:
    """``logits`` float32 [B, K] of examples x [B, ...]; the predicted values themselves if the label is no class."""
    return {"logits": network.forward(network.split(params), x).output}


def evaluate(
    network: Network, *, params: tf.Tensor, x: tf.Tensor, y: tf.Tensor, mask: tf.Tensor
) -> dict[str, tf.Tensor]:
    """``loss_sum`` [] = Σᵢ maskᵢ·lossᵢ and ``correct`` [], how many are right, over the examples that count."""
    run = network.forward(network.split(params), x)
    losses, _ = network.loss(run.output, y, run.window, copies=1)
    counted = _counts(mask, losses)
    hits = network.loss.hits(run.output, y, run.window)
    return {
        "loss_sum": tf.reduce_sum(mask * keep_counted(counted, losses)),
        "correct": tf.reduce_sum(mask * keep_counted(counted, hits)),
    }


def _versions(network: Network, x: tf.Tensor) -> tf.Tensor:
    """What the model is trained on: the examples, or their augmented versions."""
    augmentation = network.spec.augmentation
    return x if augmentation is None else augmentation.apply(x)


def _for_versions(network: Network, dropout: tf.Tensor | None) -> tf.Tensor | None:
    """Every version of an example drops the same units."""
    copies = network.spec.copies
    if dropout is None or copies == 1:
        return dropout
    repeated = tf.reshape(dropout, [-1, 1, dropout.shape[1]]) * tf.ones([1, copies, 1])
    return tf.reshape(repeated, [-1, dropout.shape[1]])


def _counts(mask: tf.Tensor, losses: tf.Tensor) -> tf.Tensor:
    """Which examples are not padding and have a finite loss, bool [B]."""
    return tf.not_equal(mask, 0.0) & (losses < LARGEST)
