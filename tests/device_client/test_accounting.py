"""The ledger's accounting against dp-accounting's, and between integer orders against high-precision integrals.

dp-accounting 0.4.3 is exact at fractional orders; 0.6.0 gives an upper bound there that is above the true cost (and
above what it says at higher orders). So it is the oracle at integer orders, and mpmath everywhere else.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import dp_accounting
import mpmath
import numpy as np
import pytest
from dp_accounting import pld, rdp
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client.accounting import noise_multiplier_for, poisson_gaussian_rdp
from fl_protocol.errors import LocalMisuseError
from fl_protocol.renyi import ORDERS, epsilon_by_order, filter_order_index, rdp_to_epsilon

ADD_OR_REMOVE = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
REPLACE = dp_accounting.NeighboringRelation.REPLACE_ONE
INTEGER = [order == math.floor(order) for order in ORDERS]
GRID = list(itertools.product((0.01, 0.1, 0.5, 1.0), (0.6, 1.0, 2.0, 5.0, 20.0), (1, 30, 1000), (1e-3, 1e-5, 1e-7)))


@functools.cache
def peer(q: float, z: float, steps: int) -> rdp.RdpAccountant:
    event = dp_accounting.GaussianDpEvent(z)
    sampled = event if q == 1 else dp_accounting.PoissonSampledDpEvent(q, event)
    accountant = rdp.RdpAccountant([order for order in ORDERS if order == math.floor(order)], ADD_OR_REMOVE)
    accountant.compose(sampled, steps)
    return accountant


def exact_rdp(order: float, q: float, z: float) -> float:
    """The integral of Mironov, Talwar, Zhang (section 3.3) to 20 digits, piecewise between its two bumps."""
    with mpmath.workdps(20):
        q_, order_, twice_variance = mpmath.mpf(q), mpmath.mpf(order), 2 * mpmath.mpf(z) ** 2
        others, height = 1 - q_, 1 / mpmath.sqrt(mpmath.pi * twice_variance)

        def density(x: mpmath.mpf) -> mpmath.mpf:
            ratio = others + q_ * mpmath.exp((2 * x - 1) / twice_variance)
            return height * mpmath.exp(-x * x / twice_variance) * ratio**order_

        cuts = sorted({-12 * z, -4 * z, 0.0, 4 * z, order / 2, order - 4 * z, order, order + 4 * z, order + 12 * z})
        return float(mpmath.log(mpmath.quad(density, cuts)) / (order - 1))


def exact_integer_rdp(order: int, q: float, z: float) -> float:
    """The binomial sum of the same section to 60 digits."""
    with mpmath.workdps(60):
        q_, z_ = mpmath.mpf(q), mpmath.mpf(z)
        terms = (
            mpmath.binomial(order, k) * (1 - q_) ** (order - k) * q_**k * mpmath.exp((k * k - k) / (2 * z_**2))
            for k in range(order + 1)
        )
        return float(mpmath.log(mpmath.fsum(terms)) / (order - 1))


def ours(q: float, z: float, steps: int) -> np.ndarray:
    return poisson_gaussian_rdp(sampling_rate=q, noise_multiplier=z, steps=steps)


@pytest.mark.parametrize(("q", "z"), sorted({(q, z) for q, z, _, _ in GRID}))
def test_each_order_costs_no_less_than_dp_accounting_says_and_integer_orders_cost_the_same(q: float, z: float) -> None:
    mine, theirs = ours(q, z, 1), np.array(peer(q, z, 1)._rdp)
    np.testing.assert_allclose(mine[INTEGER], theirs, rtol=1e-9)
    assert (mine[INTEGER] >= theirs).all()
    between = [ORDERS.index(order) for order in (1.25, 1.75, 2.5, 5.5, 10.5)]  # an integral takes a while
    truth = np.array([exact_rdp(ORDERS[index], q, z) for index in between])
    assert (mine[between] >= truth * (1 - 1e-12)).all()
    np.testing.assert_allclose(mine[between], truth, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("q", "z", "steps", "delta"), GRID)
def test_epsilon_is_never_below_dp_accounting_and_at_most_a_millionth_above(
    q: float, z: float, steps: int, delta: float
) -> None:
    by_order = epsilon_by_order(ours(q, z, steps), delta)
    mine, theirs = by_order[INTEGER].min(), peer(q, z, steps).get_epsilon(delta)
    assert mine >= theirs
    assert mine <= (1 + 1e-6) * theirs
    assert rdp_to_epsilon(ours(q, z, steps), delta) == by_order.min()


def check_no_integer_order_is_charged_below_its_exact_cost(
    step: Callable[[float, float], np.ndarray], q: float, z: float
) -> None:
    mine = step(q, z)
    for index in (ORDERS.index(float(order)) for order in (2, 3, 10, 64, 1024)):
        truth = exact_integer_rdp(round(ORDERS[index]), q, z)
        assert truth <= mine[index] <= truth * (1 + 2e-10)


@pytest.mark.parametrize("q", [1e-6, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("z", [0.3, 1.0, 30.0, 1000.0])
def test_integer_orders_are_exact_even_where_next_to_nothing_is_spent(q: float, z: float) -> None:
    # dp-accounting loses digits there: at q = 1e-4, z = 300 it is 5e-7 above the sum at some orders, 2e-4 below at
    # others.
    check_no_integer_order_is_charged_below_its_exact_cost(lambda q, z: ours(q, z, 1), q, z)


def test_an_accounting_that_is_not_rounded_up_or_loses_digits_is_caught() -> None:
    def peers(q: float, z: float) -> np.ndarray:
        costs = np.zeros(len(ORDERS))
        costs[INTEGER] = peer(q, z, 1)._rdp
        return costs

    def rounded_down(q: float, z: float) -> np.ndarray:
        return ours(q, z, 1) / (1 + 2e-10)

    for broken in (peers, rounded_down):
        with pytest.raises(AssertionError):
            check_no_integer_order_is_charged_below_its_exact_cost(broken, 0.001, 30.0)


@pytest.mark.parametrize("z", [1e-99, 1e99, 1e150, 1.7e308])
@pytest.mark.parametrize("q", [5e-324, 0.5, 1 - 2**-53, 1.0])
@pytest.mark.filterwarnings("error")
def test_no_noise_that_a_manifest_may_name_leaves_float64(q: float, z: float) -> None:
    assert (ours(q, z, 1) >= 0).all()


def test_a_cost_that_is_kept_cannot_be_changed_from_outside() -> None:
    first = ours(0.3, 1.0, 1)
    first += 1.0
    assert (ours(0.3, 1.0, 1) < first).all()


def test_the_neighbouring_relation_is_add_or_remove_one_record() -> None:
    # One Gaussian, z = 1, delta = 1e-5. Replacing a record moves the sum by twice the clip. dp-accounting's RDP ignores
    # that for REPLACE_ONE; its PLD doubles the sensitivity from some version on (0.6.0 does, 0.4.3 does not).
    def peer_epsilon(accountant: dp_accounting.PrivacyAccountant) -> float:
        return float(accountant.compose(dp_accounting.GaussianDpEvent(1.0)).get_epsilon(1e-5))

    for relation in (ADD_OR_REMOVE, REPLACE):
        assert peer_epsilon(rdp.RdpAccountant(list(ORDERS), relation)) == pytest.approx(4.7289, abs=1e-3)
    assert peer_epsilon(pld.PLDAccountant(ADD_OR_REMOVE, 1e-3)) == pytest.approx(4.3772, abs=1e-3)
    replaced_by_peer = peer_epsilon(pld.PLDAccountant(REPLACE, 1e-3))
    assert any(replaced_by_peer == pytest.approx(known, abs=1e-3) for known in (4.3772, 9.997))
    replaced = privacy_loss_distribution.from_gaussian_mechanism(1.0, sensitivity=2)
    assert replaced.get_epsilon_for_delta(1e-5) == pytest.approx(9.997, abs=1e-3)
    assert rdp_to_epsilon(ours(1.0, 1.0, 1), 1e-5) == pytest.approx(4.7289, abs=1e-3)
    # What the ledger would have to charge if records were replaced: half the noise relative to the sensitivity.
    assert rdp_to_epsilon(ours(1.0, 0.5, 1), 1e-5) > 9.997


def test_the_exact_epsilon_of_a_sampled_study_is_below_ours() -> None:
    event = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.5))
    exact = pld.PLDAccountant(ADD_OR_REMOVE, 1e-3).compose(event, 100).get_epsilon(1e-5)
    assert exact < rdp_to_epsilon(ours(0.1, 1.5, 100), 1e-5) < 1.3 * exact


@given(
    q=st.floats(1e-4, 1.0),
    z=st.floats(0.3, 50.0),
    parts=st.lists(st.integers(0, 500), min_size=1, max_size=5),
)
@settings(max_examples=50, deadline=None)
def test_cost_adds_up_and_grows_with_steps_and_shrinks_with_noise(q: float, z: float, parts: list[int]) -> None:
    total = sum(ours(q, z, part) for part in parts)
    np.testing.assert_allclose(total, ours(q, z, sum(parts)), rtol=1e-12)
    assert (ours(q, z, 2) > ours(q, z, 1)).all()
    assert (ours(q, 1.5 * z, 1) <= ours(q, z, 1) * (1 + 1e-12)).all()


@given(
    epsilon=st.floats(0.2, 20.0),
    delta=st.sampled_from([1e-3, 1e-5, 1e-8]),
    q=st.sampled_from([0.02, 0.3, 1.0]),
    steps=st.integers(1, 300),
)
@settings(max_examples=40, deadline=None)
def test_noise_multiplier_for_is_the_smallest_that_fits(epsilon: float, delta: float, q: float, steps: int) -> None:
    z = noise_multiplier_for(epsilon=epsilon, delta=delta, sampling_rate=q, steps=steps)
    index = filter_order_index(epsilon=epsilon, delta=delta, cost=ours(q, z, 1))
    assert epsilon_by_order(ours(q, z, steps), delta)[index] <= epsilon * (1 + 1e-12)
    assert rdp_to_epsilon(ours(q, z, steps), delta) <= epsilon
    less = round(z - 1e-4, 4)
    assert less == 0 or rdp_to_epsilon(ours(q, less, steps), delta) > epsilon


@pytest.mark.parametrize(("q", "steps"), [(1.0, 60), (0.3, 100), (0.02, 300)])
@pytest.mark.parametrize("epsilon", [0.5, 3.0, 12.0])
def test_the_noise_of_a_plan_keeps_the_exact_epsilon_within_the_budget(epsilon: float, q: float, steps: int) -> None:
    z = noise_multiplier_for(epsilon=epsilon, delta=1e-5, sampling_rate=q, steps=steps)
    event = dp_accounting.GaussianDpEvent(z)
    sampled = event if q == 1 else dp_accounting.PoissonSampledDpEvent(q, event)
    exact = pld.PLDAccountant(ADD_OR_REMOVE, 1e-3).compose(sampled, steps).get_epsilon(1e-5)
    assert exact <= epsilon


def test_an_impossible_budget_says_so() -> None:
    with pytest.raises(LocalMisuseError, match="no noise multiplier"):
        noise_multiplier_for(epsilon=1e-9, delta=1e-9, sampling_rate=1.0, steps=100_000)


@pytest.mark.parametrize("q", [0.001, 0.3, 0.999])
@pytest.mark.parametrize("z", [0.04, 0.05, 0.1, 300.0])
def test_at_the_edges_of_the_quadrature_no_order_is_undercharged(q: float, z: float) -> None:
    mine, theirs = ours(q, z, 1), np.array(peer(q, z, 1)._rdp)
    assert (mine[INTEGER] >= theirs * (1 - 1e-6) - 1e-13).all()
    for index in (ORDERS.index(order) for order in (1.25, 2.5, 10.5)):
        assert mine[index] >= exact_rdp(ORDERS[index], q, z) * (1 - 1e-9) - 1e-13
    assert (np.diff(mine) >= -1e-12).all()  # RDP grows with the order


@pytest.mark.parametrize("z", [0.0, 5e-324, 1e-200, 1e-101])
@pytest.mark.parametrize("q", [0.5, 1.0])
def test_next_to_no_noise_costs_everything(z: float, q: float) -> None:
    assert np.isinf(ours(q, z, 1)).all()
    assert not ours(q, z, 0).any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.1},
        {"sampling_rate": math.nan},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"steps": -1},
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, float]) -> None:
    with pytest.raises(LocalMisuseError, match=next(iter(arguments))):
        poisson_gaussian_rdp(**{"sampling_rate": 0.5, "noise_multiplier": 1.0, "steps": 1, **arguments})  # type: ignore[arg-type]


def test_nothing_spent_is_epsilon_zero() -> None:
    assert rdp_to_epsilon(ours(1.0, 1.0, 0), 1e-5) == 0.0
