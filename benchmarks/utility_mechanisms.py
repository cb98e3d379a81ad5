"""The three places where noise can go in, each with the noise that a budget asks for, by the project's own accountant.

    local     each device adds all the noise that its own claim needs, and sends that to an aggregator that sees it
    secure    each device adds a share (Skellam); the aggregator sees the sum of the integer vectors, all shares in it
    central   a curator who is trusted sees the exact sum, adds discrete Gaussian noise, and shows that

The claim of `secure` is against the aggregator, with all other devices honest, and counts the shares of the others
alone (`Adversary.honest_shares`); `local` has it from one device's noise, against everybody; `central` against those
who see what the curator shows. No claim is amplified by sampling: everybody is in every round.

Masks are not expanded: modulo 2^b they cancel exactly, as `benchmarks.secure_aggregation` and its tests show.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from aggregator.privacy.accounting import device_epsilon
from aggregator.privacy.adversaries import Adversary
from aggregator.privacy.events import OpenSum, SecureSum, SkellamShares
from aggregator.privacy.mechanisms import Gaussian
from aggregator.privacy.planning import NoisePlan, PlanRequest, plan_noise, planned_rounds
from aggregator.privacy.record_level import record_level_noise, record_sensitivity
from aggregator.robust_rules import bounded
from device_client.accounting import poisson_gaussian_rdp
from device_client.noise import NoisyGrid
from fl_protocol.integer_noise import Entropy, skellam, skellam_bound
from fl_protocol.plans import TrainingPlanMsg
from fl_protocol.renyi import INTEGER_ORDERS, rdp_to_epsilon
from fl_protocol.secagg.fixed_point import FixedPoint

Arm = Literal["local", "secure", "central"]
Float32, Float64 = NDArray[np.float32], NDArray[np.float64]
AGGREGATOR, MODEL_RELEASE = Adversary(name="aggregator"), Adversary(name="model_release")
WIDEST_SHARE = 2.0**26
"""Variance of the widest Skellam noise that `fl_protocol.integer_noise` draws, in grid steps squared."""
FINEST = 2.0**13
"""Grid steps that one record moves a sum by, at most: rounding then costs less than half a percent."""
MOST_RECORDS = 200
"""Bound on the length of an update at record level, in clipped gradients; the wrists here have 119 at most."""


@dataclass(frozen=True)
class Budget:
    """What may be spent in all rounds together."""

    epsilon: float
    delta: float
    rounds: int


class Mechanism(Protocol):
    """How updates become a mean that may be seen."""

    epsilon: float
    """That was reached, by the accountant."""

    def mean(self, updates: Float32, entropy: Entropy) -> Float64:
        """The noisy mean, float64 [d], of updates [n, d]."""


@dataclass(frozen=True)
class Local:
    """Each update is bounded and released by itself; without a grid it has its noise already."""

    epsilon: float
    grid: NoisyGrid | None

    def mean(self, updates: Float32, entropy: Entropy) -> Float64:
        """Each device's release, added up."""
        if self.grid is None:
            return updates.sum(axis=0, dtype=np.float64) / len(updates)
        total = np.zeros(updates.shape[1])
        for update in updates:
            total += self.grid.release(bounded(update, self.grid.l2_norm_clip).astype(np.float64), entropy)
        return total / len(updates)


@dataclass(frozen=True)
class Central:
    """The exact sum of bounded updates, released once.

    Args:
        epsilon: that was reached.
        grid: of the release; its clip is what one device, or one record, moves the sum by.
        longest: to which each update is bounded; infinite where its records are.
    """

    epsilon: float
    grid: NoisyGrid
    longest: float

    def mean(self, updates: Float32, entropy: Entropy) -> Float64:
        """One release."""
        kept = [bounded(update, self.longest) for update in updates] if math.isfinite(self.longest) else updates
        return self.grid.release(np.sum(kept, axis=0, dtype=np.float64), entropy) / len(updates)


@dataclass(frozen=True)
class Secure:
    """Bounded, on the grid, with a share of the noise each; added up modulo 2^b.

    Args:
        epsilon: that was reached.
        fixed_point: how updates become integers.
        device_variance: of a share, in grid steps squared.
    """

    epsilon: float
    fixed_point: FixedPoint
    device_variance: float

    def mean(self, updates: Float32, entropy: Entropy) -> Float64:
        """The sum that the aggregator decodes, over the number of devices."""
        shares = skellam(self.device_variance, updates.size, entropy).reshape(updates.shape)
        modulus, total = 1 << self.fixed_point.bits, np.zeros(updates.shape[1], np.int64)
        for update, share in zip(updates, shares, strict=True):
            vector = self.fixed_point.encode(update, rotation_seed=b"", entropy=entropy) + share
            total = (total + vector % modulus) % modulus
        return self.fixed_point.decode(total.astype(np.uint64), count=len(updates), rotation_seed=b"") / len(updates)


def noise_over(secure: Secure, central: Central, *, devices: int) -> float:
    """Standard deviation of all that `secure` adds to a coordinate of the sum, rounding included, over `central`'s."""
    variance = devices * (secure.device_variance + 0.25)
    return math.sqrt(variance) * secure.fixed_point.step / (central.grid.sigma * central.grid.step)


