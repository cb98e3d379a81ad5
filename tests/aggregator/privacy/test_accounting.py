"""What rounds cost a device: against dp-accounting, against exact divergences, and where amplification is refused."""

from __future__ import annotations

import math
from types import ModuleType

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp

from aggregator.privacy import accounting
from aggregator.privacy.accounting import device_epsilon, device_rdp, round_rdp
from aggregator.privacy.adversaries import Adversary
from aggregator.privacy.composition import Limits
from aggregator.privacy.events import OpenSum, Participation, ReleasedSum, SkellamShares
from fl_protocol.errors import LocalMisuseError
from fl_protocol.renyi import INTEGER_ORDERS
from tests.aggregator.privacy import exact
from tests.aggregator.privacy.rounds import AGGREGATOR, HOUR_S, MODEL_RELEASE, SAMPLED, central, helped, secure, tossed
from tests.enrolments import broken_copy

DELTA = 1e-6


def open_rounds(count: int, sigma: float) -> list[OpenSum]:
    return [
        OpenSum(round=n, opened_s=float(n), closed_s=float(n), l2_sensitivity=0.5, central_sigma=sigma)
        for n in range(1, count + 1)
    ]


def peer(event: dp_accounting.DpEvent, rounds: int) -> rdp.RdpAccountant:
    accountant = rdp.RdpAccountant(list(INTEGER_ORDERS), dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(event, rounds)
    return accountant


@pytest.mark.parametrize(("z", "rounds"), [(1.0, 1), (8.0, 40), (33.7, 200)])
def test_gaussian_rounds_cost_what_dp_accounting_says(z: float, rounds: int) -> None:
    theirs = peer(dp_accounting.GaussianDpEvent(z), rounds).get_epsilon(DELTA)
    for events in (open_rounds(rounds, 0.5 * z), [central(n, 10.0 * z) for n in range(1, rounds + 1)]):
        ours = device_epsilon(events, delta=DELTA, adversary=MODEL_RELEASE)
        assert theirs <= ours <= theirs * (1 + 1e-9)


@pytest.mark.parametrize(("z", "p"), [(1.0, 0.1), (3.6, 0.1), (0.8, 0.01), (2.0, 0.7)])
def test_secret_coins_cost_what_dp_accounting_says(z: float, p: float) -> None:
    event = dp_accounting.PoissonSampledDpEvent(p, dp_accounting.GaussianDpEvent(z))
    theirs = peer(event, 50).get_epsilon(DELTA)
    for rounds in (open_rounds(50, 0.5 * z), [helped(n, 10.0 * z) for n in range(1, 51)]):
        events = [tossed(one, p) for one in rounds]
        ours = device_epsilon(events, delta=DELTA, adversary=SAMPLED)
        assert theirs * (1 - 1e-9) <= ours <= theirs * (1 + 1e-9)
        assert ours < device_epsilon(events, delta=DELTA, adversary=MODEL_RELEASE)


def test_the_exact_epsilon_of_gaussian_rounds_is_below_ours() -> None:
    truth = pld.PLDAccountant(value_discretization_interval=1e-3).compose(dp_accounting.GaussianDpEvent(33.7), 200)
    ours = device_epsilon(open_rounds(200, 0.5 * 33.7), delta=DELTA, adversary=MODEL_RELEASE)
    assert truth.get_epsilon(DELTA) < ours < 1.15 * truth.get_epsilon(DELTA)


@pytest.mark.parametrize(("shift", "variance"), [(1, 3.0), (4, 60.0), (3, 200.0)])
def test_the_exact_delta_of_a_skellam_round_is_within_what_is_stated(shift: int, variance: float) -> None:
    event = secure(l2_sensitivity=float(shift), dimension=1, shares=SkellamShares(variance / 20, 21))
    for delta in (1e-3, 1e-6):
        epsilon = device_epsilon([event], delta=delta, adversary=AGGREGATOR)
        reach = math.ceil(20 * math.sqrt(variance)) + 60
        assert exact.hockey_stick(lambda z: exact.skellam(z, variance), shift, epsilon, reach=reach) <= delta


def test_skellam_rounds_with_a_fine_grid_cost_what_gaussian_ones_do() -> None:
    shares = secure(l2_sensitivity=400.0, dimension=9000, shares=SkellamShares(160_000.0, 101))
    ours, gaussian = (
        round_rdp(event, MODEL_RELEASE) for event in (shares, central(sigma=4000.0, l2_sensitivity=400.0))
    )
    assert (gaussian < ours).all()
    assert (ours < 1.001 * gaussian).all()


def check_independent_noise_adds_nothing_that_is_not_proven(module: ModuleType) -> None:
    kinds: list[ReleasedSum] = [secure(), helped(1, 90.0), central(sigma=120.0)]
    alone = [module.device_epsilon([event], delta=DELTA, adversary=MODEL_RELEASE) for event in kinds]
    together = secure(helpers=helped(1, 90.0).helpers, central_sigma=120.0)
    assert module.device_epsilon([together], delta=DELTA, adversary=MODEL_RELEASE) == min(alone)


def test_of_several_kinds_of_noise_the_one_that_protects_best_decides() -> None:
    check_independent_noise_adds_nothing_that_is_not_proven(accounting)
    right = "np.min([np.full(len(INTEGER_ORDERS), np.inf), *(kind.rdp() for kind in kinds)], axis=0)"
    added_up = broken_copy(accounting.__name__, (right, "1 / np.sum([1 / kind.rdp() for kind in kinds], axis=0)"))
    with pytest.raises(AssertionError):
        check_independent_noise_adds_nothing_that_is_not_proven(added_up)


def check_shares_that_did_not_arrive_are_missed(module: ModuleType) -> None:
    costs = [
        module.device_epsilon([secure(shares=SkellamShares(100.0, arrived))], delta=DELTA, adversary=AGGREGATOR)
        for arrived in (101, 51, 2, 1, 0)
    ]
    assert costs == sorted(costs)
    assert costs[1] > 1.3 * costs[0]
    assert costs[3] == costs[4] == math.inf


def test_whoever_stays_away_brings_no_noise() -> None:
    check_shares_that_did_not_arrive_are_missed(accounting)
    planned = ("adversary.counted(event)", "CountedNoise(skellam_variance=101 * 100.0)")
    with pytest.raises(AssertionError):
        check_shares_that_did_not_arrive_are_missed(broken_copy(accounting.__name__, planned))


def check_amplification_only_where_it_is_proven(module: ModuleType) -> None:
    def epsilon(event: ReleasedSum, adversary: Adversary, limits: Limits | None = None) -> float:
        return float(module.device_epsilon([event], delta=DELTA, adversary=adversary, limits=limits))

    sampled = tossed(central(), 0.1)
    assert epsilon(sampled, MODEL_RELEASE) == epsilon(central(), MODEL_RELEASE)  # not by default
    assert epsilon(sampled, SAMPLED) < 0.5 * epsilon(sampled, MODEL_RELEASE)
    assert epsilon(tossed(helped(1, 80.0), 0.1), AGGREGATOR) == epsilon(helped(1, 80.0), AGGREGATOR)
    with pytest.raises(LocalMisuseError, match="were not secret"):
        epsilon(central(participation=Participation(0.1)), SAMPLED)
    with pytest.raises(LocalMisuseError, match="bring noise of their own"):
        epsilon(tossed(secure(), 0.1), SAMPLED)
    for limits in (Limits(3), Limits(None, HOUR_S)):
        with pytest.raises(LocalMisuseError, match="depend on earlier rounds"):
            epsilon(sampled, SAMPLED, limits)


def test_sampling_amplifies_only_where_that_is_proven() -> None:
    check_amplification_only_where_it_is_proven(accounting)


@pytest.mark.parametrize(
    "change",
    [
        ("if adversary.amplified else 1.0", "if event.participation.probability < 1 else 1.0"),
        ("if not event.participation.secret_coin:", "if False:"),
        ("if isinstance(event, SecureSum) and event.shares is not None:", "if False:"),
        ("if adversary.amplified and not limits.are_none:", "if False:"),
    ],
)
def test_amplifying_where_it_is_not_proven_is_caught(change: tuple[str, str]) -> None:
    check_amplification_only_where_it_is_proven(broken_copy(accounting.__name__))
    with pytest.raises((AssertionError, LocalMisuseError, pytest.fail.Exception)):
        check_amplification_only_where_it_is_proven(broken_copy(accounting.__name__, change))


def test_a_cap_costs_as_much_as_the_dearest_rounds_that_it_allows() -> None:
    events = [secure(n, shares=SkellamShares(100.0, 51 if n in (3, 7) else 101)) for n in range(1, 11)]
    capped = device_epsilon(events, delta=DELTA, adversary=AGGREGATOR, limits=Limits(3))
    dearest = device_epsilon([events[2], events[6], events[9]], delta=DELTA, adversary=AGGREGATOR)
    assert capped == dearest
    assert capped < device_epsilon(events, delta=DELTA, adversary=AGGREGATOR)


def test_rounds_add_up_and_nothing_costs_nothing() -> None:
    one = device_rdp([secure()], AGGREGATOR)
    np.testing.assert_allclose(device_rdp([secure(n) for n in range(1, 8)], AGGREGATOR), 7 * one)
    assert device_epsilon([], delta=DELTA, adversary=AGGREGATOR) == 0
    assert device_epsilon([], delta=DELTA, adversary=AGGREGATOR, limits=Limits(2, 5.0)) == 0


def test_a_cost_that_is_kept_cannot_be_changed_from_outside() -> None:
    with pytest.raises(ValueError, match="read-only"):
        round_rdp(secure(), AGGREGATOR)[0] = 0.0


def test_delta_out_of_range_is_refused() -> None:
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(LocalMisuseError, match="delta"):
            device_epsilon([], delta=delta, adversary=AGGREGATOR)
