"""All kinds of faults, a firmware gone bad and attackers in one run: it comes to its end, and to the same end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from firmware_sim.faults.kinds import KINDS, BrokerRestart
from firmware_sim.fleet.engines import InProcess
from firmware_sim.fleet.run import EVENTS
from firmware_sim.fleet.simulation import SCENARIO
from firmware_sim.fleet_events import read_events
from firmware_sim.scenario.loading import SHIPPED, load_scenario
from tests.firmware_sim.fleet.fleets import Outcome, folder_of, simulated

TEXT = (SHIPPED / "everything-at-once.toml").read_text()
TOLD = {
    "crash": "killed",
    "hang": "hang",
    "reboot_loop": "reboot_loop",
    "corrupted_flash": "corrupted_flash",
    "broker_restart": "broker_down",
    "aggregator_kill": "aggregator_killed",
}
"""Kinds of faults that have an event of their own."""
SILENT = ("clock_skew", "enrolment_storm", "packets", "partition", "slow_loris", "time_zone_herd")
"""Those that show in other events only: that something comes later, or not at all."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("everything") / "run", TEXT)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Outcome:
    return simulated(folder)


def test_no_kind_of_fault_is_left_out() -> None:
    loaded = load_scenario(SHIPPED / "everything-at-once.toml")
    assert {type(fault) for fault in loaded.faults} == set(KINDS.values())
    assert {*TOLD, *SILENT} == set(KINDS)
    assert {getattr(fault, "damage", None) for fault in loaded.faults} >= {"bit_flips", "torn", "full", "read_only"}
    assert next(fault for fault in loaded.faults if isinstance(fault, BrokerRestart)).keep_retained is False


def test_the_study_gets_through(folder: Path, alone: Outcome) -> None:
    events = [one.event for one in read_events(folder / EVENTS)]
    assert len(alone.models) == 8
    assert events.count("update_delivered") > 100
    assert "crash" not in events  # no daemon died of an error of its own
    struck = {*TOLD.values(), "store_damaged", "store_failed", "firmware_rolled_back", "upload_replayed"}
    assert struck <= set(events)
    assert events.count("firmware_updated") == events.count("firmware_rolled_back")


@pytest.mark.parametrize("kind", SILENT)
def test_a_kind_of_fault_without_an_event_of_its_own_shows_in_the_events(
    alone: Outcome, kind: str, tmp_path: Path
) -> None:
    # Chances follow from a fault's place among those of its kind, so nothing else changes where one is left out.
    without = re.sub(rf'\[\[fault\]\]\nkind = "{kind}"\n(?:[^\[\n][^\n]*\n)*', "", TEXT)
    assert without.count("[[fault]]") == TEXT.count("[[fault]]") - 1
    assert simulated(folder_of(tmp_path / "run", without)).events != alone.events


def test_two_shards_come_to_the_same_end(alone: Outcome, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run", TEXT)
    assert simulated(folder, InProcess(folder / SCENARIO, count=2)) == alone
