"""How much noise a budget asks for, as shares of devices or from the aggregator, and what is left of the signal. Pure.

Against the aggregator devices share the noise out among them (Skellam); against those who see released models only, the
aggregator adds it (discrete Gaussian). In both cases under the secure engine, in grid steps of a step that
`choose_step` finds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from aggregator.privacy.accounting import require_provable, round_rdp
from aggregator.privacy.adversaries import Adversary
from aggregator.privacy.composition import Limits
from aggregator.privacy.events import Participation, SecureSum, SkellamShares
from aggregator.privacy.grid_step import choose_step
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import skellam_bound
from fl_protocol.renyi import INTEGER_ORDERS, rdp_to_epsilon
from fl_protocol.secagg.fixed_point import FixedPoint
from fl_protocol.secagg.packing import packed_bytes

_PRECISION = 1e-4
_ROUNDING_DOWN = 1 - 1e-12
"""Costs that are added up round by round differ by less from those that are multiplied, as they are here."""
_MOST_NOISE = 1e6


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is wanted, and of how many devices.

    Args:
        epsilon, delta: at device level, for all rounds together.
        devices: in the population.
        rounds: of the task.
        adversary: against whom; `amplified` takes cohort over devices for the probability of secret coins.
        cohort: updates a round; plan with the fewest that are ever added up, since fewer bring less noise.
        participation_cap: rounds that one device takes part in at most; None if devices count none.
        minimum_separation_rounds: rounds from one participation to the next at least; 1 lets devices take part in all.
        parameters: d, numbers in an update.
        l2_norm_clip: C.

    Raises:
        LocalMisuseError: a value is out of range.
    """

    epsilon: float
    delta: float
    devices: int
    rounds: int
    cohort: int
    adversary: Adversary
    participation_cap: int | None = None
    minimum_separation_rounds: int = 1
    parameters: int = 8711
    l2_norm_clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise LocalMisuseError(f"epsilon: expected a number above 0, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise LocalMisuseError(f"delta: expected 0 < delta < 1, got {self.delta}")
        if not 0 < self.l2_norm_clip < math.inf:
            raise LocalMisuseError(f"l2_norm_clip: expected a number above 0, got {self.l2_norm_clip}")
        for name, least in (("devices", 2), ("rounds", 1), ("cohort", 2), ("parameters", 1)):
            if getattr(self, name) < least:
                raise LocalMisuseError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.cohort > self.devices:
            raise LocalMisuseError(
                f"cohort: expected at most {self.devices} of {self.devices} devices, got {self.cohort}"
            )
        if self.minimum_separation_rounds < 1:
            raise LocalMisuseError(
                f"minimum_separation_rounds: expected at least 1, got {self.minimum_separation_rounds}"
            )
        if self.mean_participations > self.most_participations:
            raise LocalMisuseError(
                f"{self.rounds} rounds of {self.cohort} updates are {self.mean_participations:g} a device, and it "
                f"takes part in at most {self.most_participations}; take a smaller cohort, fewer rounds or a higher cap"
            )

    @property
    def mean_participations(self) -> float:
        """Rounds that a device is in on average."""
        return self.rounds * self.cohort / self.devices

    @property
    def most_participations(self) -> int:
        """Rounds that one device can be in."""
        return self.participations_after(self.rounds)

    def participations_after(self, rounds: int) -> int:
        """Of the first so many rounds, all alike, those that one device can have been in."""
        apart = math.ceil(rounds / self.minimum_separation_rounds)
        return min(apart, self.participation_cap or apart)

    @property
    def limits(self) -> Limits:
        """Of one device, a round taking a second."""
        separation = self.minimum_separation_rounds
        return Limits(self.participation_cap, float(separation) if separation > 1 else 0.0)


@dataclass(frozen=True, kw_only=True)
class NoisePlan:
    """The noise that fits, and what comes with it.

    Args:
        epsilon: that is reached.
        noise_multiplier: standard deviation of the noise that counts, over the sensitivity of the sum.
        most_participations: rounds that one device can have been in.
        mean_participations: and was in on average.
        step: of the grid, in the update's unit.
        device_variance: of each device's Skellam share, in grid steps squared; 0 where devices add none.
        central_sigma: of the aggregator's discrete Gaussian, in grid steps; 0 where it adds none.
        modulus_bits: b.
        masked_bytes: of one device's masked vector; seeds, signature and seal come on top.
        noise_norm: expected L2 norm of all noise in the mean update, rounding included, in the update's unit.
        relative_error: the same over the clip: the error of the mean of updates as long as the clip.
        coordinate_noise: standard deviation of the same in one coordinate of the mean update.
        signal_to_noise: clip over `noise_norm`; in each coordinate the same, where the update is spread evenly.
        directed_signal_to_noise: clip over `coordinate_noise`: how far the mean update stands out of the noise in its
            own direction, were it known.
    """

    epsilon: float
    noise_multiplier: float
    most_participations: int
    mean_participations: float
    step: float
    device_variance: float
    central_sigma: float
    modulus_bits: int
    masked_bytes: int
    noise_norm: float
    relative_error: float
    coordinate_noise: float
    signal_to_noise: float
    directed_signal_to_noise: float


def plan_noise(request: PlanRequest) -> NoisePlan:
    """The least noise, to one part in 10,000, with which a task stays within its budget.

    Raises:
        LocalMisuseError: no noise does, it fits no grid, or amplification is asked for where none is proven.
    """
    require_provable(request.adversary, request.limits)
    # Neither the step nor the excess of Skellam noise matters yet: any fine grid.
    first = _least_multiplier(request, request.l2_norm_clip / (1000 * math.sqrt(request.parameters)))
    step = choose_step(
        l2_norm_clip=request.l2_norm_clip,
        length=request.parameters,
        cohort=request.cohort,
        noise_multiplier=first,
    )
    return _described(request, _least_multiplier(request, step), step)


def planned_rounds(request: PlanRequest, plan: NoisePlan) -> list[SecureSum]:
    """All rounds as they are planned, a round taking a second and no time between."""
    first, numbers = _round(request, plan.noise_multiplier, plan.step), range(1, request.rounds + 1)
    return [replace(first, round=number, opened_s=float(number), closed_s=float(number)) for number in numbers]


def planned_epsilons(request: PlanRequest, plan: NoisePlan) -> list[float]:
    """Epsilon after each round, with the noise of a plan."""
    event = _round(request, plan.noise_multiplier, plan.step)
    after = range(1, request.rounds + 1)
    return [_epsilon(request, event, request.participations_after(rounds)) for rounds in after]


def errors_by_cohort(request: PlanRequest, cohorts: Sequence[int]) -> list[float]:
    """`NoisePlan.relative_error` for other cohorts; NaN where no plan is possible."""

    def error(cohort: int) -> float:
        try:
            return plan_noise(replace(request, cohort=cohort)).relative_error
        except LocalMisuseError:
            return math.nan

    return [error(cohort) for cohort in cohorts]


def cohorts_around(request: PlanRequest, count: int = 16) -> list[int]:
    """Cohorts from a tenth of the request's to ten times it, as far as there are devices."""
    least, most = max(4, request.cohort / 10), min(request.devices, 10 * request.cohort)
    spread = {round(float(cohort)) for cohort in np.geomspace(least, max(least, most), count)}
    return sorted(spread | {request.cohort})


def _least_multiplier(request: PlanRequest, step: float) -> float:
    """By halving intervals: more noise never costs more."""

    def fits(noise_multiplier: float) -> bool:
        event = _round(request, noise_multiplier, step)
        return _epsilon(request, event, request.most_participations) <= request.epsilon * _ROUNDING_DOWN

    low, high = 0.0, 1.0
    while not fits(high):
        low, high = high, 2 * high
        if high > _MOST_NOISE:
            raise LocalMisuseError(
                f"no noise multiplier below {_MOST_NOISE:g} keeps {request.rounds} rounds within epsilon "
                f"{request.epsilon:g}; take a larger epsilon, fewer rounds, or a cap on participations"
            )
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _epsilon(request: PlanRequest, event: SecureSum, participations: int) -> float:
    """What so many rounds like this cost a device that was in all of them."""
    rdp = participations * round_rdp(event, request.adversary)
    return rdp_to_epsilon(rdp, request.delta, INTEGER_ORDERS)


def _fixed_point(request: PlanRequest, step: float, noise_bound: int = 0) -> FixedPoint:
    """How updates become integers; rotated, which spreads what is large over all coordinates."""
    return FixedPoint(request.parameters, request.l2_norm_clip, step, request.cohort, noise_bound, rotates=True)


def _round(request: PlanRequest, noise_multiplier: float, step: float) -> SecureSum:
    """A round as it is planned."""
    norm = _fixed_point_norm(request, step)
    variance = (noise_multiplier * norm) ** 2
    shares = _shares(request, variance)
    return SecureSum(
        round=1,
        opened_s=1.0,
        closed_s=1.0,
        l2_sensitivity=norm,
        dimension=request.parameters,
        participation=Participation(request.cohort / request.devices, request.adversary.amplified),
        shares=shares,
        central_sigma=0.0 if shares else math.sqrt(variance),
    )


def _fixed_point_norm(request: PlanRequest, step: float) -> float:
    """Sensitivity of the sum in grid steps: of one update, whatever the modulus."""
    return FixedPoint(request.parameters, request.l2_norm_clip, step, 1).norm_bound


def _shares(request: PlanRequest, variance: float) -> SkellamShares | None:
    """The devices' shares with which those that count have this variance; None where devices add no noise.

    Raises:
        LocalMisuseError: none counts.
    """
    if request.adversary.name == "model_release":
        return None
    counted = request.adversary.honest_shares(request.cohort)
    if counted == 0:
        raise LocalMisuseError(
            f"cohort: of {request.cohort} updates none is left whose noise counts, after the device's own and those of "
            "colluding devices; take a larger cohort, or assume fewer of them"
        )
    return SkellamShares(variance / counted, request.cohort)


def _described(request: PlanRequest, noise_multiplier: float, step: float) -> NoisePlan:
    """A noise multiplier with all that follows from it."""
    event = _round(request, noise_multiplier, step)
    shares, sigma = event.shares, event.central_sigma
    device_variance = shares.variance if shares else 0.0
    # What the aggregator adds comes after unmasking, and needs no room in the modulus.
    bound = request.cohort * skellam_bound(device_variance) if shares else 0
    fixed_point = _fixed_point(request, step, bound)
    in_sum = request.cohort * device_variance + sigma**2 + request.cohort / 4
    coordinate_noise = math.sqrt(in_sum) * step / request.cohort
    noise_norm = coordinate_noise * math.sqrt(request.parameters)
    return NoisePlan(
        epsilon=_epsilon(request, event, request.most_participations),
        noise_multiplier=noise_multiplier,
        most_participations=request.most_participations,
        mean_participations=request.mean_participations,
        step=step,
        device_variance=device_variance,
        central_sigma=sigma,
        modulus_bits=fixed_point.bits,
        masked_bytes=packed_bytes(request.parameters, fixed_point.bits),
        noise_norm=noise_norm,
        relative_error=noise_norm / request.l2_norm_clip,
        coordinate_noise=coordinate_noise,
        signal_to_noise=request.l2_norm_clip / noise_norm,
        directed_signal_to_noise=request.l2_norm_clip / coordinate_noise,
    )
