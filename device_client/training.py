"""Local training: DP-SGD steps over the wearer's records, through the trainable graph. Pure given its ports.

M. Abadi et al., "Deep Learning with Differential Privacy", arXiv 1607.00133, algorithm 1, with true Poisson batches
and a public divisor. Clipping happens per record inside the graph; noise is added here, on every coordinate, whatever
the records; what follows from the noisy sums is in `device_client.local_optimiser`.

**Pre-emption.** `LocalTraining` takes one noisy step at a time. Between two steps its progress can be stored, encrypted
on the device, and gone on from later, in another process, perhaps with other records. The steps that are left draw
fresh randomness, so a step whose result was not stored is done again with another batch and other noise.

The round was charged for T noisy sums (`local_steps`) before the first of them, and that holds however often steps were
redone: only what is computed from the one chain of T sums that led to the end is ever released or kept. The attempts
that were lost went nowhere, and whether a step was done again did not depend on what its first attempt drew: a charger
is pulled, a system rebooted for reasons of their own. So given all that is released, each sum of the chain has the
distribution of one draw of the mechanism, as if there had been no other, and T of them compose, over the records that
each step found.

It would be unsound

- to keep or release anything of two results of one step (two resumptions that both end in an update, personal layers
  of one and the update of the other, a metric): that is T + 1 sums or more for T charged. So the progress at step T
  is stored before anything is computed from it; whatever is repeated after that repeats the same numbers;
- to choose among attempts: by loss, by norm, or by whether they failed. After a `TrainingError` the object is spent
  and the round must be given up, not gone on with from earlier progress: a record that makes the graph fail would
  otherwise be left out of every batch that counts;
- to interrupt by what an attempt drew: a time limit near the length of a step would prefer small batches. A limit on a
  step has to be far above the largest batch's time, and a round that keeps being cut has to be given up;
- to rewind a random generator with the progress: the same noise on a sum of other records is no second secret.

Not covered is whether there is an update at all: a graph that fails on a record shows in the device's silence. What
collects the records has to refuse windows that are not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from device_client.errors import TrainingError
from device_client.local_optimiser import Control, LocalOptimiser, LocalProgress
from device_client.noise import NoisyGrid
from device_client.ports import Float32, Graph, Labels
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import Entropy
from fl_protocol.messages import TrainingPlanMsg
from fl_protocol.model_manifest import DropoutMask

__all__ = [
    "Control",
    "Evaluation",
    "LocalProgress",
    "LocalTraining",
    "Records",
    "Trainer",
    "Training",
    "clipped_gradient_sum",
    "evaluate",
    "keep_masks",
    "poisson_sample",
    "train_locally",
]


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


class Training(Protocol):
    """One round's local steps, one at a time, as `LocalTraining` does them, which says what each promises."""

    @property
    def step(self) -> int:
        """Steps done, those before an interruption included."""

    @property
    def steps(self) -> int:
        """Steps that the plan has."""

    @property
    def done(self) -> bool:
        """Whether all steps are done."""

    def advance(self) -> None:
        """Do one step. Raises TrainingError."""

    def progress(self) -> LocalProgress:
        """What another one can go on from. Raises TrainingError."""

    def change(self) -> Float32:
        """The change of the parameters, float32 [d]. Raises TrainingError."""

    def next_control(self) -> Float32:
        """SCAFFOLD's next c_i, float32 [shared parameters]. Raises TrainingError."""


class Trainer(Protocol):
    """Makes a `Training`; the arguments are those of `LocalTraining`, which is the only one on a device.

    Security: whoever makes another one is responsible for the noise. The simulator has some that compute nothing.
    """

    def __call__(
        self,
        graph: Graph,
        start: Float32,
        records: Records,
        *,
        plan: TrainingPlanMsg,
        entropy: Entropy,
        control: Control | None = None,
        progress: LocalProgress | None = None,
    ) -> Training:
        """A training that is begun, or gone on with."""


