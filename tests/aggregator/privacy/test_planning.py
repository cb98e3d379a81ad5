"""Plans: within the budget and hardly below it, on a grid that costs next to nothing, with errors that come true."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent, mechanism_calibration, rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.privacy import grid_step, planning
from aggregator.privacy.accounting import device_epsilon
from aggregator.privacy.adversaries import Adversary
from aggregator.privacy.events import SecureSum, SkellamShares
from aggregator.privacy.grid_step import TOLERANCE, choose_step
from aggregator.privacy.mechanisms import Gaussian, Skellam
from aggregator.privacy.planning import (
    PlanRequest,
    cohorts_around,
    errors_by_cohort,
    plan_noise,
    planned_epsilons,
    planned_rounds,
)
from fl_protocol.encoding.rotation import rotate
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import skellam
from fl_protocol.renyi import INTEGER_ORDERS
from fl_protocol.secagg.fixed_point import FixedPoint
from tests.aggregator.privacy.rounds import AGGREGATOR, MODEL_RELEASE, SAMPLED
from tests.enrolments import broken_copy


def wanted(**changes: Any) -> PlanRequest:
    about: dict[str, Any] = {
        "epsilon": 2.0,
        "delta": 1e-6,
        "devices": 5000,
        "rounds": 200,
        "cohort": 500,
        "adversary": AGGREGATOR,
        "participation_cap": 20,
    }
    return PlanRequest(**{**about, **changes})


REQUESTS = [
    wanted(),
    wanted(participation_cap=None),
    wanted(participation_cap=None, minimum_separation_rounds=10),
    wanted(adversary=Adversary(name="aggregator", colluding_share=0.3), epsilon=8.0),
    wanted(adversary=MODEL_RELEASE, parameters=378, l2_norm_clip=0.5),
    wanted(adversary=SAMPLED, participation_cap=None),
    wanted(devices=20, cohort=4, rounds=5, participation_cap=None, epsilon=20.0),
]


def accounted_epsilon(request_: PlanRequest, events: list[SecureSum]) -> float:
    """What the accountant says of rounds."""
    return device_epsilon(events, delta=request_.delta, adversary=request_.adversary, limits=request_.limits)


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_plan_is_within_its_budget_and_hardly_below(request_: PlanRequest) -> None:
    plan = plan_noise(request_)
    assert 0.999 * request_.epsilon < plan.epsilon <= request_.epsilon
    less = planned_epsilons(request_, replace(plan, noise_multiplier=0.999 * plan.noise_multiplier))
    assert less[-1] > request_.epsilon
    epsilons = planned_epsilons(request_, plan)
    assert epsilons[-1] == plan.epsilon
    for count in (1, 7, request_.rounds):
        accounted = accounted_epsilon(request_, planned_rounds(request_, plan)[:count])
        assert accounted == pytest.approx(epsilons[min(count, request_.rounds) - 1], rel=1e-12)
        assert accounted <= request_.epsilon


def test_the_noise_multiplier_is_that_of_dp_accounting() -> None:
    plan = plan_noise(wanted())
    theirs = mechanism_calibration.calibrate_dp_mechanism(
        lambda: rdp.RdpAccountant(list(INTEGER_ORDERS)),
        lambda z: SelfComposedDpEvent(GaussianDpEvent(z), 20),
        2.0,
        1e-6,
        mechanism_calibration.LowerEndpointAndGuess(1e-9, 10.0),
    )
    assert plan.most_participations == 20
    assert theirs <= plan.noise_multiplier <= 1.002 * theirs


def test_shares_bring_the_noise_without_the_device_and_without_colluders() -> None:
    honest, hostile = plan_noise(wanted()), plan_noise(wanted(adversary=REQUESTS[3].adversary))
    for plan, counted in ((honest, 499), (hostile, 349)):
        norm = FixedPoint(8711, 1.0, plan.step, 1).norm_bound
        assert plan.device_variance * counted == pytest.approx((plan.noise_multiplier * norm) ** 2)
        assert plan.central_sigma == 0
    assert hostile.relative_error > 1.15 * honest.relative_error
    with pytest.raises(LocalMisuseError, match="none is left whose noise counts"):
        plan_noise(
            wanted(cohort=2, participation_cap=None, adversary=Adversary(name="aggregator", colluding_devices=1))
        )


def test_the_error_of_a_mean_is_what_the_plan_says() -> None:
    # One round of real encoding and real noise. Of 378 squared normal numbers the mean is within 0.36 of 1 in all but
    # one of a million draws (5 standard deviations of sqrt(2 / 378)).
    request_ = wanted(parameters=378, devices=400, cohort=40, epsilon=8.0)
    plan = plan_noise(request_)
    fixed_point = FixedPoint(378, 1.0, plan.step, 40, rotates=True)
    update = np.ones(378, np.float32) / 30
    total = sum(
        fixed_point.encode(update, rotation_seed=bytes(32), entropy=os.urandom)
        + skellam(plan.device_variance, 378, os.urandom)
        for _ in range(40)
    )
    error = np.asarray(total) * plan.step / 40 - rotate(update, bytes(32))
    assert np.sum(error**2) == pytest.approx(plan.noise_norm**2, rel=0.36)
    assert plan.coordinate_noise * math.sqrt(378) == pytest.approx(plan.noise_norm)
    assert plan.signal_to_noise == pytest.approx(1 / plan.relative_error)


def test_sums_of_a_plan_fit_its_modulus_in_the_bytes_it_says() -> None:
    plan = plan_noise(wanted())
    assert plan.masked_bytes == math.ceil(8711 * plan.modulus_bits / 8)
    assert 500 / plan.step + 6 * math.sqrt(500 * plan.device_variance) < 2 ** (plan.modulus_bits - 1)
    # What the aggregator adds comes after unmasking.
    central = plan_noise(wanted(adversary=MODEL_RELEASE))
    assert central.modulus_bits < plan.modulus_bits


def test_larger_cohorts_have_less_error_and_impossible_ones_none() -> None:
    request_ = wanted()
    cohorts = cohorts_around(request_, 6)
    assert cohorts[0] == 50
    assert cohorts[-1] == 5000
    assert request_.cohort in cohorts
    errors = [error for error in errors_by_cohort(request_, cohorts) if not math.isnan(error)]
    assert len(errors) == sum(cohort <= 500 for cohort in cohorts)  # twenty rounds each is all that 5,000 devices give
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"delta": 1.0}, "delta"),
        ({"devices": 1}, "devices"),
        ({"rounds": 0}, "rounds"),
        ({"cohort": 1}, "cohort"),
        ({"cohort": 6000}, "at most 5000"),
        ({"parameters": 0}, "parameters"),
        ({"l2_norm_clip": 0.0}, "l2_norm_clip"),
        ({"minimum_separation_rounds": 0}, "minimum_separation_rounds"),
        ({"participation_cap": 19}, "takes part in at most 19"),
        ({"participation_cap": None, "minimum_separation_rounds": 11}, "takes part in at most 19"),
    ],
)
def test_what_cannot_be_wanted_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LocalMisuseError, match=words):
        wanted(**changes)


def test_a_budget_that_no_noise_keeps_is_refused() -> None:
    with pytest.raises(LocalMisuseError, match="no noise multiplier below"):
        plan_noise(wanted(epsilon=1e-9, rounds=200))
    with pytest.raises(LocalMisuseError, match="depend on earlier rounds"):
        plan_noise(wanted(adversary=SAMPLED))


def check_the_step_costs_next_to_nothing(module: ModuleType, length: int, cohort: int, z: float, clip: float) -> None:
    step = module.choose_step(l2_norm_clip=clip, length=length, cohort=cohort, noise_multiplier=z)
    assert step <= clip
    assert math.log2(step) % 1 == 0
    norm = FixedPoint(length, clip, step, 1).norm_bound
    sigma = z * norm
    assert norm * step <= (1 + TOLERANCE) * clip
    assert math.hypot(sigma, math.sqrt(cohort / 4)) <= (1 + TOLERANCE) * sigma * (1 + 1e-12)
    gaussian = Gaussian(norm, sigma).rdp()
    assert (Skellam(norm, min(math.sqrt(length) * norm, norm**2), sigma**2).rdp() <= (1 + TOLERANCE) * gaussian).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100_000), st.integers(2, 20_000), st.floats(0.1, 100), st.floats(0.01, 100))
def test_the_step_costs_next_to_nothing(length: int, cohort: int, z: float, clip: float) -> None:
    check_the_step_costs_next_to_nothing(grid_step, length, cohort, z, clip)


def test_twice_the_step_would_not_do() -> None:
    for length, cohort, z in ((8711, 500, 10.0), (10, 20_000, 0.5), (1, 2, 1.0)):
        step = choose_step(l2_norm_clip=1.0, length=length, cohort=cohort, noise_multiplier=z)
        assert grid_step._is_fine(1 / step, length, cohort, z)
        assert not grid_step._is_fine(0.5 / step, length, cohort, z)


@pytest.mark.parametrize(
    "change",
    [
        ("norm <= (1 + TOLERANCE) * clip_steps\n", "True\n"),
        ("and cohort / 4 <= ((1 + TOLERANCE) ** 2 - 1) * variance\n", "\n"),
        ("and 1 + 1.5 * math.sqrt(length) / norm <= TOLERANCE * variance\n", "\n"),
    ],
)
def test_a_step_that_is_too_coarse_is_caught(change: tuple[str, str]) -> None:
    def all_checks(module: ModuleType) -> None:
        for length, cohort, z in ((8711, 500, 10.0), (10, 20_000, 0.5), (1, 2, 0.1)):
            check_the_step_costs_next_to_nothing(module, length, cohort, z, 1.0)

    all_checks(broken_copy(grid_step.__name__))
    with pytest.raises(AssertionError):
        all_checks(broken_copy(grid_step.__name__, change))


def check_plans_keep_their_budget(module: ModuleType) -> None:
    """By accounting the devices' noise as it would be, whatever the plan says of itself."""
    for request_ in REQUESTS[:4]:
        plan = module.plan_noise(module.PlanRequest(**vars(request_)))
        events = [
            SecureSum(
                round=number,
                opened_s=float(number),
                closed_s=float(number),
                l2_sensitivity=FixedPoint(8711, 1.0, plan.step, 1).norm_bound,
                dimension=8711,
                shares=SkellamShares(plan.device_variance, request_.cohort),
            )
            for number in range(1, request_.rounds + 1)
        ]
        assert accounted_epsilon(request_, events) <= request_.epsilon


