"""The linear layer of `watch_features` on kept features: the same clipped gradients, far faster than the whole graph.

The features of a window never change in training, so they are computed once, by the committed graph itself: its logits
are features times parameters, and with a 1 in a column of the parameters a logit *is* a feature. Training then is the
gradient of one linear layer, here in numpy, behind the port that the devices' training code takes
(`device_client.ports.Graph`). `shortcut_error` compares it with the whole graph; the benchmark stops if they differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from device_client.ports import Float32, Labels
from device_client.training import Records
from firmware_sim.bundles import bundle_and_publisher
from firmware_sim.sensors.motion import rotation
from firmware_sim.watch_data import LABELS
from fl_protocol.adapters import litert
from fl_protocol.adapters.tflite_graph import TfliteGraph
from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.model_manifest import DropoutMask
from fl_protocol.signing import public_key_from_hex

MODEL = "watch_features"
FEATURES, CLASSES = 54, len(LABELS)
NUM_PARAMETERS = FEATURES * CLASSES
VERSIONS = ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))
"""Axes about which the graph turns each window in training (its manifest: 15 degrees, the axes of a tetrahedron)."""
VERSIONS_RADIANS = math.radians(15)


def committed_bundle() -> ModelBundle:
    """The bundle that comes with covey, verified."""
    path, publisher = bundle_and_publisher(MODEL)
    return open_bundle(path.read_bytes(), publisher=public_key_from_hex(publisher))


class FeatureReader:
    """Features of windows, read off the signature ``infer`` of the committed graph."""

    def __init__(self, bundle: ModelBundle) -> None:
        self._infer = litert.make_interpreter(bundle.graph, num_threads=1).get_signature_runner("infer")
        self._turns = [np.kron(np.eye(2), rotation(np.array(axis), VERSIONS_RADIANS)) for axis in VERSIONS]

    def features(self, x: Float32) -> Float32:
        """Float32 [n, 54] of windows [n, 128, 6]."""
        columns = []
        for start in range(0, FEATURES, CLASSES):
            chosen = np.eye(FEATURES, dtype=np.float32)[:, start : start + CLASSES]
            kernel = np.zeros((FEATURES, CLASSES), np.float32)
            kernel[:, : chosen.shape[1]] = chosen
            columns.append(self._infer(params=kernel.ravel(), x=x)["logits"][:, : chosen.shape[1]])
        return np.concatenate(columns, axis=1)

    def plain(self, records: Records) -> Records:
        """What inference sees: x float32 [n, 1, 54]."""
        return Records(self.features(records.x)[:, None], records.y)

    def versions(self, records: Records) -> Records:
        """What training sees of each window: the features of its four turned versions, x float32 [n, 4, 54]."""
        turned = [self.features((records.x @ turn.T).astype(np.float32)) for turn in self._turns]
        return Records(np.stack(turned, axis=1), records.y)


@dataclass(frozen=True)
class FeatureHead:
    """The linear layer as a graph for `device_client.training`, whose windows are features [4, 54].

    Args:
        batch_size: rows of a call.
    """

    batch_size: int
    dropout: tuple[DropoutMask, ...] = ()

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """How many rows `train` is given at a time."""
        return (self.batch_size,)

    def train(
        self, params: Float32, x: Float32, y: Labels, mask: Float32, *, clip: float, dropout: Float32 | None = None
    ) -> Float32:
        """Clipped gradient sum, float32 [378]: each window's gradients are averaged over its versions, then clipped.

        Args:
            params: float32 [378].
            x: float32 [B, versions, 54].
            y: int32 [B].
            mask: float32 [B].
            clip: the L2 norm clip.
            dropout: None; the model has none.
        """
        error = _softmax(self._logits(params, x))
        error[np.arange(len(y)), :, y] -= 1
        error /= x.shape[1]
        # |Σ f·eᵀ|² over a window's versions, without forming the outer products (the Gram form).
        squared = ((x @ x.transpose(0, 2, 1)) * (error @ error.transpose(0, 2, 1))).sum(axis=(1, 2))
        scale = mask * np.minimum(1, clip / np.sqrt(np.maximum(squared, 1e-30)))
        gradient: Float32 = x.reshape(-1, FEATURES).T @ (error * scale[:, None, None]).reshape(-1, CLASSES)
        return gradient.ravel()

    def evaluate(self, params: Float32, x: Float32, y: Labels, mask: Float32) -> tuple[float, float]:
        """Summed loss and number right, of windows [B, 1, 54] as they are."""
        logits = self._logits(params, x)[:, 0]
        losses = -np.log(_softmax(logits)[np.arange(len(y)), y])
        return float(mask @ losses), float(mask @ (logits.argmax(axis=1) == y))

    def _logits(self, params: Float32, x: Float32) -> Float32:
        """Of each version, float32 [B, versions, 7]."""
        logits: Float32 = x.reshape(-1, FEATURES) @ params.reshape(FEATURES, CLASSES)
        return logits.reshape(*x.shape[:2], CLASSES)


def _softmax(logits: Float32) -> Float32:
    """Along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Float32 = powers / powers.sum(axis=-1, keepdims=True)
    return result


def shortcut_error(records: Records, *, clip: float, random: np.random.Generator) -> float:
    """How far the head is from the whole graph at random parameters: the worse of gradient and loss.

    Args:
        records: raw windows; the first batch of them is taken.
        clip: the L2 norm clip of each window's gradient.
        random: for the parameters.

    Returns:
        The largest difference of a clipped gradient sum over its largest entry, or of the loss over itself; infinite
        if the two tell different windows right.
    """
    bundle = committed_bundle()
    graph, reader, head = TfliteGraph.of_bundle(bundle), FeatureReader(bundle), FeatureHead(bundle.manifest.batch_size)
    part = Records(records.x[: head.batch_size], records.y[: head.batch_size])
    params, mask = random.standard_normal(NUM_PARAMETERS).astype(np.float32), np.ones(len(part), np.float32)
    whole = graph.train(params, part.x, part.y, mask, clip=clip)
    ours = head.train(params, reader.versions(part).x, part.y, mask, clip=clip)
    loss, right = graph.evaluate(params, part.x, part.y, mask)
    our_loss, our_right = head.evaluate(params, reader.plain(part).x, part.y, mask)
    if right != our_right:
        return math.inf
    return max(float(np.abs(ours - whole).max() / np.abs(whole).max()), abs(our_loss - loss) / loss)
