"""From noisy sums to parameters: SGD, momentum, FedProx and SCAFFOLD on the device. Pure; sees no record.

Everything here is post-processing, so it costs no privacy (C. Dwork, A. Roth, *The Algorithmic Foundations of
Differential Privacy*, 2014, proposition 2.1). Of the records nothing enters but the noisy sums of the steps, each of
which is charged; `step` takes one as its only argument. What else goes into the parameters is

- public constants: learning rate η, divisor L, momentum m, μ, the number of steps T (the signed plan);
- x, the parameters that training starts from, and SCAFFOLD's server variate c: they come from the aggregator, which may
  choose them as it likes, after all it has seen, since each step's noise covers whatever gradients it asks for;
- what this device computed before: y, the velocity, the personal layers, its own variate c_i. Each is a function of
  earlier noisy sums, of this round or of rounds that were charged before it.

Sources: SGD on noisy sums, M. Abadi et al., arXiv 1607.00133, algorithm 1; heavy ball, B. T. Polyak 1964; FedProx,
T. Li et al., arXiv 1812.06127; SCAFFOLD, S. P. Karimireddy et al., arXiv 1910.06378, algorithm 1 with option II.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from device_client.errors import TrainingError
from device_client.ports import Float32
from fl_protocol.errors import LocalMisuseError
from fl_protocol.messages import TrainingPlanMsg

Control = tuple[Float32, Float32]
"""SCAFFOLD's control variates: the server's c and this device's c_i, float32 [shared parameters] each."""

_LARGEST = float(np.finfo(np.float32).max)


class LocalProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A local training between two steps; with its start, plan and control variates all that the next step needs.

    It holds no randomness. It is private to the device: kept encrypted with the records, for one round, and never sent.

    Args:
        step: noisy steps that went into it.
        current: y, little-endian float64 [d].
        velocity: of the momentum, little-endian float64 [d]; empty in a plan without.
    """

    step: int
    current: bytes
    velocity: bytes


class LocalOptimiser:
    """The device's parameters y over the steps of one round.

    Args:
        start: x, float32 [d]: the global parameters, then the personal layers of a model that has such.
        plan: what to compute.
        control: c and c_i of the shared parameters, which come first in `start`; zeros for a device that never took
            part. Personal layers have no drift to correct and are stepped without. Given exactly if the plan says
            `control_variates`.
        progress: where to go on from; the start by default.

    Raises:
        TrainingError: the control variates or the progress do not fit, or hold numbers that are not finite.
        LocalMisuseError: control variates are given and the plan has none, or the other way round.
    """

    def __init__(
        self,
        start: Float32,
        plan: TrainingPlanMsg,
        *,
        control: Control | None = None,
        progress: LocalProgress | None = None,
    ) -> None:
        if (control is not None) != plan.control_variates:
            raise LocalMisuseError(
                f"control: expected control variates exactly if the plan has them; it says {plan.control_variates}"
            )
        self._start, self._plan, self._control = start, plan, control
        self._correction = _correction(control, len(start)) if control is not None else None
        self._steps, self._current, self._velocity = 0, start.astype(np.float64), np.zeros(0)
        if plan.momentum:
            self._velocity = np.zeros(len(start))
        if progress is not None:
            self._resume(progress)

    @property
    def steps(self) -> int:
        """Noisy sums that went into the parameters."""
        return self._steps

    @property
    def params(self) -> Float32:
        """Y as the graph takes it, float32 [d]."""
        return self._current.astype(np.float32)

    @property
    def progress(self) -> LocalProgress:
        """What to go on from later."""
        return LocalProgress(self._steps, _to_bytes(self._current), _to_bytes(self._velocity))

    @property
    def change(self) -> Float32:
        """Y − x, float32 [d].

        Raises:
            TrainingError: it holds numbers that are not finite.
        """
        with np.errstate(over="ignore"):
            change: Float32 = (self._current - self._start).astype(np.float32)
        if not np.isfinite(change).all():
            raise _diverged(self._steps)
        return change

    @property
    def next_control(self) -> Float32:
        """SCAFFOLD's option II, c_i − c + (x − y) / (T·η), float32 [shared parameters], after T steps.

        It is computed from `change` as it is released. So c_i's own change, −c − change / (T·η), follows from the
        update and public numbers: the server computes it itself, and nothing of c_i has to be sent.

        Raises:
            LocalMisuseError: the plan has no control variates, or the steps are not done.
            TrainingError: it holds numbers that are not finite.
        """
        if self._control is None or self._steps != self._plan.local_steps:
            raise LocalMisuseError("next_control: expected a finished training with control variates")
        server, own = self._control
        change = self.change[: len(own)].astype(np.float64)
        mean_gradient = change / -(self._plan.local_steps * self._plan.learning_rate)
        with np.errstate(over="ignore"):
            following: Float32 = (own.astype(np.float64) - server + mean_gradient).astype(np.float32)
        if not np.isfinite(following).all():
            raise _diverged(self._steps)
        return following

    def step(self, noisy_sum: NDArray[np.float64]) -> None:
        """Take one step: v ← m·v + η·(noisy sum / L + μ·(y − x) − c_i + c), then y ← y − v.

        Args:
            noisy_sum: clipped gradients of a batch with noise on every coordinate, float64 [d].

        Raises:
            TrainingError: y left the range of float32.
        """
        plan = self._plan
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            # In this order, so that plain steps round as those of central training do.
            move = plan.learning_rate / plan.expected_batch_size * noisy_sum
            if plan.proximal_mu:
                move += plan.learning_rate * plan.proximal_mu * (self._current - self._start)
            if self._correction is not None:
                move[: len(self._correction)] += plan.learning_rate * self._correction
            if plan.momentum:
                self._velocity *= plan.momentum
                self._velocity += move
                move = self._velocity
            self._current -= move
        self._steps += 1
        if not _within_float32(self._current):
            raise _diverged(self._steps)

    def _resume(self, progress: LocalProgress) -> None:
        """Take over stored progress, if it can be this training's."""
        if not 0 <= progress.step <= self._plan.local_steps:
            raise TrainingError(
                f"the stored progress is at step {progress.step} of a training of {self._plan.local_steps}; "
                "the round has to be given up"
            )
        self._steps = progress.step
        self._current = _from_bytes(progress.current, len(self._current), "parameters")
        self._velocity = _from_bytes(progress.velocity, len(self._velocity), "velocities")


