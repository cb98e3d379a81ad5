"""The status in words and as data: complete, and readable whatever the numbers are."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from device_client.config import EligibilityConfig
from device_client.eligibility import Conditions
from device_client.status import Measured, Status, status_text
from device_client.training import Evaluation
from firmware_sim.virtual_device import SteadyBoard
from tests.device_client.one_device import OneDevice


def read_back(status: Status) -> Status:
    """As a program reads it from the socket."""
    return msgspec.json.decode(msgspec.json.encode(status), type=Status)


def test_a_device_at_work_is_told_line_by_line() -> None:
    one = OneDevice()
    device = one.start()
    one.scripts["watch"].open_round()
    one.until("update_sent")
    status = device.status()
    assert read_back(status) == status
    lines = status_text(status)
    assert lines[0] == "may train: yes"
    assert lines[1].startswith("clinic/watch: not in round 1: ")
    assert "  as watch-7, connected, 1 update(s) waiting for a receipt" in lines
    assert any(line.startswith("  global model of round 1: ") for line in lines)
    assert f"  epsilon spent on it: {status.spent_epsilon:.4f}" in lines
    assert f"privacy: epsilon {status.spent_epsilon:.4f} of 10 at delta 1e-05 in this period" in lines
    assert lines[-1].startswith("records default: 40, ")


def test_why_it_does_not_train_is_said_in_words() -> None:
    one = OneDevice(
        board=SteadyBoard(Conditions(battery_percent=10.0, charging=False, temperature_celsius=70.0)),
        eligibility=EligibilityConfig(require_idle=False, require_unmetered=False, require_charging=True),
    )
    device = one.start()
    one.scripts["watch"].open_round()
    one.steps(5)
    lines = status_text(device.status())
    assert lines[0] == "may train: no"
    reasons = [line.strip() for line in lines if line.startswith("  ")][:3]
    assert any("10" in reason and "30" in reason for reason in reasons)
    assert any("charg" in reason for reason in reasons)
    assert any("70" in reason and "45" in reason for reason in reasons)
    doing = next(line for line in lines if line.startswith("clinic/watch: "))
    assert doing.startswith("clinic/watch: waiting to train for round 1: ")


def test_a_refused_manifest_is_told_with_its_reason() -> None:
    one = OneDevice(privacy={"minimum_noise_multiplier": 8.0, "minimum_cohort": 5, "maximum_l2_norm_clip": 0.5})
    device = one.start()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"plan": {"noise_multiplier": 1.0, "l2_norm_clip": 0.1}, "minimum_cohort": 9}, "noise_multiplier 1 is below"),
        ({"plan": {"noise_multiplier": 9.0, "l2_norm_clip": 0.1}}, "minimum_cohort 2 is below"),
        ({"plan": {"noise_multiplier": 9.0}, "minimum_cohort": 9}, "l2_norm_clip 1 is above"),
    ]
    for number, (changes, reason) in enumerate(cases, start=1):
        one.scripts["watch"].open_round(number, goal=9, **changes)
        one.steps(4)
        (study,) = device.status().studies
        assert f"round {number}: {reason} the wearer's" in study.refused
        assert any(line.startswith("  refused: ") for line in status_text(device.status()))
    assert not device.ledger.reservations


def test_numbers_without_bound_are_told_and_read_back() -> None:
    one = OneDevice(privacy={"epsilon": math.inf})
    device = one.start()
    one.scripts["watch"].open_round(plan={"noise_multiplier": 0.0})
    one.until("update_sent")
    one.runner().measured = {"global": Evaluation(math.inf, 0, 3)}
    status = device.status()
    assert read_back(status) == status
    assert (status.spent_epsilon, status.budget_epsilon) == (None, None)
    assert status.studies[0].measured == (Measured("global", 1, 0, 3, None),)
    text = "\n".join(status_text(status))
    assert "privacy: epsilon without bound of no limit" in text
    assert "mean loss without bound" in text


def test_a_device_that_does_not_run_says_so() -> None:
    device = OneDevice().start()
    assert device.status().studies[0].doing == "the daemon does not run"
    assert not OneDevice().start(grant=False).status().studies[0].running
