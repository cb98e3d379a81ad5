"""``covey-aggregator privacy plan``: a table, JSON, a picture, and errors in one sentence."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from contextlib import closing
from typing import Any

import pytest

from aggregator.assembly import AggregatorFiles
from aggregator.device_budget import in_order
from aggregator.in_force import config_of
from aggregator.privacy.accounting import device_epsilon
from aggregator.privacy.composition import Limits
from aggregator.privacy.events import SecureSum, SkellamShares
from aggregator.secure_terms import terms_of
from aggregator.store.updates import NewUpdate
from fl_protocol.bundle import open_bundle
from fl_protocol.messages import encode
from fl_protocol.secagg.fixed_point import FixedPoint
from fl_protocol.signing import public_key_from_hex
from tests.aggregator.operator_desk import PUBLISHER, TRAINING, Operator, one_sentence, operator
from tests.aggregator.privacy.rounds import AGGREGATOR
from tests.fl_protocol.examples import round_key, secure_manifest, secure_terms

__all__ = ["operator"]

KEY = public_key_from_hex(PUBLISHER)

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


SECURE = TRAINING.replace('engine = "open"', "").replace('name = "watch"', 'name = "masked"') + (
    "\n[secure]\nl2_norm_clip = 2.0\nnoise_multiplier = 3.0\n\n[device_privacy]\nepsilon = 6.0\ndelta = 1e-5\n"
)


def add_a_sum(operator: Operator, number: int, *, arrived: int) -> None:
    """A round whose helpers were asked, as the coordinator leaves it in the database."""
    with closing(AggregatorFiles.load(operator.config).open_store(create=False)) as store:
        config = config_of(store.tasks.get("masked").spec, "masked")
        assert config.secure is not None
        length = len(open_bundle((operator.folder / "model.covey").read_bytes(), publisher=KEY).shared_params)
        terms = terms_of(config, config.secure, length, helpers=secure_terms().helpers)
        manifest = secure_manifest(secure=terms, round=number, num_parameters=length, goal=3, minimum_cohort=2)
        key = round_key("x25519")
        with store.database.transaction() as connection:
            store.rounds.open(
                connection,
                "masked",
                number,
                opened_s=1e6 + number,
                deadline_s=1e6 + number + 60,
                key=key,
                sums_secret=bytes(32),
                version=0,
                model_digest=bytes(32),
                update_length=length,
                probability=1.0,
            )
            store.rounds.set_manifest(connection, "masked", number, encode(manifest))
            store.rounds.ask(connection, "masked", number, opened_s=1e6 + number, asked_s=1e6 + number + 10)
            store.updates.add(
                connection,
                [
                    NewUpdate("masked", bytes([number, index]) * 8, number, number, f"w-{index}", bytes(32), 1e6, 100)
                    for index in range(arrived)
                ],
            )


def test_what_was_spent_is_told_against_whom(operator: Operator) -> None:
    operator.write("masked.toml", SECURE)
    operator.says("init", "CONFIG")
    operator.says("task", "create", "./masked.toml", "CONFIG")
    operator.says("task", "create", "./watch.toml", "CONFIG")
    assert operator.json("privacy", "spent", "masked", "CONFIG")["epsilon"] == {"aggregator": 0.0, "model_release": 0.0}
    add_a_sum(operator, 1, arrived=3)
    one = operator.json("privacy", "spent", "masked", "CONFIG")
    assert (one["rounds"], one["delta"]) == (1, 1e-5)
    assert 0.5 < one["epsilon"]["aggregator"] == one["epsilon"]["model_release"] < 6.0
    add_a_sum(operator, 2, arrived=2)  # whose noise is less, since fewer came
    two = operator.json("privacy", "spent", "masked", "CONFIG")
    assert two["epsilon"]["aggregator"] > one["epsilon"]["aggregator"] * 1.4
    assert operator.json("privacy", "spent", "masked", "CONFIG", "--delta", "1e-3")["epsilon"]["aggregator"] < 6.0
    said = operator.says("privacy", "spent", "masked", "CONFIG")
    for words in ("Device-level epsilon of masked", "the aggregator, which sees the sums", "6 at delta 1e-05"):
        assert words in said
    assert "nothing is claimed at device level" in operator.says("privacy", "spent", "watch", "CONFIG")
    one_sentence(operator.run("privacy", "spent", "nowhere", "CONFIG"), 3, "there is no task nowhere")


def test_a_device_level_budget_without_noise_is_refused(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    operator.write("masked.toml", SECURE.replace("noise_multiplier = 3.0\n\n[device", "\n[device"))
    one_sentence(operator.run("task", "create", "./masked.toml", "CONFIG"), 2, "noise_multiplier above 0")


def test_rounds_whose_clock_was_wrong_are_accounted_as_if_nothing_held_a_device_back() -> None:
    def one(number: int, opened_s: float, closed_s: float) -> SecureSum:
        return SecureSum(
            round=number,
            opened_s=opened_s,
            closed_s=closed_s,
            l2_sensitivity=10.0,
            dimension=5,
            shares=SkellamShares(400.0, 10),
        )

    limits = Limits(minimum_separation_s=3600.0)
    apart = [one(1, 0.0, 60.0), one(2, 1800.0, 1860.0)]
    wrong = [one(1, 9_000_000.0, 9_000_060.0), one(2, 1800.0, 1860.0)]  # the first under a clock that was ahead
    spent = [
        device_epsilon(in_order(events), delta=1e-5, adversary=AGGREGATOR, limits=limits) for events in (apart, wrong)
    ]
    both = device_epsilon(apart, delta=1e-5, adversary=AGGREGATOR)
    assert spent[0] < spent[1] == both
