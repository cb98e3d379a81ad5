"""Crashes are told, a device that sleeps is a record only, and turns that are skipped change nothing."""

from __future__ import annotations

import gc
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest

from device_client.device import Device
from device_client.training import Trainer
from firmware_sim.fidelity import LONGEST_TURN_S, EmptyTrainer, EmptyTraining
from firmware_sim.fleet.engines import InProcess
from firmware_sim.fleet.living import Living
from firmware_sim.fleet.maker import DeviceMaker, Stopwatch
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.fleet.run import EVENTS
from firmware_sim.fleet.shard import MOST_CRASHES
from firmware_sim.fleet.simulation import SCENARIO, replayed
from firmware_sim.fleet.windows import FleetEvent
from firmware_sim.fleet_events import read_events
from firmware_sim.profiles.catalogue import load_profile
from tests.firmware_sim.fleet.fleets import HARDWARE, folder_of, prepared
from tests.firmware_sim.fleet.small_fleets import BASE, ran

VICTIM = "device-0000003"


class FailingTraining(EmptyTraining):
    """Raises in its second step."""

    def advance(self) -> None:
        if self.step == 1:
            raise ZeroDivisionError("in the second step")
        super().advance()


class FailingTrainer(EmptyTrainer):
    """`device_client.training.Trainer` with a fault."""

    def __call__(self, *arguments: Any, **named: Any) -> EmptyTraining:
        training = super().__call__(*arguments, **named)
        return FailingTraining(len(training.change()), training.steps, lambda: LONGEST_TURN_S, done=training.step)


class FailingMaker(DeviceMaker):
    """One device's trainer has the fault."""

    def _trainer(self, stopwatch: Stopwatch, record: DeviceRecord, *rest: Any) -> Trainer:
        if record.name == VICTIM:
            return FailingTrainer(1.0, stopwatch.computed)
        return super()._trainer(stopwatch, record, *rest)


THREE_STEPS = {**BASE["task"], "rounds": 3, "plan": {**BASE["task"]["plan"], "local_steps": 3}}


def test_a_job_ends_as_soon_as_it_has_heard_that_there_is_nothing_to_do(tmp_path: Path) -> None:
    task = {**BASE["task"], "participation": {"probability": 0.0001}}
    left = ran(tmp_path, days=1.0, task=task, population={"profiles": {"phone_fast": 1}, "job_period_hours": 2.0})
    lives = sum(record.lives for record in left.run.records)
    awake_mwh = sum(record.energy.base_mwh for record in left.run.records)
    profile = load_profile("phone_fast").processor
    start_mwh = profile.start_cpu_s * profile.flop_per_s * profile.joule_per_flop / 3.6
    assert lives >= 8
    # Waiting 5 s for another round would take five times what a second does.
    assert awake_mwh < lives * (start_mwh + profile.awake_mw / 3600)


def test_a_device_that_crashes_is_told_restarted_and_replayed_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firmware_sim.fleet.build.DeviceMaker", FailingMaker)
    left = ran(tmp_path, task=THREE_STEPS)
    crashes = left.of("crash")
    assert {event.device for event in crashes} == {VICTIM}
    assert 1 <= len(crashes) <= MOST_CRASHES
    assert crashes[0].detail.startswith("ZeroDivisionError: in the second step\nTraceback")
    assert "advance" in crashes[0].detail
    assert left.count("round_committed") == 3
    delivered = {event.device for event in left.of("update_delivered")}
    assert VICTIM not in delivered
    assert len(delivered) == 7
    by_name = {record.name: record for record in left.run.records}
    assert by_name[VICTIM].crashes == len(crashes)
    assert by_name[VICTIM].lives > 1  # it was started again
    again = [event for event in replayed(tmp_path / "scenario.toml", seed=1, device=VICTIM) if event.event == "crash"]
    assert [event.time_s for event in again] == [event.time_s for event in crashes]
    assert [event.detail.splitlines()[0] for event in again] == [event.detail.splitlines()[0] for event in crashes]


class WatchedMaker(DeviceMaker):
    """Notes every device that is made, but keeps none."""

    def start(self, record: Any, *arguments: Any, **named: Any) -> Any:
        living, enrolled = super().start(record, *arguments, **named)
        _made.append((record.name, weakref.ref(living.device)))
        return living, enrolled


_made: list[tuple[str, weakref.ref[Device]]] = []


def test_of_a_sleeping_device_there_is_a_record_and_nothing_else_and_it_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firmware_sim.fleet.build.DeviceMaker", WatchedMaker)
    _made.clear()
    folder = folder_of(tmp_path / "run", HARDWARE)
    run = prepared(folder, InProcess(folder / SCENARIO))
    awake: list[int] = []
    run.told = lambda progress: awake.append(progress.awake)
    steps = run.steps()
    for _ in itertools.islice(steps, 900):
        pass
    gc.collect()
    alive = [name for name, device in _made if device() is not None]
    assert len(_made) > 20
    assert len(alive) == awake[-1] < 16
    for _ in steps:
        pass
    charged = [event for event in read_events(folder / EVENTS) if event.event == "charged"]
    pairs = [(event.device, event.round) for event in charged]
    assert len(set(pairs)) == len(pairs) > 6  # nobody takes part twice, although all were restarted again and again
    took_part = {event.device for event in charged}
    assert {record.name for record in run.records if record.spent_epsilon > 0} == took_part
    twice = [name for name in took_part if sum(event.device == name for event in charged) > 1]
    spent = {record.name: record.spent_epsilon for record in run.records}
    once = [spent[name] for name in took_part if name not in twice]
    assert all(spent[name] > max(once) for name in twice)


def participation(folder: Path) -> list[FleetEvent]:
    """What devices did, to the second."""
    kinds = {"charged", "update_delivered", "killed", "round_committed"}
    return [one._replace(time_s=round(one.time_s)) for one in read_events(folder / EVENTS) if one.event in kinds]


def test_skipping_turns_that_find_nothing_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skips, takes_all = folder_of(tmp_path / "skips", HARDWARE), folder_of(tmp_path / "all", HARDWARE)
    first = prepared(skips, InProcess(skips / SCENARIO))
    assert first.run()
    quiet_until_s = Living._quiet_until_s
    monkeypatch.setattr(Living, "_quiet_until_s", lambda self, now_s: min(now_s + 15.0, quiet_until_s(self, now_s)))
    second = prepared(takes_all, InProcess(takes_all / SCENARIO))
    assert second.run()
    assert second.totals.turns > 1.5 * first.totals.turns
    assert participation(takes_all) == participation(skips)


def test_sleeping_through_a_change_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skips, sleeps = folder_of(tmp_path / "skips", HARDWARE), folder_of(tmp_path / "sleeps", HARDWARE)
    assert prepared(skips, InProcess(skips / SCENARIO)).run()
    monkeypatch.setattr(Living, "_quiet_until_s", lambda self, now_s: now_s + 3600.0)
    assert prepared(sleeps, InProcess(sleeps / SCENARIO)).run()
    assert participation(sleeps) != participation(skips)
