"""Each accountant against divergences in 40 digits: one suite for all, and broken copies of each that it catches."""

from __future__ import annotations

import itertools
import math
import operator
from fractions import Fraction
from types import ModuleType
from typing import ClassVar

import dp_accounting
import mpmath
import numpy as np
import pytest
from dp_accounting import rdp

from aggregator.privacy import mechanisms
from aggregator.privacy.mechanisms import DiscreteGaussian, Gaussian, Mechanism, PoissonSampled, Skellam
from fl_protocol import integer_noise
from fl_protocol.errors import LocalMisuseError
from fl_protocol.renyi import INTEGER_ORDERS
from tests.aggregator.privacy import exact
from tests.enrolments import broken_copy

ORDERS = (2, 3, 5, 12, 30)
_PLACES = [INTEGER_ORDERS.index(order) for order in ORDERS]


class MechanismSuite:
    """What holds for every accountant. Cases are (shift of a coordinate, noise): variance for Skellam, else sigma."""

    cases: ClassVar[list[tuple[int, float]]] = []
    looseness: ClassVar[float] = 1e-6
    """How far above the truth it may be, relatively."""
    broken: ClassVar[list[tuple[str, str]]] = []

    def mechanism(self, module: ModuleType, shift: float, noise: float) -> Mechanism:
        raise NotImplementedError

    def truth(self, shift: int, noise: float, order: int) -> float:
        raise NotImplementedError

    def check_never_below_the_truth(self, module: ModuleType) -> None:
        for shift, noise in self.cases:
            stated = self.mechanism(module, shift, noise).rdp()[_PLACES]
            for order, cost in zip(ORDERS, stated, strict=True):
                truth = self.truth(shift, noise, order)
                assert truth <= cost * (1 + 1e-12), (shift, noise, order)

    def test_it_is_never_below_the_truth(self) -> None:
        self.check_never_below_the_truth(mechanisms)

    def test_it_is_not_far_above_the_truth(self) -> None:
        for shift, noise in self.cases:
            stated = self.mechanism(mechanisms, shift, noise).rdp()[_PLACES]
            for order, cost in zip(ORDERS, stated, strict=True):
                assert cost <= self.truth(shift, noise, order) * (1 + self.looseness), (shift, noise, order)

    def test_broken_copies_are_caught(self) -> None:
        self.check_never_below_the_truth(broken_copy(mechanisms.__name__))
        for change in self.broken:
            with pytest.raises(AssertionError):
                self.check_never_below_the_truth(broken_copy(mechanisms.__name__, change))

    def test_more_noise_costs_less_a_higher_order_more_and_none_everything(self) -> None:
        costs = [self.mechanism(mechanisms, 3, noise).rdp() for noise in (1.0, 2.0, 50.0, 1e6)]
        for more, less in itertools.pairwise(costs):
            assert (less < more).all()
        for cost in costs:
            assert (np.diff(cost) > 0).all()
            assert np.isfinite(cost).all()
        assert np.isinf(self.mechanism(mechanisms, 3, 0.0).rdp()).all()


class TestGaussian(MechanismSuite):
    cases: ClassVar = [(1, 0.5), (3, 2.0), (2, 40.0)]
    broken: ClassVar = [("_ROUNDING_UP / 2 / min", "_ROUNDING_UP / 3 / min")]

    def mechanism(self, module: ModuleType, shift: float, noise: float) -> Mechanism:
        return module.Gaussian(shift, noise)  # type: ignore[no-any-return]

    def truth(self, shift: int, noise: float, order: int) -> float:
        return order * shift**2 / (2 * noise**2)


class TestDiscreteGaussian(MechanismSuite):
    cases: ClassVar = [(1, 1.0), (2, 1.5), (1, 6.0), (5, 6.0)]
    looseness: ClassVar = 0.01
    broken: ClassVar = TestGaussian.broken

    def mechanism(self, module: ModuleType, shift: float, noise: float) -> Mechanism:
        return module.DiscreteGaussian(shift, noise)  # type: ignore[no-any-return]

    def truth(self, shift: int, noise: float, order: int) -> float:
        reach = math.ceil(order * shift + 15 * noise)
        return exact.renyi(lambda z: exact.discrete_gaussian(z, noise), shift, order, reach=reach)


