"""Each case runs, with the rule that it is listed under, and who is said to attack does."""

from __future__ import annotations

from typing import Any

import msgspec

from benchmarks.attackers_alone import CASES, run_case, table
from firmware_sim.attackers.parsing import parse_attackers
from firmware_sim.attackers.plan import AttackPlan
from firmware_sim.fleet.build import device_name
from firmware_sim.scenario.loading import SHIPPED


def small() -> dict[str, Any]:
    """Twelve devices, two rounds."""
    task = msgspec.toml.decode((SHIPPED / "poisoners.toml").read_bytes())["task"]
    return {"devices": 12, "task": task | {"rounds": 2, "goal": 12, "minimum_cohort": 6}, "held_out_windows": 100}


def test_one_attacker_has_as_many_devices_as_its_case_says() -> None:
    hostile = {}
    for case, tables in CASES.items():
        plan = AttackPlan(parse_attackers(tables), seed=1)
        hostile[case] = sum(bool(plan.attacks_of(index, device_name(index))) for index in range(50))
    assert list(hostile.values()) == [0, 1, 1, 1, 10, 20]


def test_the_same_case_by_the_mean_and_by_the_rule() -> None:
    by_mean, by_rule = (run_case("nobody attacks", robust=robust, seed=1, changes=small()) for robust in (False, True))
    assert (by_mean.rule, by_rule.rule) == ("mean", "median")
    assert by_mean.accuracy != by_rule.accuracy
    assert by_mean.backdoor_success is not None
    assert "nobody attacks" in table([by_mean, by_rule])
