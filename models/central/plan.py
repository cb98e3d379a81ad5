"""What a central training will do, fixed before its first step, and what it costs in privacy. Pure.

Epsilon is at record level: neighbours differ by one record added or removed, as on devices, because the accountant is
theirs (`device_client.accounting`). The adversary sees every noisy sum.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from device_client.accounting import noise_multiplier_for, poisson_gaussian_rdp
from fl_protocol.errors import LocalMisuseError
from fl_protocol.renyi import rdp_to_epsilon

NEIGHBOURS = "add or remove one record"
NO_CLIP = 1e10
"""Clip of a training without privacy: no gradient of a model that trains is as long."""

_ROUNDING = 1e-9

Schedule = Literal["constant", "cosine", "linear"]
AverageKind = Literal["none", "tail", "ema"]


class Averaging(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which mean of the parameters is the finished model; computed from released sums only, so it costs no privacy.

    Args:
        kind: ``none``: the last parameters. ``tail``: the plain mean over the last steps. ``ema``: an exponential mean.
        amount: ``tail``: the fraction of the planned steps; ``ema``: the weight of the past, its decay.
    """

    kind: AverageKind = "none"
    amount: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "tail" and not 0 < self.amount <= 1:
            raise LocalMisuseError(f"average tail: expected a fraction in (0, 1], got {self.amount:g}.")
        if self.kind == "ema" and not 0 < self.amount < 1:
            raise LocalMisuseError(f"average ema: expected a decay between 0 and 1, got {self.amount:g}.")


class CentralPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A central training; made by `plan_training`.

    Args:
        steps: noisy steps that are planned.
        sampling_rate: q, with which each record enters each batch, independently.
        expected_batch_size: public divisor of the noisy sum.
        l2_norm_clip: bound C on each record's gradient norm.
        noise_multiplier: noise standard deviation over C; 0 is no privacy.
        learning_rate: of the first step.
        schedule: how the learning rate goes on from there: to 0 by the planned end unless constant.
        momentum: weight of the step before (heavy ball), on the host.
        averaging: which parameters are the finished model.
        delta: for which epsilon is stated.
        epsilon_budget: never exceeded, however often the training is killed and resumed; None sets no limit.
    """

    steps: int
    sampling_rate: float
    expected_batch_size: float
    l2_norm_clip: float
    noise_multiplier: float
    learning_rate: float
    schedule: Schedule
    momentum: float
    averaging: Averaging
    delta: float
    epsilon_budget: float | None

    @property
    def epochs(self) -> int:
        """How many the planned steps are, the last one perhaps cut short."""
        return max(1, math.ceil(self.steps * self.sampling_rate - _ROUNDING))

    def epochs_after(self, step: int) -> int:
        """How many whole epochs so many steps are; in each, as many examples are expected as there are."""
        return math.floor(step * self.sampling_rate + _ROUNDING)

    @property
    def is_private(self) -> bool:
        """Whether there is noise."""
        return self.noise_multiplier > 0

    def epsilon(self, noisy_sums: int) -> float:
        """Epsilon at `delta` of so many noisy sums, at the best of the accountant's orders; infinite without noise."""
        rdp = poisson_gaussian_rdp(
            sampling_rate=self.sampling_rate, noise_multiplier=self.noise_multiplier, steps=noisy_sums
        )
        return rdp_to_epsilon(rdp, self.delta)

    def affordable(self, wanted: int, *, charged: int) -> int:
        """How many of `wanted` more noisy sums the budget allows on top of those that were charged."""
        if self.epsilon_budget is None or self.epsilon(charged + wanted) <= self.epsilon_budget:
            return wanted
        low, high = 0, wanted  # low is within the budget (or nothing more is asked), high is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.epsilon(charged + middle) <= self.epsilon_budget else (low, middle)
        return low

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, the first being 0."""
        if self.schedule == "linear":
            return self.learning_rate * (1 - step / self.steps)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate


def plan_training(
    *,
    num_examples: int,
    batch_size: int,
    learning_rate: float,
    l2_norm_clip: float,
    steps: int | None = None,
    epochs: int | None = None,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
    delta: float = 1e-5,
    schedule: Schedule = "constant",
    momentum: float = 0.0,
    averaging: Averaging | None = None,
) -> CentralPlan:
    """Fix a training before it starts.

    Args:
        num_examples: n; it shows in the sampling rate, so it is public.
        batch_size: expected size of a Poisson batch; the sampling rate is this over n.
        learning_rate: of the first step.
        l2_norm_clip: bound on each record's gradient norm; not used without privacy.
        steps: how many; or give `epochs`.
        epochs: passes over as many examples as there are.
        noise_multiplier: noise standard deviation over the clip; or give `epsilon`; with neither there is no privacy.
        epsilon: finds the smallest noise multiplier (to 1e-4) whose planned steps cost at most this.
        delta: at which epsilon is stated.
        schedule: of the learning rate.
        momentum: of the host's steps, 0 to below 1.
        averaging: of the parameters.

    Raises:
        LocalMisuseError: a number is out of its range, or two contradict each other.
    """
    if num_examples < batch_size or batch_size < 1:
        raise LocalMisuseError(
            f"batch size: expected 1 to {num_examples}, the number of examples, got {batch_size}; give --batch-size."
        )
    if (steps is None) == (epochs is None):
        raise LocalMisuseError("length: expected either steps or epochs.")
    if noise_multiplier is not None and epsilon is not None:
        raise LocalMisuseError("noise: expected either a noise multiplier or an epsilon, got both.")
    total = steps if steps is not None else (epochs or 0) * num_examples // batch_size
    _check_above_zero(steps=total, learning_rate=learning_rate, l2_norm_clip=l2_norm_clip)
    if noise_multiplier is not None:
        _check_above_zero(noise_multiplier=noise_multiplier)
    if epsilon is not None:
        _check_above_zero(epsilon=epsilon)
    if not 0 < delta < 1 or not 0 <= momentum < 1:
        raise LocalMisuseError(f"expected 0 < delta < 1 and 0 <= momentum < 1, got {delta:g} and {momentum:g}.")
    rate = batch_size / num_examples
    noise = noise_multiplier or 0.0
    if epsilon is not None:
        noise = noise_multiplier_for(epsilon=epsilon, delta=delta, sampling_rate=rate, steps=total)
    return CentralPlan(
        steps=total,
        sampling_rate=rate,
        expected_batch_size=float(batch_size),
        l2_norm_clip=l2_norm_clip if noise else NO_CLIP,
        noise_multiplier=noise,
        learning_rate=learning_rate,
        schedule=schedule,
        momentum=momentum,
        averaging=averaging or Averaging(),
        delta=delta,
        epsilon_budget=epsilon,
    )


def _check_above_zero(**values: float) -> None:
    """Each is a finite number above 0."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise LocalMisuseError(f"{name.replace('_', ' ')}: expected more than 0, got {value:g}.")