class TestSkellam(MechanismSuite):
    cases: ClassVar = [(1, 0.5), (1, 4.0), (3, 4.0), (2, 30.0), (5, 30.0)]
    looseness: ClassVar = 12.0  # at variance 0.5 and order 30; wide noise has a test of its own
    broken: ClassVar = [
        ("_gaussian_rdp(math.sqrt(mu) / self", "_gaussian_rdp(math.sqrt(2 * mu) / self"),
        ("_gaussian_rdp(math.sqrt(mu) / self", "_gaussian_rdp(mu / self"),
    ]

    def mechanism(self, module: ModuleType, shift: float, noise: float) -> Mechanism:
        return module.Skellam(shift, shift, noise)  # type: ignore[no-any-return]

    def truth(self, shift: int, noise: float, order: int) -> float:
        reach = math.ceil(2 * order * shift + 15 * math.sqrt(noise) + 60)
        return exact.renyi(lambda z: exact.skellam(z, noise), shift, order, reach=reach)

    def check_it_is_the_theorem(self, module: ModuleType) -> None:
        """In fractions: (Δ2², Δ1, variance, order, bound), with either term of the minimum."""
        table = [
            (1, 1, 10, 2, Fraction(1, 10) + Fraction(9, 400)),
            (9, 3, 30, 5, Fraction(45, 60) + Fraction(99, 3600)),
            (4, 2, 1, 12, Fraction(24) + Fraction(3)),
        ]
        for l2_squared, l1, variance, order, bound in table:
            assert module.Skellam(math.sqrt(l2_squared), l1, variance).rdp([order]) == pytest.approx(float(bound), 1e-9)

    def test_it_is_the_theorem_with_an_excess_that_no_single_coordinate_was_seen_to_need(self) -> None:
        self.check_it_is_the_theorem(mechanisms)
        for shift, noise in self.cases:
            for order in ORDERS:
                assert self.truth(shift, noise, order) < TestGaussian().truth(shift, math.sqrt(noise), order)
        for change in [
            ("return gaussian + excess * _ROUNDING_UP", "return gaussian"),
            ("3 * l1 / (2 * mu))", "3 * l1 / (2 * mu * mu))"),
            ("+ 6 * l1) / (4 * mu * mu)", "+ 6 * l1) / (4 * mu ** 3)"),
        ]:
            with pytest.raises(AssertionError):
                self.check_it_is_the_theorem(broken_copy(mechanisms.__name__, change))

    def test_it_is_tight_where_noise_is_wide(self) -> None:
        for order in (2, 12):
            truth, stated = self.truth(2, 400.0, order), Skellam(2, 2, 400.0).rdp([order])[0]
            assert truth <= stated <= 1.01 * truth

    def test_its_cost_in_several_coordinates_is_their_sum(self) -> None:
        moved, variance = (3, -2, 0, 1), 9.0
        l2, l1 = math.sqrt(sum(m * m for m in moved)), sum(map(abs, moved))
        stated = Skellam(l2, l1, variance).rdp()[_PLACES]
        for order, cost in zip(ORDERS, stated, strict=True):
            assert sum(self.truth(abs(m), variance, order) for m in moved if m) <= cost

    def test_the_oracle_is_the_difference_of_two_poissons_with_this_variance(self) -> None:
        for variance in (0.5, 9.0):
            for z in (-7, 0, 3):
                assert float(exact.skellam(z, variance)) == pytest.approx(
                    float(exact.skellam_from_poissons(z, variance)), rel=1e-14
                )
            assert float(sum(z * z * exact.skellam(z, variance) for z in range(-60, 61))) == pytest.approx(variance)

    def test_orders_between_integers_are_refused(self) -> None:
        for order in (2.5, 1):
            with pytest.raises(LocalMisuseError, match="integers"):
                Skellam(1.0, 1.0, 4.0).rdp([order])  # type: ignore[list-item]


class SampledSuite(MechanismSuite):
    p: ClassVar[float] = 0.2
    broken: ClassVar = [
        ("sampled_gaussian_log_moments(self.probability,", "sampled_gaussian_log_moments(self.probability / 2,"),
        ("rdp: Vector = moments * _ROUNDING_UP / (np", "rdp: Vector = self.probability * moments / (np"),
    ]

    def test_it_costs_no_more_than_without_sampling(self) -> None:
        for shift, noise in self.cases:
            sampled = self.mechanism(mechanisms, shift, noise).rdp()
            assert (sampled <= Gaussian(shift, noise).rdp() * (1 + 1e-9)).all()

    def test_other_orders_are_refused(self) -> None:
        with pytest.raises(LocalMisuseError, match="INTEGER_ORDERS"):
            self.mechanism(mechanisms, 1, 1.0).rdp([2, 3])


