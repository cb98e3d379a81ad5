"""A flash that fails under a daemon that is awake: at its time, for its time, and never a silent skip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import simpy

from firmware_sim.fleet.build import new_records, world_of
from firmware_sim.lasting_flash import LastingFlash
from firmware_sim.scenario.loading import load_scenario
from tests.enrolments import broken_copy
from tests.firmware_sim.fleet.small_fleets import HARDWARE, Ran, ran, scenario_file

STRUCK = 10.0
LASTS = 400.0


def fault(damage: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "corrupted_flash", "damage": damage, "at_s": STRUCK, "for_s": LASTS} | changes


def check_it_fails_at_its_time(left: Ran) -> None:
    """Devices say that they cannot store, in the strike only; afterwards the study goes on."""
    failed = [event.time_s for event in left.of("store_failed", "store_unavailable")]
    assert failed
    assert min(failed) >= STRUCK
    assert max(failed) <= STRUCK + LASTS
    delivered = [event.time_s for event in left.of("update_delivered")]
    assert not [time_s for time_s in delivered if STRUCK + 60 < time_s < STRUCK + LASTS]
    assert [time_s for time_s in delivered if time_s > STRUCK + LASTS]
    assert not left.of("crash")


@pytest.mark.parametrize("damage", ["full", "read_only"])
def test_a_flash_that_takes_nothing_for_a_while_stops_devices_that_are_awake_for_so_long(
    tmp_path: Path, damage: str
) -> None:
    check_it_fails_at_its_time(ran(tmp_path, fault=[fault(damage)], **HARDWARE))


def test_a_flash_that_is_looked_at_when_a_daemon_starts_only_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = "now_s = self._true.now_s()\n        self._flash_fate.tend(now_s)\n        self.board"
    broken = broken_copy(
        "firmware_sim.fleet.hardware", (settle, settle.replace("self._flash_fate.tend(now_s)", "pass"))
    )
    monkeypatch.setattr("firmware_sim.fleet.hardware_world.HardwareSurroundings", broken.HardwareSurroundings)
    with pytest.raises(AssertionError):
        check_it_fails_at_its_time(ran(tmp_path, fault=[fault("full")], **HARDWARE))


@pytest.mark.parametrize("damage", ["bit_flips", "torn"])
def test_a_device_whose_ledger_is_damaged_stays_off_and_the_table_says_why(tmp_path: Path, damage: str) -> None:
    left = ran(tmp_path, fault=[fault(damage, target=["device-0000001"], files=["ledger*"])], **HARDWARE)
    (reset,), (refused,) = left.of("corrupted_flash"), left.of("store_damaged")
    assert reset.device == refused.device == "device-0000001"
    assert reset.time_s < refused.time_s < reset.time_s + 60
    assert "LedgerError" in refused.detail
    assert "nothing is trained" in refused.detail
    assert max(event.time_s for event in left.events if event.device == "device-0000001") == refused.time_s
    assert not left.of("crash")
    assert left.count("round_committed") >= 1


def test_a_store_that_is_damaged_without_a_fault_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = "files[name] = content[:length]"
    broken = broken_copy("firmware_sim.fleet.record", (lost, f"{lost} if 'ledger' not in name else b''"))
    monkeypatch.setattr("firmware_sim.fleet.maker.unpacked", broken.unpacked)
    left = ran(tmp_path, **HARDWARE)  # every checkpoint restarts the daemons
    assert not left.of("store_damaged")
    findings = left.of("crash")
    assert findings
    assert all("LedgerError" in finding.detail for finding in findings)


def test_wear_goes_on_over_lives_and_makes_a_flash_read_only_under_a_daemon(tmp_path: Path) -> None:
    loaded = load_scenario(scenario_file(tmp_path, **HARDWARE))
    (profile, _), record = loaded.profiles["raspberry_pi_zero_2_w"], new_records(loaded, 0, 8)[0]
    endured = int(profile.flash.capacity_bytes / profile.flash.page_bytes * profile.flash.endurance_writes)
    record.page_writes = endured - 10
    surroundings, flash = world_of(loaded).surroundings(record, simpy.Environment()), LastingFlash()
    surroundings.prepare(flash)
    flash.page_writes = 9
    surroundings.settle()
    assert not flash.read_only
    flash.page_writes = 10
    surroundings.settle()
    assert flash.read_only


@pytest.mark.parametrize("damage", ["full", "torn"])
def test_the_same_bytes_come_out_however_many_shards_there_are(tmp_path: Path, damage: str) -> None:
    struck = [fault(damage, target=0.5)]
    one, two = (ran(tmp_path / str(shards), shards=shards, fault=struck, **HARDWARE) for shards in (1, 2))
    assert one.table == two.table