def _correction(control: Control, num_parameters: int) -> NDArray[np.float64]:
    """The variates' part of every step, c − c_i."""
    server, own = control
    if server.ndim != 1 or server.shape != own.shape or len(server) > num_parameters:
        raise TrainingError(
            f"the control variates have shapes {server.shape} (server) and {own.shape} (own); expected the same for "
            f"both, at most the model's {num_parameters} parameters"
        )
    difference: NDArray[np.float64] = server.astype(np.float64) - own
    if not np.isfinite(difference).all():
        raise TrainingError("the control variates hold numbers that are not finite; the round has to be given up")
    return difference


def _within_float32(values: NDArray[np.float64]) -> bool:
    """Whether all are finite as float32; a NaN is the least and the largest of its array."""
    return not values.size or bool(values.min() >= -_LARGEST and values.max() <= _LARGEST)


def _to_bytes(values: NDArray[np.float64]) -> bytes:
    return values.astype("<f8", copy=False).tobytes()


def _from_bytes(raw: bytes, count: int, what: str) -> NDArray[np.float64]:
    """Stored numbers, checked and writable."""
    if len(raw) != 8 * count:
        raise TrainingError(
            f"the stored progress has {len(raw)} bytes of {what}, expected {8 * count}; the round has to be given up"
        )
    values = np.frombuffer(raw, "<f8").astype(np.float64)
    if not _within_float32(values):
        raise TrainingError(f"the stored progress holds {what} that are not finite; the round has to be given up")
    return values


def _diverged(step: int) -> TrainingError:
    return TrainingError(
        f"the local model diverged: after step {step} it holds numbers that are not finite; lower learning_rate"
    )
