"""Settings of a run: refused in one sentence, stored and read back, and enough noise for the rounds but no more."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from device_client.errors import BudgetSpentError
from device_client.ledger import Budget, PrivacyLedger
from firmware_sim.errors import SettingsError
from firmware_sim.settings import DemoSettings, Engine, named_helpers
from firmware_sim.watch_data import PEOPLE
from tests.device_client.ledger_ports import MemoryCounter
from tests.device_client.ports import MemoryStore


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"held_out": ()}, "held-out people: expected some but not all of 1 to 10, got ()"),
        ({"held_out": PEOPLE}, "held-out people: expected some but not all"),
        ({"held_out": (9, 11)}, "held-out people: .* got .9, 11."),
        ({"held_out": (0,)}, "held-out people"),
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"rounds": -1}, "rounds: expected at least 1, got -1"),
        ({"epsilon": 0.0}, "epsilon: expected a finite number above 0, got 0.0"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon: .* got inf"),
        ({"epsilon": math.nan}, "epsilon: .* got nan"),
        ({"helpers": 0}, "helpers: expected 1 to 8, got 0"),
        ({"helpers": 9}, "helpers: expected 1 to 8, got 9"),
    ],
)
def test_settings_that_make_no_run_are_refused_in_one_sentence(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint) as caught:
        DemoSettings(**changes)
    assert "\n" not in str(caught.value)


def test_a_budget_that_no_noise_can_keep_is_refused_in_one_sentence() -> None:
    with pytest.raises(SettingsError, match="epsilon 1e-09 is too small for 60 rounds"):
        DemoSettings(epsilon=1e-9).plan()


def test_wrists_either_train_or_measure() -> None:
    settings = DemoSettings(held_out=(3, 7))
    training, measuring = settings.training_wrists, settings.held_out_wrists
    assert len(training) == 16
    assert {wrist.person for wrist in measuring} == {3, 7}
    assert {wrist.person for wrist in training} == set(PEOPLE) - {3, 7}


@pytest.mark.parametrize(
    ("rounds", "epsilon", "delta"), [(1, 3.0, 1e-5), (4, 3.0, 1e-5), (25, 1.0, 1e-6), (60, 3.0, 1e-5)]
)
def test_the_noise_admits_exactly_the_rounds_and_not_one_more(rounds: int, epsilon: float, delta: float) -> None:
    settings = DemoSettings(rounds=rounds, epsilon=epsilon, delta=delta)
    ledger = PrivacyLedger(MemoryStore(), MemoryCounter(), Budget(epsilon, delta))
    plan = settings.plan().message()
    for number in range(1, rounds + 1):
        ledger.reserve(task="task", round_number=number, plan=plan, now_s=float(number))
    assert ledger.spent_epsilon <= epsilon
    with pytest.raises(BudgetSpentError):
        ledger.reserve(task="task", round_number=rounds + 1, plan=plan, now_s=0.0)


@pytest.mark.parametrize("rounds", [1, 4, 60])
def test_a_little_less_noise_would_not_last(rounds: int) -> None:
    settings = DemoSettings(rounds=rounds)
    less = msgspec.structs.replace(settings.plan(), noise_multiplier=settings.noise_multiplier - 2e-4).message()
    ledger = PrivacyLedger(MemoryStore(), MemoryCounter(), Budget(3.0, 1e-5))
    for number in range(1, rounds):
        ledger.reserve(task="task", round_number=number, plan=less, now_s=0.0)
    with pytest.raises(BudgetSpentError):
        ledger.reserve(task="task", round_number=rounds, plan=less, now_s=0.0)


def test_without_a_budget_there_is_no_noise_and_no_end() -> None:
    settings = DemoSettings(epsilon=None)
    assert settings.noise_multiplier == 0.0
    ledger = PrivacyLedger(MemoryStore(), MemoryCounter(), Budget(math.inf, settings.delta))
    for number in range(1, 200):
        ledger.reserve(task="task", round_number=number, plan=settings.plan().message(), now_s=0.0)
    assert ledger.spent_epsilon == math.inf


@pytest.mark.parametrize(("rounds", "given", "expected"), [(60, None, 30), (5, None, 2), (1, None, 1), (60, 7, 7)])
def test_the_second_half_of_the_versions_is_averaged_unless_told(rounds: int, given: int | None, expected: int) -> None:
    assert DemoSettings(rounds=rounds, average_last=given).server().average_last == expected


def test_settings_survive_being_stored() -> None:
    settings = DemoSettings(held_out=(1, 2), epsilon=None, rounds=7, average_last=3, engine="open", helpers=3)
    assert msgspec.json.decode(msgspec.json.encode(settings), type=DemoSettings) == settings


# The engine.


@pytest.mark.parametrize("helpers", range(1, 9))
def test_each_helper_has_a_name_and_an_operator_of_its_own(helpers: int) -> None:
    operators = DemoSettings(helpers=helpers).operators
    assert len(operators) == len(set(operators.values())) == helpers
    assert list(operators.items())[:2] == [("helper-a", "patients"), ("helper-b", "hospital-b")][:helpers]


def test_with_the_engine_open_there_are_no_helpers_and_nothing_is_masked() -> None:
    settings = DemoSettings(engine="open")
    assert (settings.operators, settings.secure(378)) == ({}, None)


@pytest.mark.parametrize(("engine", "cohort"), [("secure", 2), ("open", 1)])
def test_a_masked_sum_is_never_of_one_update(engine: Engine, cohort: int) -> None:
    settings = DemoSettings(held_out=PEOPLE[1:], engine=engine)
    assert (len(settings.training_wrists), settings.minimum_cohort) == (2, cohort)


def test_helpers_are_named_in_words() -> None:
    assert named_helpers({"a": "x"}) == "a (x)"
    assert named_helpers({"a": "x", "b": "y"}) == "a (x) and b (y)"
    assert named_helpers({"a": "x", "b": "y", "c": "z"}) == "a (x), b (y) and c (z)"


@pytest.mark.parametrize("settings", [DemoSettings(), DemoSettings(rounds=1), DemoSettings(epsilon=None)])
def test_masking_clips_no_update_of_the_demo(settings: DemoSettings) -> None:
    """The worst update: all gradients as long as the clip and in one direction, with noise along with them.

    Each of the 600 norms of noise is above its bound with a chance of 4e-6, so that another seed would fail once in 400
    times at most.
    """
    length, generator = 378, np.random.default_rng(7)
    secure = settings.secure(length)
    assert secure is not None
    scale = settings.learning_rate / settings.expected_batch_size * settings.l2_norm_clip
    noise = scale * settings.noise_multiplier * generator.normal(size=(200, length))
    gradients = np.zeros(length)
    gradients[0] = scale * 119  # windows of the wrist that has most
    longest = np.linalg.norm(noise + gradients, axis=1).max()
    assert longest < secure.l2_norm_clip
    assert secure.l2_norm_clip < 8 * np.linalg.norm(noise[0] + gradients)  # a clip far too long would cost bits
    assert secure.noise_multiplier == 0  # the claim is each wrist's own, at record level