class TestSampledDiscreteGaussian(SampledSuite):
    """The generic bound, both ways round: the second is what the proof in `PoissonSampled` is for."""

    cases: ClassVar = [(1, 1.0), (2, 1.5), (5, 6.0)]
    looseness: ClassVar = 0.1

    def mechanism(self, module: ModuleType, shift: float, noise: float) -> Mechanism:
        return module.PoissonSampled(module.DiscreteGaussian(shift, noise), self.p)  # type: ignore[no-any-return]

    def truth(self, shift: int, noise: float, order: int) -> float:
        reach = math.ceil(order * shift + 15 * noise)
        return exact.renyi(lambda z: exact.discrete_gaussian(z, noise), shift, order, reach=reach, p=self.p)


class TestSampledGaussian(SampledSuite):
    cases: ClassVar = [(1, 1.0), (3, 6.0), (1, 20.0)]

    def mechanism(self, module: ModuleType, shift: float, noise: float) -> Mechanism:
        return module.PoissonSampled(module.Gaussian(shift, noise), self.p)  # type: ignore[no-any-return]

    def truth(self, shift: int, noise: float, order: int) -> float:
        event = dp_accounting.PoissonSampledDpEvent(self.p, dp_accounting.GaussianDpEvent(noise / shift))
        accountant = rdp.RdpAccountant([order])
        accountant.compose(event)
        return float(accountant._rdp[0]) * (1 - 1e-9)

    def test_with_probability_one_it_is_the_mechanism(self) -> None:
        for kind in (Gaussian(1.0, 2.0), DiscreteGaussian(1.0, 2.0)):
            assert (PoissonSampled(kind, 1.0).rdp() == kind.rdp()).all()


def table_weights(variance: float) -> list[int]:
    """Of a share's sampler, in 2^-63; of all but one draw in 2^63."""
    return np.diff(integer_noise._cumulative_weights("skellam", variance).astype(object), prepend=0).tolist()


def skellam_half(variance: float, last: int) -> list[mpmath.mpf]:
    """Exact probabilities of 0 to beyond `last`: by ratios of Bessel functions from far out, where errors shrink."""
    ratio, ratios = mpmath.mpf(0), []
    for k in range(last + 400, 0, -1):
        ratio = 1 / (2 * k / mpmath.mpf(variance) + ratio)
        ratios.append(ratio)
    half = list(itertools.accumulate(ratios[::-1], operator.mul, initial=mpmath.mpf(1)))
    total = 2 * mpmath.fsum(half) - 1
    return [one / total for one in half]


@pytest.mark.parametrize("variance", [4.0, 1000.0, 60_267.0])
def test_a_shares_sampler_is_as_close_to_skellam_noise_as_the_documentation_says(variance: float) -> None:
    weights = table_weights(variance)
    last = len(weights) // 2
    with mpmath.workdps(25):
        exact_half = skellam_half(variance, last)
        drawn = [mpmath.mpf(weights[last + z]) / 2**63 for z in range(last + 1)]
        gaps = [abs(one - weight) for one, weight in zip(exact_half, drawn, strict=False)]
        distance = (2 * mpmath.fsum(gaps) - gaps[0] + 2 * mpmath.fsum(exact_half[last + 1 :])) / 2
    assert 0 < distance <= 1e-16


def test_the_sum_of_sixteen_shares_is_as_close_to_skellam_noise_as_the_documentation_says() -> None:
    shares, variance = 16, 20.0
    weights = table_weights(variance)
    # All weights in one large number, far enough apart: its power holds the weights of the sum, exactly.
    apart_bytes = 8 * shares + 8
    packed = int.from_bytes(b"".join(weight.to_bytes(apart_bytes, "little") for weight in weights), "little")
    length = shares * (len(weights) - 1) + 1
    raw = (packed**shares).to_bytes(length * apart_bytes, "little")
    sums = [int.from_bytes(raw[start : start + apart_bytes], "little") for start in range(0, len(raw), apart_bytes)]
    reach = math.floor(9.5 * math.sqrt(shares * variance))
    with mpmath.workdps(30):
        exact_half = skellam_half(shares * variance, reach)
        off = [mpmath.mpf(sums[length // 2 + z]) / sum(sums) / exact_half[z] - 1 for z in range(reach + 1)]
    assert max(map(abs, off)) <= 1.9e-10
