"""Until the time that a daemon says it is quiet until, its turns neither send nor store anything."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from device_client.daemon import DeviceDaemon
from device_client.device import Device
from tests.virtual_fleet import VirtualFleet, task_config


class Taken:
    """How often a device that had said to be quiet took a turn, and did something in it."""

    def __init__(self) -> None:
        self.turns, self.broke_silence = 0, list[float]()


def traces_of(fleet: VirtualFleet, name: str) -> tuple[object, ...]:
    """What a device can leave: files, the counter, what its broker has, and what it told its journal."""
    flash, counter = fleet.flashes[name]
    journal = fleet.journals[name]
    return flash.image(), counter.image(), dict(fleet.broker.retained), len(fleet.broker.published), len(journal.events)


def asked_early(fleet: VirtualFleet, name: str, taken: Taken) -> None:
    """Let a device take turns at its present moment, and just before it is not quiet any more."""
    device, now_s = fleet.devices[name], fleet.clock.time_s
    quiet_s = device.daemon.quiet_until_s()
    if quiet_s <= now_s:
        return
    for at_s in (now_s, min(quiet_s - 1e-3, now_s + 0.4)):
        fleet.clock.time_s = max(now_s, at_s)
        before = traces_of(fleet, name)
        device.step()
        taken.turns += 1
        if traces_of(fleet, name) != before:
            taken.broke_silence.append(at_s)
    fleet.clock.time_s = now_s + 0.4


def lived(folder: Path) -> Taken:
    """A study of two rounds, in which devices are asked for turns whenever they are quiet."""
    fleet, taken = VirtualFleet(folder, devices=2, task=task_config(rounds=2)), Taken()

    def is_over() -> bool:
        for name in fleet.devices:
            # Only when nothing is under way: a message that is there ends the quiet.
            if not fleet.transports or not any(one.has_events for one in fleet.transports.values()):
                asked_early(fleet, name, taken)
        return fleet.state.phase.name == "FINISHED"

    fleet.run(until=is_over)
    return taken


def test_turns_before_that_time_do_nothing(tmp_path: Path) -> None:
    taken = lived(tmp_path)
    assert taken.turns > 10
    assert taken.broke_silence == []


def test_a_daemon_that_claims_to_be_quiet_for_ever_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceDaemon, "quiet_until_s", lambda self: math.inf)
    assert lived(tmp_path).broke_silence


def a_quiet_device(fleet: VirtualFleet) -> Device:
    """A device that has done all that it can do now."""
    fleet.run()
    for _ in fleet.steps(20):
        pass
    return fleet.devices["watch-0"]


def test_a_device_without_a_grant_looks_again_soon(tmp_path: Path) -> None:
    fleet = VirtualFleet(tmp_path, devices=1, task=task_config(rounds=1, goal=1, minimum_cohort=1))
    device = a_quiet_device(fleet)
    with_grant_s = device.daemon.quiet_until_s()
    device.withdraw(next(iter(device.config.studies)).study)
    device.step()
    assert device.daemon.quiet_until_s() < with_grant_s
    assert device.daemon.quiet_until_s() <= fleet.clock.time_s + 60