class LocalTraining:
    """One round's local steps, one at a time.

    Args:
        graph: the loaded trainable graph.
        start: what to start from, float32 [d]: the global parameters, then the personal layers of a model that has
            such.
        records: this wearer's records; there may be none, and then every step is noise.
        plan: what to compute; it was charged.
        entropy: cryptographic source for batches and noise; a resumed training gets a fresh one.
        control: SCAFFOLD's server variate c and own variate c_i, float32 [shared parameters] each, exactly if the plan
            has `control_variates`; c_i is zeros at first.
        progress: where to go on from, of a training with the same start, plan and control.

    Raises:
        TrainingError: progress or control variates do not fit or are not finite; the round has to be given up.
        LocalMisuseError: control variates are given and the plan has none, or the other way round.
    """

    def __init__(
        self,
        graph: Graph,
        start: Float32,
        records: Records,
        *,
        plan: TrainingPlanMsg,
        entropy: Entropy,
        control: Control | None = None,
        progress: LocalProgress | None = None,
    ) -> None:
        self._graph, self._records, self._plan, self._entropy = graph, records, plan, entropy
        self._grid = NoisyGrid(plan.l2_norm_clip, plan.noise_multiplier, len(start))
        self._optimiser = LocalOptimiser(start, plan, control=control, progress=progress)
        self._failed = False

    @property
    def step(self) -> int:
        """Steps done, those before an interruption included."""
        return self._optimiser.steps

    @property
    def steps(self) -> int:
        """Steps that the plan has, and that were charged."""
        return self._plan.local_steps

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.steps

    def advance(self) -> None:
        """Do one noisy step; afterwards is the moment to store `progress` and to look whether to go on.

        Raises:
            TrainingError: the gradient is not finite or the model diverged. The round has to be given up, and must not
                be tried again from earlier progress.
            LocalMisuseError: all steps are done.
        """
        self._refuse_after_failure()
        if self.done:
            raise LocalMisuseError(f"advance: all {self.steps} steps are done, and no more than these were charged")
        self._failed = True  # unless the step comes to its end
        self._optimiser.step(self._noisy_sum())
        self._failed = False

    def progress(self) -> LocalProgress:
        """What another `LocalTraining` can go on from. Raises TrainingError after a step that failed."""
        self._refuse_after_failure()
        return self._optimiser.progress

    def change(self) -> Float32:
        """The change of the parameters since `start`, float32 [d].

        Raises:
            TrainingError: it holds numbers that are not finite.
            LocalMisuseError: steps are missing.
        """
        self._refuse_after_failure()
        if not self.done:
            raise LocalMisuseError(f"change: only {self.step} of {self.steps} steps are done; call advance first")
        return self._optimiser.change

    def next_control(self) -> Float32:
        """SCAFFOLD's next c_i, float32 [shared parameters], to be kept together with the update.

        Raises:
            TrainingError: it holds numbers that are not finite.
            LocalMisuseError: steps are missing, or the plan has no control variates.
        """
        self._refuse_after_failure()
        return self._optimiser.next_control

    def _noisy_sum(self) -> NDArray[np.float64]:
        """The step's release: a Poisson batch's clipped gradients with noise on all coordinates, float64 [d]."""
        plan, records, entropy = self._plan, self._records, self._entropy
        batch = np.flatnonzero(poisson_sample(len(records), plan.sampling_rate, entropy))
        clipped = clipped_gradient_sum(
            self._graph, self._optimiser.params, records, batch, clip=plan.l2_norm_clip, entropy=entropy
        )
        return self._grid.release(clipped, entropy)

    def _refuse_after_failure(self) -> None:
        if self._failed:
            raise TrainingError("this training failed in an earlier step; the round has to be given up")


def train_locally(
    graph: Graph,
    params: Float32,
    records: Records,
    *,
    plan: TrainingPlanMsg,
    entropy: Entropy,
    control: Control | None = None,
) -> Float32:
    """Run a round's local steps without a pause and return the change of the parameters, float32 [d].

    Every step's noisy sum is released (the change is computed from nothing else), so each is charged.

    Args:
        graph: the loaded trainable graph.
        params: global parameters, float32 [d].
        records: this wearer's records.
        plan: what to compute.
        entropy: cryptographic source for batches and noise.
        control: control variates, as `LocalTraining` takes them.

    Raises:
        TrainingError: the model diverged to numbers that are not finite.
    """
    training = LocalTraining(graph, params, records, plan=plan, entropy=entropy, control=control)
    while not training.done:
        training.advance()
    return training.change()


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
    for x, y, mask in _padded(records, batch, graph.train_sizes):
        dropout = keep_masks(graph.dropout, len(mask), entropy) if graph.dropout else None
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
    for x, y, mask in _padded(records, np.arange(len(records)), (graph.batch_size,)):
        loss, right = graph.evaluate(params, x, y, mask)
        loss_sum, correct = loss_sum + loss, correct + right
    return Evaluation(loss_sum, round(correct), len(records))


def _padded(
    records: Records, batch: NDArray[np.intp], sizes: tuple[int, ...]
) -> Iterator[tuple[Float32, Labels, Float32]]:
    """The batch in pieces of the largest size, but the end in up to two of a smaller one; padding has mask 0."""
    at = 0
    while at < len(batch):
        # Not three or four: of some models a call costs much besides its rows.
        size = next((size for size in sizes if 2 * size >= len(batch) - at), sizes[-1])
        rows = batch[at : at + size]
        at += size
        mask = np.zeros(size, np.float32)
        mask[: len(rows)] = 1
        yield _filled_up(records.x[rows], size), _filled_up(records.y[rows], size), mask


def _filled_up(values: NDArray[Any], size: int) -> NDArray[Any]:
    """Zeros behind them, up to so many rows."""
    if len(values) == size:
        return values
    filled = np.zeros((size, *values.shape[1:]), values.dtype)
    filled[: len(values)] = values
    return filled
