"""Hold an exported model to the one it was made from: the same windows through both, before any file is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from fl_protocol.errors import CoveyError
from fl_protocol.model_manifest import BundleManifest, LabelSchema, LossSpec
from models.export.convert import Precision

Floats = NDArray[np.float32]

LARGEST_ERROR: dict[Precision, float] = {"float32": 1e-4, "float16": 1e-2, "int8": 0.3}
"""The largest ‖outputs − expected‖ / ‖expected‖ at which an export still is the same model. Rounding to float16 costs
about 5e-4, to int8 one to ten hundredths; channels in a wrong order cost about 1."""

_RANDOM_EXAMPLES = 64


class ExportError(CoveyError):
    """An exported model does not do what the bundle's does; no file is kept."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the same examples.

    Args:
        examples: how many.
        error: ‖outputs − expected‖ / ‖expected‖; infinite where an output is not finite.
        largest_difference: of any output.
        agreement: the share of examples that both predict alike; None where there is no such thing.
        before, after: accuracy for classes and binary labels, mean absolute error for values, mean loss for an
            autoencoder; None without labels.
        drop: how much worse, in points or in the unit of `before`.
    """

    examples: int
    error: float
    largest_difference: float
    agreement: float | None
    before: float | None
    after: float | None
    drop: float | None


def compare(
    manifest: BundleManifest, expected: Floats, outputs: Floats, y: NDArray[Any] | None, *, probabilities: bool = False
) -> Comparison:
    """Outputs [n, K] of an export beside those expected.

    Args:
        manifest: says what outputs and labels mean.
        expected: float32 [n, K] of the bundle's own ``infer``.
        outputs: float32 [n, K] of the export.
        y: labels; of an autoencoder its targets, float32 [n, K].
        probabilities: both are probabilities, not scores.
    """
    difference, length = outputs - expected, float(np.linalg.norm(expected))
    finite = bool(np.isfinite(outputs).all())
    distance = float(np.linalg.norm(difference))
    error = 0.0 if finite and distance == 0 else distance / length if finite and length else float("inf")
    qualities = [
        None if y is None else _quality(manifest, each, y, probabilities=probabilities) for each in (expected, outputs)
    ]
    before, after = qualities
    drop = None if before is None or after is None else _drop(manifest.label, before, after)
    return Comparison(
        examples=len(expected),
        error=error,
        largest_difference=float(np.abs(difference).max()),
        agreement=_agreement(manifest.label, expected, outputs, probabilities=probabilities),
        before=before,
        after=after,
        drop=drop,
    )


def require_same(comparison: Comparison, *, precision: Precision, what: str) -> None:
    """Refuse outputs that no rounding explains.

    Raises:
        ExportError: with what was measured; `what` says of which model.
    """
    limit = LARGEST_ERROR[precision]
    if not comparison.error <= limit:
        raise ExportError(
            f"{what} does not compute what the bundle's infer does: its outputs are off by {comparison.error:.2g} of "
            f"their size, and rounding explains at most {limit:g}; no file was kept."
        )


def probabilities_of(scores: Floats, loss: LossSpec) -> Floats:
    """Softmax or sigmoid of ``infer``'s scores, whichever the loss contains."""
    if loss.name == "binary_cross_entropy":
        return np.asarray(tf.sigmoid(scores).numpy(), np.float32)
    return np.asarray(tf.nn.softmax(scores).numpy(), np.float32)


def autoencoder_targets(model: Any, x: Floats) -> Floats:
    """What an autoencoder's outputs are compared with: the examples as its first trained layer sees them, [n, K]."""
    first = next(layer for layer in model.layers if layer.trainable_weights)
    seen = tf.keras.Model(model.input, first.input).predict(x, verbose=0)
    return np.asarray(seen, np.float32).reshape(len(x), -1)


def random_examples(model: Any) -> Floats:
    """Normal values, or ids that every embedding has; they show whether two graphs agree, not how good they are."""
    rng = np.random.default_rng(0)
    shape = (_RANDOM_EXAMPLES, *model.input_shape[1:])
    sizes = [layer.input_dim for layer in model.layers if isinstance(layer, tf.keras.layers.Embedding)]
    if sizes:
        return rng.integers(0, min(sizes), shape).astype(np.float32)
    return rng.standard_normal(shape).astype(np.float32)


def _quality(manifest: BundleManifest, outputs: Floats, y: NDArray[Any], *, probabilities: bool) -> float:
    """Accuracy, mean absolute error or mean loss."""
    kind, loss = manifest.label.kind, manifest.loss
    if kind == "class":
        return float((outputs.argmax(1) == y).mean())
    if kind == "binary":
        return float((_signs(outputs, probabilities=probabilities) == (y > 0.5)).all(1).mean())
    wrong = np.abs(outputs - y)
    if kind == "value":
        return float(wrong.mean())
    held = np.minimum(wrong, loss.delta)
    return float((held * (wrong - held / 2) if loss.name == "huber" else wrong**2).mean())


def _drop(label: LabelSchema, before: float, after: float) -> float:
    """How much worse `after` is: points of accuracy, or the rise of error or loss."""
    return 100 * (before - after) if label.kind in ("class", "binary") else after - before


def _agreement(label: LabelSchema, expected: Floats, outputs: Floats, *, probabilities: bool) -> float | None:
    """The share of examples with the same class, the same binary labels, or values within the tolerance."""
    if label.kind == "class":
        return float((expected.argmax(1) == outputs.argmax(1)).mean())
    if label.kind == "binary":
        same = _signs(expected, probabilities=probabilities) == _signs(outputs, probabilities=probabilities)
        return float(same.all(1).mean())
    return float((np.abs(expected - outputs).max(1) <= label.tolerance).mean()) if label.tolerance else None


def _signs(outputs: Floats, *, probabilities: bool) -> NDArray[np.bool_]:
    """Which binary labels are predicted."""
    return outputs > (0.5 if probabilities else 0.0)