@pytest.mark.parametrize(
    "change",
    [
        ("<= request.epsilon * _ROUNDING_DOWN", "<= 1.1 * request.epsilon"),
        ("return self.participations_after(self.rounds)", "return math.ceil(self.mean_participations)"),
        ("math.ceil(rounds / self.min", "math.floor(rounds / 2 / self.min"),
        ("l2_sensitivity=norm,", "l2_sensitivity=0.9 * norm,"),
        (", 1).norm_bound", ", 1).l2_norm_clip / step"),
    ],
)
def test_a_plan_with_too_little_noise_is_caught(change: tuple[str, str]) -> None:
    check_plans_keep_their_budget(broken_copy(planning.__name__))
    with pytest.raises(AssertionError):
        check_plans_keep_their_budget(broken_copy(planning.__name__, change))


def test_a_step_for_values_out_of_range_is_refused() -> None:
    for about in ((0.0, 10, 5, 1.0), (1.0, 0, 5, 1.0), (1.0, 10, 0, 1.0), (1.0, 10, 5, 0.0), (math.nan, 10, 5, 1.0)):
        with pytest.raises(LocalMisuseError, match="expected l2_norm_clip and noise_multiplier"):
            choose_step(l2_norm_clip=about[0], length=about[1], cohort=about[2], noise_multiplier=about[3])
