"""Local training: DP-SGD steps over the wearer's records, through the trainable graph. Pure given its ports.

M. Abadi et al., "Deep Learning with Differential Privacy", arXiv 1607.00133, algorithm 1, with true Poisson batches
and a public divisor. Clipping happens per record inside the graph; noise and the weight update happen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from device_client.errors import TrainingError
from device_client.noise import Entropy, NoisyGrid
from device_client.ports import Float32, Graph, Labels
from fl_protocol.errors import LocalMisuseError
from fl_protocol.messages import TrainingPlanMsg
from fl_protocol.model_manifest import DropoutMask


@dataclass(frozen=True)
class Records:
    """Labelled windows: ``x`` float32 [n, ...], ``y`` int32 [n] or float32 [n, K]. A row is one record."""

    x: Float32
    y: Labels

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise LocalMisuseError(f"records: expected as many labels as windows, got {len(self.y)} and {len(self.x)}")

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Evaluation:
    """How a model does on records: summed loss, number correct, number of records."""

    loss_sum: float
    correct: int
    count: int


def train_locally(
    graph: Graph, params: Float32, records: Records, *, plan: TrainingPlanMsg, entropy: Entropy
) -> Float32:
    """Run a round's local steps and return the change of the parameters, float32 [d].

    Every step's noisy sum is released (the change is computed from nothing else), so each is charged.

    Args:
        graph: the loaded trainable graph.
        params: global parameters, float32 [d].
        records: this wearer's records.
        plan: what to compute.
        entropy: cryptographic source for batches and noise.

    Raises:
        TrainingError: the model diverged to numbers that are not finite.
    """
    grid = NoisyGrid(plan.l2_norm_clip, plan.noise_multiplier, len(params))
    current = params.astype(np.float64)
    for _ in range(plan.local_steps):
        batch = np.flatnonzero(poisson_sample(len(records), plan.sampling_rate, entropy))
        clipped = clipped_gradient_sum(
            graph, current.astype(np.float32), records, batch, clip=plan.l2_norm_clip, entropy=entropy
        )
        current -= plan.learning_rate / plan.expected_batch_size * grid.release(clipped, entropy)
    change = (current - params).astype(np.float32)
    if not np.isfinite(change).all():
        raise TrainingError(
            "the local model diverged: the update holds numbers that are not finite; lower learning_rate"
        )
    return change


def poisson_sample(count: int, sampling_rate: float, entropy: Entropy) -> NDArray[np.bool_]:
    """Which of `count` records enter a batch: each independently with probability `sampling_rate`, bool [count]."""
    if sampling_rate == 1:
        return np.ones(count, dtype=bool)
    draws = np.frombuffer(entropy(8 * count), dtype="<u8") >> np.uint64(11)
    # 53-bit integers against an integer threshold, rounded down: never more often than accounted.
    return draws < np.uint64(int(sampling_rate * 2**53))


def clipped_gradient_sum(
    graph: Graph, params: Float32, records: Records, batch: NDArray[np.intp], *, clip: float, entropy: Entropy
) -> NDArray[np.float64]:
    """Sum of the batch's clipped gradients, float64 [d], accumulated over as many calls of the graph as it takes."""
    total = np.zeros(len(params))
    for x, y, mask in _padded(records, batch, graph.batch_size):
        dropout = keep_masks(graph.dropout, graph.batch_size, entropy) if graph.dropout else None
        total += graph.train(params, x, y, mask, clip=clip, dropout=dropout)
    if not np.isfinite(total).all():
        raise TrainingError(
            "the graph returned a gradient that is not finite; the parameters or the records are unusable"
        )
    return total


def keep_masks(masks: tuple[DropoutMask, ...], rows: int, entropy: Entropy) -> Float32:
    """Which units dropout keeps, float32 [rows, units of all masks]: 1 with probability 1 − rate, else 0.

    The rate is met to 2^-16. No privacy rests on it: each record's gradient is clipped whatever was dropped.
    """
    columns = []
    for mask in masks:
        draws = np.frombuffer(entropy(2 * rows * mask.units), dtype="<u2").reshape(rows, mask.units)
        columns.append(draws >= int(mask.rate * 2**16))
    return np.concatenate(columns, axis=1).astype(np.float32)


def evaluate(graph: Graph, params: Float32, records: Records) -> Evaluation:
    """Loss and accuracy of a model on all of `records`."""
    loss_sum = correct = 0.0
    for x, y, mask in _padded(records, np.arange(len(records)), graph.batch_size):
        loss, right = graph.evaluate(params, x, y, mask)
        loss_sum, correct = loss_sum + loss, correct + right
    return Evaluation(loss_sum, round(correct), len(records))


def _padded(records: Records, batch: NDArray[np.intp], size: int) -> Iterator[tuple[Float32, Labels, Float32]]:
    """The batch in pieces of exactly `size` rows; rows beyond it have mask 0."""
    for start in range(0, len(batch), size):
        rows = batch[start : start + size]
        x = np.zeros((size, *records.x.shape[1:]), np.float32)
        y: Labels = np.resize(records.y[rows], (size, *records.y.shape[1:]))
        mask = np.zeros(size, np.float32)
        x[: len(rows)], mask[: len(rows)] = records.x[rows], 1
        yield x, y, mask
