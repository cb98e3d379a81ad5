"""Whole studies of masked updates: real devices, aggregator and helpers on a virtual broker, in virtual time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.device_budget import TaskBudget
from aggregator.overview import overview
from aggregator.privacy.accounting import device_epsilon
from aggregator.privacy.adversaries import Adversary
from aggregator.rounds import Phase
from aggregator.secure_sections import AdaptiveClipping, DevicePrivacy, Secure
from aggregator.task_file import Participation, Server, StatisticsPlan, TaskConfig
from firmware_sim.faults.packets import PacketRates
from tests.aggregator.desk import built_with
from tests.enrolments import broken_copy
from tests.virtual_fleet import AGGREGATOR, TASK, TENANT, VirtualFleet, task_config

HELPERS = ("helper-a", "helper-b")


def secure_task(**changes: Any) -> TaskConfig:
    """A task of masked updates."""
    section = Secure(**{"l2_norm_clip": 8.0, **changes.pop("secure", {})})
    return task_config(**{"engine": "secure", "secure": section, **changes})


def secure_fleet(folder: Path, *, devices: int = 3, faults: PacketRates | None = None, **changes: Any) -> VirtualFleet:
    """Devices that accept two helpers of two operators."""
    fleet = VirtualFleet(folder, devices=0, task=secure_task(**changes), helpers=HELPERS, faults=faults)
    for index in range(devices):
        fleet.start_device(f"watch-{index}", minimum_helpers=2, minimum_operators=2)
    return fleet


def test_a_study_of_masked_updates_makes_the_model_that_an_open_one_makes(tmp_path: Path) -> None:
    for name in ("secure", "open"):
        (tmp_path / name).mkdir()
    fleet = secure_fleet(tmp_path / "secure")
    fleet.run()
    plain = VirtualFleet(tmp_path / "open", devices=3)
    plain.run()
    # The same devices with the same randomness for their own noise, but for what rounding and masks drew.
    assert fleet.state.committed == plain.state.committed == 3
    first, other = fleet.params(1) - fleet.params(0), plain.params(1) - plain.params(0)
    step = 2.0**-6
    assert np.linalg.norm(first - other) < step * np.sqrt(len(first))
    assert np.linalg.norm(other) > 20 * step


BUDGET = DevicePrivacy(epsilon=6.0, delta=1e-5)
NOISY = {"noise_multiplier": 2.0}


def spent(fleet: VirtualFleet, name: str = "aggregator") -> float:
    """What the rounds so far have cost a device, by the account that halts the task."""
    budget = TaskBudget(fleet.store, fleet.task, update_length=len(fleet.params(0)))
    return budget.epsilon(name, delta=1e-5)


def runs_beyond_its_budget(folder: Path) -> bool:
    """Whether a task whose budget is for a few rounds goes on beyond it."""
    fleet = secure_fleet(folder, rounds=40, secure=NOISY, device_privacy=BUDGET)
    fleet.run(until=lambda: fleet.state.phase is Phase.PAUSED or fleet.state.committed > 8)
    if fleet.state.phase is Phase.PAUSED:
        assert "device-level budget is spent" in fleet.state.reason
        assert 1 <= fleet.state.committed < 8
    return spent(fleet) > BUDGET.epsilon


def test_a_task_halts_at_its_device_level_budget(tmp_path: Path) -> None:
    assert not runs_beyond_its_budget(tmp_path)


def test_an_aggregator_that_does_not_listen_to_it_is_caught(tmp_path: Path) -> None:
    copy = broken_copy("aggregator.task_runner", ("            if why:\n", "            if False:\n"))
    with built_with(TaskRunner=copy.TaskRunner):
        assert runs_beyond_its_budget(tmp_path)


def test_an_aggregator_that_notes_no_sum_is_caught(tmp_path: Path) -> None:
    copy = broken_copy("aggregator.store.rounds", ("asked_s=asked_s))", "asked_s=None))"))
    fleet = secure_fleet(tmp_path, rounds=2, secure=NOISY, device_privacy=BUDGET)
    store = fleet.aggregator.store
    store.rounds = copy.Rounds(store.database)
    fleet.run()
    assert spent(fleet) == 0.0  # and with that no budget is ever spent
    assert fleet.state.committed == 2


def test_a_resumed_task_is_halted_again_for_the_same_reason(tmp_path: Path) -> None:
    fleet = secure_fleet(tmp_path, rounds=40, secure=NOISY, device_privacy=BUDGET)
    fleet.run(until=lambda: fleet.state.phase is Phase.PAUSED)
    before = fleet.state
    fleet.store.tasks.ask(TASK, "resume", now_s=fleet.clock.now_s())
    fleet.run(until=lambda: not fleet.store.tasks.pending_orders())
    assert (fleet.state.phase, fleet.state.number) == (Phase.PAUSED, before.number)
    assert "device-level budget is spent" in fleet.state.reason


def test_who_sees_models_only_learns_no_more_than_the_aggregator(tmp_path: Path) -> None:
    fleet = secure_fleet(tmp_path, rounds=2, secure={**NOISY, "noise_from": "aggregator"})
    fleet.run()
    assert spent(fleet) == float("inf")  # who added the noise does not count it
    budget = TaskBudget(fleet.store, fleet.task, update_length=len(fleet.params(0)))
    models = Adversary(name="model_release")
    assert spent(fleet, "model_release") == device_epsilon(budget.events(), delta=1e-5, adversary=models)
    assert 1.0 < spent(fleet, "model_release") < 10.0


def test_a_device_counts_its_participations(tmp_path: Path) -> None:
    fleet = secure_fleet(
        tmp_path, devices=4, rounds=4, goal=4, round_duration_s=20.0, participation=Participation(most_participations=2)
    )
    fleet.run(until=lambda: fleet.state.number >= 4, most_s=300.0)
    assert [len(device.ledger.reservations) for device in fleet.devices.values()] == [2, 2, 2, 2]
    assert fleet.state.committed == 2


def test_statistics_go_through_the_same_sum(tmp_path: Path) -> None:
    feature = {"name": "x", "statistic": "moments", "channel": 0, "low": -2.0, "high": 2.0}
    plan = StatisticsPlan(noise_multiplier=4.0, features=[feature])
    found = {}
    for engine in ("secure", "open"):
        (tmp_path / engine).mkdir()
        changes: dict[str, Any] = {"plan": plan, "rounds": 1, "server": Server()}
        if engine == "secure":
            fleet = secure_fleet(tmp_path / engine, secure={"l2_norm_clip": 4000.0}, **changes)
        else:
            fleet = VirtualFleet(tmp_path / engine, devices=3, task=task_config(**changes))
        fleet.run()
        (record,) = [one for one in fleet.store.rounds.history(TASK) if one.outcome == "committed"]
        found[engine] = record.metrics["result"]
    # The devices' own noise is the same in both; what is left is rounding, by at most a step of one record a device.
    records = {engine: result["records"]["value"] for engine, result in found.items()}
    assert records["open"] > 90.0
    assert records["secure"] == pytest.approx(records["open"], abs=3.0)
    assert found["secure"].keys() == found["open"].keys()


def test_a_round_is_committed_as_soon_as_its_helpers_have_answered(tmp_path: Path) -> None:
    fleet = secure_fleet(tmp_path)
    told = fleet.journals[AGGREGATOR]
    for _ in fleet.steps(100):
        if told.named("round_unmasking"):
            break
        fleet.clock.time_s += 0.5
    assert told.named("round_unmasking")
    assert not told.named("round_committed")
    for _ in fleet.steps(2):  # no time passes
        pass
    assert told.named("round_committed")


def test_the_clip_follows_the_updates_norms(tmp_path: Path) -> None:
    fleet = secure_fleet(
        tmp_path, rounds=6, secure={"l2_norm_clip": 64.0, "adaptive_clipping": AdaptiveClipping(learning_rate=1.0)}
    )
    fleet.run()
    history = [one.metrics for one in fleet.store.rounds.history(TASK) if one.outcome == "committed"]
    assert [one["share_within_clip"] for one in history[:3]] == [
        1.0,
        1.0,
        1.0,
    ]  # all are far shorter, and without noise
    clips = [one["l2_norm_clip"] for one in history]
    assert clips == pytest.approx([64.0 * np.exp(-0.5 * index) for index in range(6)])
    assert all(one["next_l2_norm_clip"] == after for one, after in zip(history, clips[1:], strict=False))


def test_the_clip_is_kept_through_a_kill(tmp_path: Path) -> None:
    fleet = secure_fleet(
        tmp_path, rounds=3, secure={"l2_norm_clip": 64.0, "adaptive_clipping": AdaptiveClipping(learning_rate=1.0)}
    )
    fleet.run(until=lambda: fleet.state.committed == 1)
    fleet.kill_aggregator()
    fleet.start_aggregator()
    fleet.run()
    clips = [one.metrics["l2_norm_clip"] for one in fleet.store.rounds.history(TASK) if one.outcome == "committed"]
    assert clips == pytest.approx([64.0, 64.0 * np.exp(-0.5), 64.0 * np.exp(-1.0)])


def test_a_round_that_waits_for_its_helpers_is_told_in_the_status(tmp_path: Path) -> None:
    fleet = secure_fleet(tmp_path, secure={"helpers": ("helper-z",)}, rounds=1)

    def degraded() -> str:
        return " ".join(overview(fleet.store, tenant=TENANT, now_s=fleet.clock.now_s()).degraded)

    fleet.run(until=lambda: fleet.state.phase is Phase.OPEN and "keys of its helpers" in degraded())
    waiting = fleet.journals[AGGREGATOR].named("waiting_for_helpers")
    assert [one["reason"] for one in waiting] == ["the aggregator's configuration does not name helper helper-z"]
    assert f"round 1 of {TASK} cannot begin" in degraded()
    assert fleet.state.phase is Phase.OPEN  # nor is it given up, for no device can see it


def test_a_round_is_accounted_again_before_it_is_asked_for(tmp_path: Path) -> None:
    """Rounds are far enough apart for no device to be in both, unless the second takes much longer than planned."""
    fleet = secure_fleet(
        tmp_path,
        rounds=40,
        minimum_cohort=3,
        secure=NOISY,
        device_privacy=DevicePrivacy(epsilon=spent_on_one(tmp_path) * 1.2, delta=1e-5),
        participation=Participation(minimum_separation_s=600.0),
    )
    fleet.run(until=lambda: fleet.state.committed == 1 and fleet.state.phase is Phase.OPEN)
    for _ in fleet.steps(20):  # its manifest is published
        pass
    budget = TaskBudget(fleet.store, fleet.task, update_length=len(fleet.params(0)))
    now_s, number = fleet.clock.now_s(), fleet.state.number
    assert budget.why_not_another(number + 1, opens_s=now_s) == ""
    assert budget.why_not_ask(number, asked_s=now_s + 60.0, arrived=3) == ""
    assert "device-level budget is spent" in budget.why_not_ask(number, asked_s=now_s + 1000.0, arrived=3)


def check_no_sum_is_asked_for_beyond_the_budget(folder: Path) -> None:
    """The budget shrinks while a round is open."""
    fleet = secure_fleet(folder, rounds=40, secure=NOISY, device_privacy=BUDGET)
    fleet.run(until=lambda: fleet.state.phase is Phase.OPEN)
    assert fleet.aggregator.coordinator is not None
    budget = fleet.aggregator.coordinator.tasks[TASK]._budget
    budget._budget = replace(budget._budget, epsilon=0.01)  # type: ignore[type-var]
    fleet.run(until=lambda: fleet.state.phase is Phase.PAUSED)
    assert "device-level budget is spent" in fleet.state.reason
    *committed, given_up = fleet.store.rounds.history(TASK)
    assert given_up.outcome == "aborted"
    assert given_up.arrived == 3
    asked = len(committed)
    assert all(helper.store.answers.counts() == {TENANT: asked} for helper in fleet.helpers.values())
    assert [one.round for one in budget.events()] == [one.number for one in committed]


def test_a_sum_that_the_budget_has_no_room_for_is_not_asked_for(tmp_path: Path) -> None:
    check_no_sum_is_asked_for_beyond_the_budget(tmp_path)


def test_an_aggregator_that_asks_for_it_all_the_same_is_caught(tmp_path: Path) -> None:
    copy = broken_copy(
        "aggregator.task_runner",
        ("                    event = CombineFailed(why) if why else event\n", '                    why = ""\n'),
    )
    with built_with(TaskRunner=copy.TaskRunner), pytest.raises(AssertionError):
        check_no_sum_is_asked_for_beyond_the_budget(tmp_path)


def spent_on_one(folder: Path) -> float:
    """What one such round costs."""
    (folder / "one").mkdir()
    one = secure_fleet(folder / "one", rounds=1, minimum_cohort=3, secure=NOISY)
    one.run()
    return spent(one)
