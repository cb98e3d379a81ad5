"""Which noise counts against whom; each rule is broken once and noticed."""

from __future__ import annotations

import math
from types import ModuleType

import pytest

from aggregator.privacy import adversaries
from aggregator.privacy.accounting import device_epsilon
from aggregator.privacy.adversaries import Adversary, CountedNoise
from aggregator.privacy.events import HelperNoise, OpenSum, Participation, SecureSum, SkellamShares
from fl_protocol.errors import LocalMisuseError
from tests.aggregator.privacy.rounds import AGGREGATOR, MODEL_RELEASE, central, helped, secure
from tests.enrolments import broken_copy


def open_round(sigma: float) -> OpenSum:
    return OpenSum(round=1, opened_s=0.0, closed_s=1.0, l2_sensitivity=0.5, central_sigma=sigma)


def check_what_the_aggregator_does_not_know(module: ModuleType) -> None:
    def counted(event: SecureSum | OpenSum, **about: object) -> CountedNoise:
        return module.Adversary(name="aggregator", **about).counted(event)  # type: ignore[no-any-return]

    # Its own noise is known to it.
    assert counted(central()).discrete_sigma == 0
    assert counted(open_round(3.0)).gaussian_sigma == 0
    # Of helpers one is honest, and nobody knows that it is not the one with the least noise, or with none.
    assert counted(helped(1, 30.0, 20.0, 50.0)).discrete_sigma == 20
    assert counted(helped(1, 30.0, 0.0, 50.0)).discrete_sigma == 0
    assert counted(helped(1, 30.0, 20.0, 50.0), honest_helpers=2).discrete_sigma == 30
    assert counted(helped(1, 30.0, 20.0, 50.0), honest_helpers=0).discrete_sigma == 0
    assert counted(helped(1, 30.0, 20.0), honest_helpers=frozenset({"helper-0"})).discrete_sigma == 30
    assert counted(helped(1, 30.0, 20.0), honest_helpers=frozenset({"somebody"})).discrete_sigma == 0
    # Shares: of those that arrived, not the device's own, and not those of colluders.
    assert counted(secure()).skellam_variance == 100 * 100.0
    assert counted(secure(shares=SkellamShares(100.0, 41))).skellam_variance == 40 * 100.0
    assert counted(secure(), colluding_devices=30).skellam_variance == 70 * 100.0
    assert counted(secure(), colluding_share=0.25).skellam_variance == (101 - 1 - 26) * 100.0
    assert counted(secure(), colluding_share=0.25, colluding_devices=40).skellam_variance == 60 * 100.0
    assert counted(secure(shares=SkellamShares(100.0, 3)), colluding_devices=5).skellam_variance == 0
    assert counted(secure(shares=SkellamShares(100.0, 1))).skellam_variance == 0
    with pytest.raises(LocalMisuseError, match="no coin is secret"):
        module.Adversary(name="aggregator", amplified=True)


def test_only_what_the_aggregator_does_not_know_counts_against_it() -> None:
    check_what_the_aggregator_does_not_know(adversaries)


@pytest.mark.parametrize(
    "change",
    [
        ("event.central_sigma if sees_models_only else 0.0", "event.central_sigma"),
        ("sorted(helper.sigma for helper in helpers)[", "sorted((helper.sigma for helper in helpers), reverse=True)["),
        ("[: self.honest_helpers]", ""),
        ("if helper.helper in self.honest_helpers]", "]"),
        ("arrived - 1 - colluding", "arrived - colluding"),
        ("arrived - 1 - colluding", "arrived - 1"),
        ("math.ceil(self.colluding_share", "math.floor(self.colluding_share"),
        ("max(self.colluding_devices,", "min(self.colluding_devices,"),
        ("max(honest, default=0.0)", "math.hypot(*honest)"),
        ("return max(0, arrived", "return max(2, arrived"),
        ('self.name != "model_release":\n            raise', "False:\n            raise"),
    ],
)
def test_counting_what_the_aggregator_knows_is_caught(change: tuple[str, str]) -> None:
    check_what_the_aggregator_does_not_know(broken_copy(adversaries.__name__))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_what_the_aggregator_does_not_know(broken_copy(adversaries.__name__, change))


def test_against_those_who_see_models_all_noise_counts() -> None:
    assert MODEL_RELEASE.counted(central(sigma=80.0)).discrete_sigma == 80
    assert MODEL_RELEASE.counted(open_round(3.0)) == CountedNoise(gaussian_sigma=3.0)
    assert MODEL_RELEASE.counted(helped(1, 30.0, 0.0)).discrete_sigma == 30
    assert MODEL_RELEASE.counted(helped(1, 30.0, central_sigma=40.0)).discrete_sigma == 40
    assert MODEL_RELEASE.counted(secure()).skellam_variance == 100 * 100.0


def test_noise_that_the_aggregator_knows_leaves_no_bound() -> None:
    for event in (central(), open_round(3.0), helped(1, 30.0, 0.0), secure(shares=SkellamShares(100.0, 1))):
        assert device_epsilon([event], delta=1e-6, adversary=AGGREGATOR) == math.inf
    for event in (central(), open_round(3.0), helped(1, 30.0, 0.0)):
        assert device_epsilon([event], delta=1e-6, adversary=MODEL_RELEASE) < math.inf


@pytest.mark.parametrize(
    ("about", "word"),
    [
        ({"name": "broker"}, "broker"),
        ({"name": "aggregator", "colluding_devices": -1}, "colluding_devices"),
        ({"name": "aggregator", "colluding_share": 1.0}, "colluding_share"),
        ({"name": "aggregator", "colluding_share": math.nan}, "colluding_share"),
        ({"name": "aggregator", "honest_helpers": -1}, "honest_helpers"),
    ],
)
def test_an_adversary_that_makes_no_sense_is_refused(about: dict[str, object], word: str) -> None:
    with pytest.raises(LocalMisuseError, match=word):
        Adversary(**about)  # type: ignore[arg-type]


def test_events_that_cannot_have_happened_are_refused() -> None:
    for wrong, word in [
        ({"l2_sensitivity": 0.0}, "l2_sensitivity"),
        ({"l2_sensitivity": math.inf}, "l2_sensitivity"),
        ({"dimension": 0}, "dimension"),
        ({"central_sigma": -1.0}, "central_sigma"),
        ({"opened_s": 1e9}, "opened_s"),
        ({"closed_s": math.nan}, "closed_s"),
        ({"helpers": (HelperNoise("a", 1.0), HelperNoise("a", 2.0))}, "once"),
    ]:
        with pytest.raises(LocalMisuseError, match=word):
            secure(**wrong)  # type: ignore[arg-type]
    with pytest.raises(LocalMisuseError, match="central_sigma"):
        open_round(-1.0)
    with pytest.raises(LocalMisuseError, match="helper-1"):
        HelperNoise("helper-1", math.nan)
    for shares in ((-1.0, 3), (math.inf, 3), (1.0, -1)):
        with pytest.raises(LocalMisuseError, match="expected"):
            SkellamShares(*shares)
    for p in (0.0, 1.1, math.nan):
        with pytest.raises(LocalMisuseError, match="probability"):
            Participation(p)


def test_the_l1_norm_of_an_integer_vector_is_bounded_by_both_of_its_l2_bounds() -> None:
    assert secure(l2_sensitivity=3.0, dimension=10_000).l1_sensitivity == 9
    assert secure(l2_sensitivity=300.0, dimension=100).l1_sensitivity == 3000
