"""Noisy sums over records, for federated evaluation and statistics: one release a round. Pure given its ports.

Each sampled record contributes a part, a vector that depends on nothing but that record, the signed plan and, in an
evaluation, the global model. The sum of the parts gets the noise of a training step (`device_client.noise`), and the
device charges for it as for one step: M. Abadi et al., arXiv 1607.00133, algorithm 1, with parts for gradients.

Invariants:

- the batch is a true Poisson sample; an empty one, or no records at all, gives noise and nothing else;
- no part is longer than the plan's `l2_norm_clip`. The parts are made so, and `bounded_sum` holds them to it all the
  same, since the noise is made for that length;
- what is not finite changes no more than any other record may: a loss that is no number counts as the largest, a sample
  that is no number counts for nothing.

**Pre-emption.** Records are taken a few at a time, so that the daemon gets its turn; nothing of that is visible outside
(`step` says 0 until the release, and only then is there progress to keep). An attempt that is cut off is done again
with another batch and other noise; `device_client.training` says why one charge covers that.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from device_client.errors import TrainingError
from device_client.local_optimiser import LocalProgress
from device_client.noise import NoisyGrid
from device_client.ports import Float32, Graph, Labels
from device_client.training import Records, poisson_sample
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import Entropy
from fl_protocol.plans import EvaluationPlanMsg, FeatureMsg, PlanMsg, StatisticsPlanMsg
from fl_protocol.record_sums import SUM_DIVISOR, SumsPlanMsg, feature_places

Parts = NDArray[np.float64]
"""What some records contribute, float64 [records, m]."""

_EVALUATED_AT_ONCE = 16
"""Records in a call of `advance`; each takes a call of the graph."""
_NUMBERS_AT_ONCE = 1 << 18
"""Samples or parts in a call of `advance`, whichever are more."""


class RecordSums:
    """One round's noisy sum, with the interface of `device_client.training.LocalTraining`.

    Args:
        graph: the loaded trainable graph; statistics do not use it.
        params: of the global model, personal layers at their initial values, float32 [d]; empty for statistics.
        records: this wearer's records; there may be none, and then the sum is noise.
        plan: what to sum up; it was charged.
        entropy: cryptographic source for the batch and the noise.
        progress: the release of an earlier process, if it came to that.

    Raises:
        TrainingError: the progress does not fit, or the plan names a channel that the records have not.
        LocalMisuseError: the noise has no place on the grid.
    """

    def __init__(
        self,
        graph: Graph,
        params: Float32,
        records: Records,
        *,
        plan: SumsPlanMsg,
        entropy: Entropy,
        progress: LocalProgress | None = None,
    ) -> None:
        if problem := channels_problem(plan, records.x.shape[1:]):
            raise TrainingError(f"{problem}; the round has to be given up")
        self._records, self._plan, self._entropy = records, plan, entropy
        self._graph, self._params = graph, params
        self._grid = NoisyGrid(plan.l2_norm_clip, plan.noise_multiplier, plan.length)
        self._batch: NDArray[np.intp] | None = None  # what is left of it
        self._total = np.zeros(plan.length)
        self._released = _released(progress, plan.length)
        self._failed = False

    @property
    def step(self) -> int:
        """Releases made: 0 or 1."""
        return int(self._released is not None)

    @property
    def steps(self) -> int:
        """Releases that the plan has, and that were charged."""
        return self._plan.local_steps

    @property
    def done(self) -> bool:
        """Whether the noisy sum is there."""
        return self._released is not None

    def advance(self) -> None:
        """Look at some more records of the batch; after the last ones, add the noise.

        Raises:
            GraphError: the graph failed. The round has to be given up, and must not be tried again.
            LocalMisuseError: the sum is there already.
        """
        self._refuse_after_failure()
        if self.done:
            raise LocalMisuseError("advance: the sum is released, and no more than one was charged")
        self._failed = True  # unless this comes to its end
        if self._batch is None:
            drawn = poisson_sample(len(self._records), self._plan.sampling_rate, self._entropy)
            self._batch = np.flatnonzero(drawn)
        rows, self._batch = np.split(self._batch, [self._at_once()])
        if len(rows):
            self._total += bounded_sum(self._parts(rows), self._plan.l2_norm_clip)
        if not len(self._batch):
            self._released = self._grid.release(self._total, self._entropy)
        self._failed = False

    def progress(self) -> LocalProgress:
        """What another `RecordSums` can go on from. Raises TrainingError after a failure."""
        self._refuse_after_failure()
        if self._released is None:  # Security: the sum without noise is never stored
            return LocalProgress(0, b"", b"")
        return LocalProgress(1, self._released.astype("<f8").tobytes(), b"")

    def change(self) -> Float32:
        """The noisy sum over `SUM_DIVISOR`, float32 [m]. Raises LocalMisuseError: it is not there yet."""
        self._refuse_after_failure()
        if self._released is None:
            raise LocalMisuseError("change: the sum is not released; call advance first")
        with np.errstate(over="ignore"):
            values: Float32 = (self._released / SUM_DIVISOR).astype(np.float32)
        if not np.isfinite(values).all():
            raise TrainingError("the noise is wider than float32; the round has to be given up")
        return values

    def _parts(self, rows: NDArray[np.intp]) -> Parts:
        """What these records contribute."""
        records, plan = self._records, self._plan
        if isinstance(plan, StatisticsPlanMsg):
            return feature_parts(records.x[rows], plan.features)
        chosen = Records(records.x[rows], records.y[rows])
        return evaluation_parts(self._graph, self._params, chosen, loss_bound=plan.loss_bound)

    def _at_once(self) -> int:
        """How many records are looked at in one go; it depends on the plan and the model, not on the records."""
        if isinstance(self._plan, EvaluationPlanMsg):
            return _EVALUATED_AT_ONCE
        samples = math.prod(self._records.x.shape[1:])
        return max(1, _NUMBERS_AT_ONCE // max(1, samples, self._plan.length))

    def _refuse_after_failure(self) -> None:
        if self._failed:
            raise TrainingError("this sum failed earlier; the round has to be given up")


def evaluation_parts(graph: Graph, params: Float32, records: Records, *, loss_bound: float) -> Parts:
    """``(1, correct, min(loss, loss_bound) / loss_bound)`` of each record, float64 [n, 3] in [0, 1].

    The graph gives sums over its rows, and a loss that is not finite spoils the sum for its neighbours, whose masks do
    not help (0 times NaN). So each record has a call of its own; what it contributes depends on no other.

    Args:
        graph: the loaded trainable graph.
        params: float32 [d].
        records: those that are evaluated.
        loss_bound: largest loss that counts.
    """
    size = graph.batch_size
    mask = np.zeros(size, np.float32)
    mask[0] = 1
    parts = np.ones((len(records), 3))
    for row in range(len(records)):
        # Its copies fill the other rows: nothing but the record can decide what comes of it.
        x: Float32 = np.repeat(records.x[row : row + 1], size, axis=0)
        y: Labels = np.repeat(records.y[row : row + 1], size, axis=0)
        loss, correct = graph.evaluate(params, x, y, mask)
        parts[row, 1:] = _share(correct, 1.0, otherwise=0.0), _share(loss, loss_bound, otherwise=1.0)
    return parts


def feature_parts(x: Float32, features: tuple[FeatureMsg, ...]) -> Parts:
    """``1``, then each feature's moments or shares, of each window; float64 [n, m].

    Args:
        x: windows float32 [n, ..., channels].
        features: what is asked, of channels that there are.
    """
    parts = np.ones((len(x), 1 + sum(feature.length for feature in features)))
    samples = math.prod(x.shape[1:-1])
    for feature, place in feature_places(features):
        u = _places(x[..., feature.channel].reshape(len(x), samples), feature)
        parts[:, place] = _moments(u) if feature.statistic == "moments" else _shares(u, feature.bins)
    return parts


def bounded_sum(parts: Parts, clip: float) -> NDArray[np.float64]:
    """Sum of the parts, float64 [m], each first scaled to an L2 norm of at most `clip`; one not finite is left out."""
    # Security: whatever made them, none may be longer than what the noise hides.
    usable = parts[np.isfinite(parts).all(axis=1)]
    # The largest number first: squares of what is made wrong may be beyond float64.
    largest = np.maximum(np.abs(usable).max(axis=1, initial=0.0), 1.0)
    with np.errstate(over="ignore"):
        norms = largest * np.linalg.norm(usable / largest[:, None], axis=1)
    scale = clip / np.maximum(norms, clip)
    total: NDArray[np.float64] = (usable * scale[:, None]).sum(axis=0)
    return total


def channels_problem(plan: PlanMsg, input_shape: tuple[int, ...]) -> str:
    """What is wrong with a plan's channels, as half a sentence; empty if nothing.

    Args:
        plan: any plan; only statistics name channels.
        input_shape: of one window, channels last.
    """
    if not isinstance(plan, StatisticsPlanMsg):
        return ""
    channels = input_shape[-1] if input_shape else 0
    for number, feature in enumerate(plan.features, start=1):
        if feature.channel >= channels:
            return (
                f"feature {number} of the plan asks for channel {feature.channel}, counted from 0; the model's input "
                f"has {channels}"
            )
    return ""


def _share(value: float, bound: float, *, otherwise: float) -> float:
    """How much of `bound` a number is, in [0, 1]; `otherwise` if it is none."""
    return float(min(max(value, 0.0), bound) / bound) if np.isfinite(value) else otherwise


def _places(samples: Float32, feature: FeatureMsg) -> NDArray[np.float64]:
    """Where samples lie between `low` and `high`, in [-1, 1]; NaN stays."""
    middle, half = feature.low / 2 + feature.high / 2, feature.high / 2 - feature.low / 2
    with np.errstate(all="ignore"):  # a range as wide or as narrow as float64 allows
        u: NDArray[np.float64] = np.clip((samples.astype(np.float64) - middle) / half, -1.0, 1.0)
    return u


def _moments(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of u and of u^2 over each window, [n, 2]."""
    u = np.nan_to_num(u, nan=0.0)
    return np.stack([u.mean(axis=1), (u * u).mean(axis=1)], axis=1)


def _shares(u: NDArray[np.float64], bins: int) -> NDArray[np.float64]:
    """Share of each window's samples in each bin, [n, bins]."""
    windows, samples = u.shape
    is_number = ~np.isnan(u)
    bin_of = np.minimum((u[is_number] + 1) / 2 * bins, bins - 1).astype(np.intp)
    window_of = np.nonzero(is_number)[0]
    counts = np.bincount(window_of * bins + bin_of, minlength=windows * bins)
    shares: NDArray[np.float64] = counts.reshape(windows, bins) / samples
    return shares


def _released(progress: LocalProgress | None, length: int) -> NDArray[np.float64] | None:
    """The stored release, if there is one."""
    if progress is None or progress.step == 0:
        return None
    values = np.frombuffer(progress.current, "<f8") if len(progress.current) == 8 * length else np.full(1, np.nan)
    if progress.step != 1 or not np.isfinite(values).all():
        raise TrainingError("the stored progress is no noisy sum of this plan; the round has to be given up")
    return values.astype(np.float64)
