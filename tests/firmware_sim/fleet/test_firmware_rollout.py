"""An update of the firmware in a simulated fleet: in waves, proved or rolled back, and seen in the outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from firmware_sim.fleet.measuring import metrics_of
from firmware_sim.scenario.loading import load_scenario
from fl_protocol.errors import ConfigError
from tests.enrolments import broken_copy
from tests.firmware_sim.fleet.small_fleets import BASE, HARDWARE, Ran, ran, scenario_file

WAVES = [{"at_s": 4.0, "share": 0.3}, {"at_s": 20.0, "share": 1.0}]
ROLLOUT: dict[str, Any] = {
    "waves": WAVES,
    "spread_s": 2.0,
    "boot_s": 5.0,
    "confirm_after_s": 30.0,
}
SLOW: dict[str, Any] = HARDWARE | {"task": {**BASE["task"], "rounds": 14}, "days": 0.004, "checkpoint_hours": 24.0}
"""As many rounds as go on beside a rollout of some minutes."""


def rolled_out(folder: Path, defect: str, *, shards: int = 1, **changes: Any) -> Ran:
    image = {"version": "2.0", "defect": defect, "after_s": 8.0, "energy_factor": 4.0 if defect == "hungry" else 1.0}
    return ran(folder, shards=shards, rollout=ROLLOUT | {"image": image}, **(SLOW | changes))


def versions(left: Ran) -> dict[str, int]:
    rounds = left.run.chronicle.rounds
    return metrics_of(left.run, accuracies=[(None, None)] * len(rounds), wall_s=0.0).firmware


def check_every_device_fell_back_and_the_study_went_on(left: Ran) -> None:
    """Eight took the bad image, had the boots that their boot loader gives it, and run what they ran before."""
    assert left.count("firmware_updated") == left.count("firmware_rolled_back") == 8
    assert left.count("firmware_reset") == 8 * 3
    assert versions(left) == {"1.0": 8}
    last_s = max(event.time_s for event in left.of("firmware_rolled_back"))
    assert [event for event in left.of("update_delivered") if event.time_s > last_s]
    assert not left.of("crash")


@pytest.mark.parametrize("defect", ["crash_at_boot", "reboot_loop", "hang"])
def test_a_bad_image_is_rolled_back_and_the_study_goes_on(tmp_path: Path, defect: str) -> None:
    check_every_device_fell_back_and_the_study_went_on(rolled_out(tmp_path, defect))


def test_a_boot_loader_that_never_falls_back_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = broken_copy("firmware_sim.firmware.slots", ("if boots > self._boot_limit:", "if False:"))
    monkeypatch.setattr("firmware_sim.firmware.life.FirmwareSlots", broken.FirmwareSlots)
    monkeypatch.setattr("firmware_sim.firmware.life.Booting", broken.Booting)
    monkeypatch.setattr("firmware_sim.firmware.life.Downloaded", broken.Downloaded)
    monkeypatch.setattr("firmware_sim.firmware.life.Save", broken.Save)
    monkeypatch.setattr("firmware_sim.firmware.life.Reboot", broken.Reboot)
    left = rolled_out(tmp_path, "reboot_loop")
    with pytest.raises(AssertionError):
        check_every_device_fell_back_and_the_study_went_on(left)


def test_a_good_image_stays_and_reaches_devices_in_their_waves(tmp_path: Path) -> None:
    left = rolled_out(tmp_path, "none")
    assert versions(left) == {"2.0": 8}
    assert not left.of("firmware_reset", "firmware_rolled_back")
    times = [event.time_s for event in left.of("firmware_updated")]
    first = [time_s for time_s in times if time_s < 20.0]
    assert 0 < len(first) < len(times) == 8
    assert min(times) >= 4.0


def test_a_hungry_image_stays_and_takes_more_energy(tmp_path: Path) -> None:
    good, hungry = rolled_out(tmp_path / "good", "none"), rolled_out(tmp_path / "hungry", "hungry")
    assert versions(hungry) == {"2.0": 8}
    used, used_hungry = (sum(sum(one.energy.parts) for one in left.run.records) for left in (good, hungry))
    assert used_hungry > 2 * used


def test_the_record_of_the_slots_lasts_over_daemons_that_end(tmp_path: Path) -> None:
    # Every round puts the run down, and each daemon starts anew: a boot is counted once all the same.
    check_every_device_fell_back_and_the_study_went_on(rolled_out(tmp_path, "reboot_loop", checkpoint_hours=0.0))


def test_the_same_bytes_come_out_however_many_shards_there_are(tmp_path: Path) -> None:
    one, two = (rolled_out(tmp_path / str(shards), "hang", shards=shards) for shards in (1, 2))
    assert one.table == two.table


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"wave": []}, "rollout.wave: there is no such key; expected boot_limit"),
        (
            {"waves": [{"at_s": 4.0, "share": 1.5}]},
            "rollout.waves[0].share: expected a number, more than 0 and at most 1, got 1.5",
        ),
        ({"waves": list(reversed(WAVES))}, "expected times and shares to ascend"),
        ({"image": {"version": "1.0"}}, "image.version: expected another version than factory"),
        (
            {"image": {"version": "2.0", "defect": "explodes"}},
            "expected one of crash_at_boot, hang, hungry, none, reboot_loop, got 'explodes'",
        ),
        ({"image": {"version": "2.0", "defect": "hungry"}}, "energy_factor: expected above 1"),
        ({"boot_limit": 0}, "rollout.boot_limit: expected a whole number, at least 1 and at most 100, got 0"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_what_is_wrong_in_a_rollout_is_said(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    path = scenario_file(tmp_path, rollout={**ROLLOUT, "image": {"version": "2.0"}, **change}, **SLOW)
    with pytest.raises(ConfigError) as told:
        load_scenario(path)
    assert complaint in str(told.value)
    assert "line " in str(told.value)


def test_ideal_devices_take_no_rollout(tmp_path: Path) -> None:
    path = scenario_file(tmp_path, rollout={**ROLLOUT, "image": {"version": "2.0"}})
    with pytest.raises(ConfigError, match=r"line \d+: rollout: expected population.profiles beside it"):
        load_scenario(path)
