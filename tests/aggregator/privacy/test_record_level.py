"""Shared noise and claims for single records: one step only, and with a sensitivity that rounding cannot exceed."""

from __future__ import annotations

import math
import os
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from aggregator.privacy import record_level
from aggregator.privacy.events import SecureSum, SkellamShares
from aggregator.privacy.mechanisms import Skellam
from fl_protocol.errors import LocalMisuseError
from fl_protocol.plans import TrainingPlanMsg
from fl_protocol.renyi import INTEGER_ORDERS
from fl_protocol.secagg.fixed_point import FixedPoint
from tests.aggregator.privacy.rounds import AGGREGATOR, SAMPLED, central, secure
from tests.enrolments import broken_copy

DIMENSION = 64
FIXED_POINT = FixedPoint(DIMENSION, l2_norm_clip=1.0, step=2.0**-12, most_updates=1000, rotates=True)


def plan(**changes: Any) -> TrainingPlanMsg:
    about: dict[str, Any] = {
        "sampling_rate": 0.1,
        "local_steps": 1,
        "learning_rate": 2.0,
        "l2_norm_clip": 0.5,
        "noise_multiplier": 0.0,
        "expected_batch_size": 40.0,
    }
    return TrainingPlanMsg(**{**about, **changes})


def summed(variance: float = 1000.0, arrived: int = 101) -> SecureSum:
    return secure(l2_sensitivity=FIXED_POINT.norm_bound, dimension=DIMENSION, shares=SkellamShares(variance, arrived))


def worth(module: ModuleType, one: TrainingPlanMsg, event: SecureSum | None = None, **changes: Any) -> float:
    about = {"fixed_point": FIXED_POINT, "personal_parameters": 0, "adversary": AGGREGATOR, **changes}
    return module.record_level_noise(one, event or summed(), **about)  # type: ignore[no-any-return]


def check_only_one_step_carries_a_claim(module: ModuleType) -> None:
    assert worth(module, plan()) > 0
    for changes, words in (
        ({"local_steps": 2}, "local_steps: expected 1"),
        ({"control_variates": True}, "control variates"),
    ):
        with pytest.raises(LocalMisuseError, match=words):
            worth(module, plan(**changes))
    with pytest.raises(LocalMisuseError, match="7 personal parameters"):
        worth(module, plan(), personal_parameters=7)
    with pytest.raises(LocalMisuseError, match="about devices"):
        worth(module, plan(), adversary=SAMPLED)


def test_with_several_local_steps_shared_noise_carries_no_claim_for_records() -> None:
    check_only_one_step_carries_a_claim(record_level)
    for change in [
        ("if plan.local_steps != 1:", "if False:"),
        ("if plan.control_variates or personal_parameters:", "if plan.control_variates:"),
        ("if plan.control_variates or personal_parameters:", "if personal_parameters:"),
        ("if adversary.amplified:", "if False:"),
    ]:
        with pytest.raises((pytest.fail.Exception, LocalMisuseError)):
            check_only_one_step_carries_a_claim(broken_copy(record_level.__name__, change))


def test_the_noise_multiplier_is_worth_no_more_than_the_noise_at_any_order() -> None:
    z = worth(record_level, plan())
    sensitivity = 2.0 * 0.5 / 40 / FIXED_POINT.step + 2 * math.sqrt(DIMENSION)
    cost = Skellam(sensitivity, math.sqrt(DIMENSION) * sensitivity, 100_000.0).rdp()
    assert (np.array(INTEGER_ORDERS) / (2 * z * z) >= cost).all()
    assert 0.99 * math.sqrt(100_000) / sensitivity < z < math.sqrt(100_000) / sensitivity


def check_one_record_moves_rounded_updates_no_further(module: ModuleType) -> None:
    """By trying: gradients at the clip, neighbours with one record less, rounded afresh each time."""
    random, one = np.random.default_rng(3), plan()
    coarse = FixedPoint(DIMENSION, l2_norm_clip=0.05, step=0.01, most_updates=1000, rotates=True)
    event = secure(l2_sensitivity=coarse.norm_bound, dimension=DIMENSION, shares=SkellamShares(1e6, 101))
    # Noise over the noise multiplier is the sensitivity that it was found with.
    stated = math.sqrt(100 * 1e6) / worth(module, one, event, fixed_point=coarse)
    for _ in range(300):
        gradients = random.normal(size=(3, DIMENSION))
        gradients *= 0.5 / np.linalg.norm(gradients, axis=1, keepdims=True)
        both = [gradients[:count].sum(axis=0) * 2.0 / 40 for count in (2, 3)]
        rounded = [
            coarse.encode(update.astype(np.float32), rotation_seed=bytes(32), entropy=os.urandom) for update in both
        ]
        assert np.linalg.norm(rounded[1] - rounded[0]) <= stated


def test_one_record_moves_a_rounded_update_no_further_than_is_accounted() -> None:
    check_one_record_moves_rounded_updates_no_further(record_level)
    # Leaving the rounding out of the sensitivity is caught.
    broken = broken_copy(record_level.__name__, (" + 2 * math.sqrt(event.dimension)", ""))
    with pytest.raises(AssertionError):
        check_one_record_moves_rounded_updates_no_further(broken)


def test_noise_that_does_not_count_is_worth_nothing() -> None:
    assert worth(record_level, plan(), central(l2_sensitivity=FIXED_POINT.norm_bound, dimension=DIMENSION)) == 0
    assert worth(record_level, plan(), summed(arrived=1)) == 0
    assert worth(record_level, plan(), summed(arrived=51)) < worth(record_level, plan(), summed())
