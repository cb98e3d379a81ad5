"""The operator's record-level epsilon: against the devices' accounting, against dp-accounting, and in its limits."""

from __future__ import annotations

import math
import subprocess
import sys

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import record_privacy
from aggregator.errors import AggregatorError
from aggregator.record_privacy import record_epsilon
from device_client.accounting import poisson_gaussian_rdp
from fl_protocol.errors import LocalMisuseError
from fl_protocol.plans import EvaluationPlanMsg, FeatureMsg, StatisticsPlanMsg, TrainingPlanMsg
from fl_protocol.renyi import ORDERS, epsilon_by_order, rdp_to_epsilon

INTEGER = [index for index, order in enumerate(ORDERS) if order == math.floor(order)]


def training(q: float, z: float, steps: int = 1) -> TrainingPlanMsg:
    return TrainingPlanMsg(
        sampling_rate=q,
        local_steps=steps,
        learning_rate=1.0,
        l2_norm_clip=1.0,
        noise_multiplier=z,
        expected_batch_size=10.0,
    )


def charged(q: float, z: float, steps: int) -> np.ndarray:
    """What a device's ledger counts for so many steps."""
    return poisson_gaussian_rdp(sampling_rate=q, noise_multiplier=z, steps=steps)


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(st.floats(1e-9, 1), st.just(1.0)),
    st.floats(0.3, 1e6),
    st.integers(1, 200),
    st.integers(1, 10_000),
    st.floats(1e-9, 1e-2),
)
def test_it_is_never_below_what_a_device_was_charged(q: float, z: float, steps: int, rounds: int, delta: float) -> None:
    ours = record_epsilon(training(q, z, steps), rounds, delta=delta)
    theirs = charged(q, z, steps * rounds)
    assert ours >= rdp_to_epsilon(theirs, delta)
    same_orders = float(epsilon_by_order(theirs, delta)[INTEGER].min())
    assert ours <= same_orders * (1 + 1e-8) + 2e-12 * steps * rounds


@pytest.mark.parametrize(("q", "z"), [(1.0, 8.0), (0.1, 1.0), (0.01, 0.6), (0.5, 20.0)])
@pytest.mark.parametrize("rounds", [1, 10, 500])
def test_it_is_what_dp_accounting_says_of_all_steps_composed(q: float, z: float, rounds: int) -> None:
    event = dp_accounting.GaussianDpEvent(z)
    sampled = event if q == 1 else dp_accounting.PoissonSampledDpEvent(q, event)
    peer = rdp.RdpAccountant([ORDERS[index] for index in INTEGER], dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for _ in range(3):
        peer.compose(sampled, rounds)
    assert record_epsilon(training(q, z, 3), rounds) == pytest.approx(peer.get_epsilon(1e-5), rel=1e-7)


def test_one_step_without_sampling_is_the_gaussian_mechanisms_closed_form() -> None:
    exact = min(a / 2 + math.log1p(-1 / a) - math.log(1e-5 * a) / (a - 1) for a in range(2, 65))
    found = record_epsilon(training(1.0, 1.0), 1)
    assert found == pytest.approx(exact, rel=1e-8)
    assert 4.73 < found < 4.73 * 1.005  # 4.73 is what orders between integers give (design section 6)


def test_evaluations_and_statistics_cost_one_step_a_round() -> None:
    one_step = record_epsilon(training(0.3, 2.0), 7)
    feature = FeatureMsg(name="acc", statistic="moments", channel=0, low=-1.0, high=1.0)
    assert record_epsilon(EvaluationPlanMsg(sampling_rate=0.3, noise_multiplier=2.0, loss_bound=5.0), 7) == one_step
    statistics = StatisticsPlanMsg(sampling_rate=0.3, noise_multiplier=2.0, features=(feature,))
    assert record_epsilon(statistics, 7) == one_step
    assert record_epsilon(training(0.3, 2.0, steps=7), 1) == one_step


def test_earlier_tasks_of_the_lineage_add_up() -> None:
    first, second = training(0.1, 1.5, steps=2), training(0.1, 1.5, steps=3)
    both = record_epsilon(second, 10, earlier=[(first, 15)])
    assert both == pytest.approx(record_epsilon(training(0.1, 1.5), 60), rel=1e-12)
    assert both > record_epsilon(second, 10)
    assert record_epsilon(second, 0, earlier=[(first, 15)]) == record_epsilon(first, 15)


def test_leaving_out_a_step_is_noticed_by_the_comparison_with_the_devices() -> None:
    broken = record_epsilon(training(0.1, 1.0, steps=9), 10)
    assert broken < rdp_to_epsilon(charged(0.1, 1.0, 100), 1e-5)


def test_without_noise_it_is_infinite_and_without_rounds_nothing() -> None:
    assert record_epsilon(training(1.0, 0.0), 1) == math.inf
    assert record_epsilon(training(0.1, 1e-200), 1) == math.inf
    assert record_epsilon(training(0.1, 1.0), 5, earlier=[(training(0.1, 0.0), 1)]) == math.inf
    assert record_epsilon(training(1.0, 0.0), 0) == 0
    assert math.isfinite(record_epsilon(training(0.1, 1e300), 1))


@given(st.floats(0.01, 1), st.floats(0.5, 20), st.integers(0, 1000), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_more_rounds_cost_more_and_a_larger_delta_less(q: float, z: float, rounds: int, more: int) -> None:
    plan = training(q, z)
    assert record_epsilon(plan, rounds + more) >= record_epsilon(plan, rounds)
    assert record_epsilon(plan, rounds, delta=1e-3) <= record_epsilon(plan, rounds, delta=1e-6)


def test_a_step_is_accounted_once_however_many_rounds_are_asked_about() -> None:
    record_privacy._step_rdp.cache_clear()
    for rounds in range(1, 300):
        record_epsilon(training(0.02, 1.1, steps=10), rounds)
    assert record_privacy._step_rdp.cache_info().misses == 1


def test_out_of_range_arguments_are_refused() -> None:
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(LocalMisuseError, match="delta"):
            record_epsilon(training(0.1, 1.0), 1, delta=delta)
    with pytest.raises(LocalMisuseError, match="rounds: expected at least 0, got -1"):
        record_epsilon(training(0.1, 1.0), -1)


def test_without_dp_accounting_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    record_privacy._step_rdp.cache_clear()
    monkeypatch.setitem(sys.modules, "dp_accounting", None)  # what importing a missing module sees
    with pytest.raises(AggregatorError, match=r"pip install 'covey\[aggregator\]'"):
        record_epsilon(training(0.1, 1.0), 1)
    assert record_epsilon(training(0.1, 0.0), 1) == math.inf


def test_it_is_loaded_only_when_asked() -> None:
    code = "import sys, aggregator.record_privacy; sys.exit('dp_accounting' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
