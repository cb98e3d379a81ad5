"""``covey-aggregator privacy plan``: a table, JSON, a picture, and errors in one sentence."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from aggregator.privacy.accounting import device_epsilon
from aggregator.privacy.composition import Limits
from aggregator.privacy.events import SecureSum, SkellamShares
from fl_protocol.secagg.fixed_point import FixedPoint
from tests.aggregator.operator_desk import Operator, one_sentence, operator
from tests.aggregator.privacy.rounds import AGGREGATOR

__all__ = ["operator"]

PLAN = ("privacy", "plan", "--epsilon", "2", "--delta", "1e-6", "--devices", "5000", "--rounds", "200")
CAPPED = (*PLAN, "--participation-cap", "20")


def test_a_plan_needs_no_configuration_and_says_what_it_costs(operator: Operator) -> None:
    shown = operator.says(*CAPPED)
    for words in ("200 rounds among 5000 devices, 8711 parameters", "the aggregator", "20; on average 20", "10.66"):
        assert words in shown
    for words in (
        "Skellam variance",
        "grid step",
        "modulus, bits",
        "bytes up",
        "L2 error of the mean",
        "signal to noise",
    ):
        assert words in shown


def test_the_figures_of_a_plan_are_within_the_budget_when_they_are_accounted(operator: Operator) -> None:
    found = operator.json(*CAPPED)
    plan, request = found["plan"], found["request"]
    assert request["cohort"] == 500  # a tenth
    norm = FixedPoint(8711, 1.0, plan["step"], 1).norm_bound
    events = [
        SecureSum(
            round=number,
            opened_s=number,
            closed_s=number,
            l2_sensitivity=norm,
            dimension=8711,
            shares=SkellamShares(plan["device_variance"], 500),
        )
        for number in range(1, 201)
    ]
    epsilon = device_epsilon(events, delta=1e-6, adversary=AGGREGATOR, limits=Limits(20))
    assert epsilon == pytest.approx(plan["epsilon"], rel=1e-9)
    assert 1.998 < epsilon <= 2


@pytest.mark.parametrize(
    ("options", "more"),
    [
        (("--colluding", "0.3"), True),
        (("--minimum-separation-rounds", "5"), True),
        (("--cohort", "250"), True),
        (("--parameters", "378"), False),
        (("--adversary", "model_release"), True),
    ],
)
def test_what_is_asked_for_makes_a_difference(operator: Operator, options: tuple[str, ...], more: bool) -> None:
    def error(*arguments: str) -> Any:
        return operator.json(*arguments)["plan"]["relative_error"]

    if options[0] == "--minimum-separation-rounds":
        assert error(*PLAN) > error(*PLAN, *options) > error(*CAPPED)
    elif options[0] == "--adversary":
        assert error(*PLAN, *options) < error(*PLAN)
        assert error(*PLAN, *options, "--secret-coins") < 0.2 * error(*PLAN)
        assert "released models, not the aggregator; coins are secret" in operator.says(
            *PLAN, *options, "--secret-coins"
        )
    else:
        assert (error(*CAPPED, *options) > error(*CAPPED)) == more


def test_a_clip_of_another_size_scales_everything(operator: Operator) -> None:
    one, half = (operator.json(*CAPPED, "--l2-norm-clip", clip)["plan"] for clip in ("1", "0.5"))
    assert half["step"] == one["step"] / 2
    assert half["noise_norm"] == pytest.approx(one["noise_norm"] / 2)
    assert half["relative_error"] == pytest.approx(one["relative_error"])


def test_a_plan_is_drawn(operator: Operator) -> None:
    operator.says(*CAPPED, "--plot", "./plan.svg")
    drawn = (operator.folder / "plan.svg").read_text()
    ET.fromstring(drawn)  # noqa: S314 - our own picture
    for words in ("Spent with noise multiplier 10.7", "budget 2", "500 updates: 2", "noise as long as the clip"):
        assert words in drawn
    operator.says(*CAPPED, "--plot", "./again.svg")
    assert (operator.folder / "again.svg").read_text() == drawn
    operator.says(*CAPPED, "--plot", "./plan.png")
    assert (operator.folder / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_planned_is_one_sentence(operator: Operator) -> None:
    for options, words in [
        (("--epsilon", "0"), "epsilon: expected a number above 0"),
        (("--cohort", "6000"), "at most 5000 of 5000 devices"),
        (("--participation-cap", "3"), "takes part in at most 3"),
        (("--colluding", "1"), "colluding_share"),
        (("--secret-coins",), "no coin is secret"),
        (("--plot", "./plan.pdf"), ".svg or .png"),
    ]:
        one_sentence(operator.run(*PLAN, *options), 2, words)
    capped = ("--adversary", "model_release", "--secret-coins", "--participation-cap", "20")
    one_sentence(operator.run(*PLAN, *capped), 2, "depend on earlier rounds")
    assert operator.run(*PLAN, "--adversary", "broker")[0] == 2


def test_a_picture_that_cannot_be_written_or_drawn_is_one_sentence(operator: Operator) -> None:
    one_sentence(operator.run(*CAPPED, "--plot", "./nowhere/plan.svg"), 2, "--plot", "cannot be written")
    operator.patch.setitem(sys.modules, "matplotlib", None)  # what importing a missing module sees
    one_sentence(operator.run(*CAPPED, "--plot", "./plan.svg"), 1, "pip install 'covey[fleet]'")
    assert "10.66" in operator.says(*CAPPED)