def device_level(arm: Arm, budget: Budget, *, l2_norm_clip: float, devices: int, parameters: int) -> Mechanism:
    """Neighbours: one device's whole update in every round, or zeros.

    Args:
        arm: where the noise goes in.
        budget: of a device that is in every round.
        l2_norm_clip: to which whole updates are clipped.
        devices: n, all in every round.
        parameters: d.
    """
    request = PlanRequest(
        epsilon=budget.epsilon,
        delta=budget.delta,
        devices=devices,
        rounds=budget.rounds,
        cohort=devices,
        adversary=AGGREGATOR if arm == "secure" else MODEL_RELEASE,
        parameters=parameters,
        l2_norm_clip=l2_norm_clip,
    )
    plan = _planned(request)
    if arm == "secure":
        events = planned_rounds(request, plan)
        bound = devices * skellam_bound(plan.device_variance)
        fixed_point = FixedPoint(parameters, l2_norm_clip, plan.step, devices, bound, bits=plan.modulus_bits)
        reached = device_epsilon(events, delta=budget.delta, adversary=AGGREGATOR)
        return Secure(reached, fixed_point, plan.device_variance)
    # One device's release to an aggregator that sees it costs what one sum costs whoever sees that.
    sums = [
        OpenSum(
            round=number,
            opened_s=float(number),
            closed_s=float(number),
            l2_sensitivity=l2_norm_clip,
            central_sigma=plan.noise_multiplier * l2_norm_clip,
        )
        for number in range(1, budget.rounds + 1)
    ]
    reached = device_epsilon(sums, delta=budget.delta, adversary=MODEL_RELEASE)
    grid = NoisyGrid(l2_norm_clip, plan.noise_multiplier, parameters)
    return Central(reached, grid, l2_norm_clip) if arm == "central" else Local(reached, grid)


def record_level(arm: Arm, budget: Budget, *, plan: TrainingPlanMsg, devices: int, parameters: int) -> Mechanism:
    """Neighbours: one window of one device added or removed.

    Args:
        arm: where the noise goes in; `local` takes it from the plan.
        budget: of a record whose device is in every round.
        plan: one step on all records; with `local` its noise is each device's own, else it has none.
        devices: n, all in every round.
        parameters: d.

    Raises:
        LocalMisuseError: shared noise carries no claim for records under this plan.
    """
    if arm == "local":
        return Local(_own_epsilon(plan, budget), None)
    wanted = needed_multiplier(budget)
    if arm == "central":
        grid = NoisyGrid(record_sensitivity(plan), wanted, parameters)
        return Central(_record_epsilon(wanted, budget), grid, math.inf)
    return _shared_record_noise(wanted, budget, plan, devices, parameters)


def needed_multiplier(budget: Budget) -> float:
    """The least noise multiplier of Gaussian noise for a budget, by the accountant's integer orders."""
    request = PlanRequest(
        epsilon=budget.epsilon,
        delta=budget.delta,
        devices=2,
        rounds=budget.rounds,
        cohort=2,
        adversary=MODEL_RELEASE,
    )
    return _planned(request).noise_multiplier


def _shared_record_noise(wanted: float, budget: Budget, plan: TrainingPlanMsg, devices: int, parameters: int) -> Secure:
    """Shares that are worth the noise multiplier that is wanted.

    Rounding may move every coordinate by 2 grid steps for one record, so the grid has to be fine against what a record
    moves, far finer than an update needs: as fine as the widest share that can be drawn allows, `FINEST` at most.
    """
    rounding, sensitivity = 2 * math.sqrt(parameters), record_sensitivity(plan)
    fineness = min(FINEST, 0.99 * math.sqrt(WIDEST_SHARE * (devices - 1)) / wanted - rounding)
    plain = FixedPoint(parameters, MOST_RECORDS * sensitivity, sensitivity / fineness, devices)
    event = SecureSum(round=1, opened_s=0.0, closed_s=0.0, l2_sensitivity=plain.norm_bound, dimension=parameters)
    variance, worth = (wanted * (fineness + rounding)) ** 2 / (devices - 1), 0.0
    while worth < wanted:
        variance *= (wanted / worth) ** 2 * (1 + 1e-9) if worth else 1.0
        event = replace(event, shares=SkellamShares(variance, devices))
        worth = record_level_noise(plan, event, fixed_point=plain, personal_parameters=0, adversary=AGGREGATOR)
    fixed_point = replace(plain, noise_bound=devices * skellam_bound(variance), bits=0)
    return Secure(_record_epsilon(worth, budget), fixed_point, variance)


def _own_epsilon(plan: TrainingPlanMsg, budget: Budget) -> float:
    """What a device's own ledger shows after all rounds; it uses more orders, since its noise is of one kind."""
    steps = budget.rounds * plan.local_steps
    rdp = poisson_gaussian_rdp(sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier, steps=steps)
    return rdp_to_epsilon(rdp, budget.delta)


def _record_epsilon(noise_multiplier: float, budget: Budget) -> float:
    """What all rounds cost a record, at the integer orders, which hold for every kind of noise here."""
    rdp = budget.rounds * Gaussian(1.0, noise_multiplier).rdp()
    return rdp_to_epsilon(rdp, budget.delta, INTEGER_ORDERS)


@functools.lru_cache(maxsize=1024)
def _planned(request: PlanRequest) -> NoisePlan:
    return plan_noise(request)
