"""How long a device hangs: until its hardware's watchdog bites, or until the hang is over."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import simpy

from firmware_sim.firmware.watchdog import HangEnd, hang_end
from firmware_sim.fleet.build import new_records, world_of
from firmware_sim.fleet.hardware import BOOT_S
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.fleet.surroundings import Ending
from firmware_sim.scenario.loading import load_scenario
from tests.firmware_sim.fleet.small_fleets import HARDWARE, scenario_file
from tests.firmware_sim.fleet.test_firmware_rollout import (
    ROLLOUT,
    check_every_device_fell_back_and_the_study_went_on,
    rolled_out,
)

PI_S, ESP_S, PHONE_S = 15.0, 5.0, 60.0


def with_population(**keys: Any) -> dict[str, Any]:
    return {**HARDWARE, "population": {"profiles": {"raspberry_pi_zero_2_w": 1}, **keys}}


def restarted(folder: Path, *, for_s: float, **population: Any) -> tuple[float, DeviceRecord]:
    """When a device that hangs from second 0 on for so long starts again, and its record."""
    fault = {"kind": "hang", "at_s": 0.0, "for_s": for_s}
    loaded = load_scenario(scenario_file(folder, fault=[fault], **with_population(**population)))
    record = new_records(loaded, 0, 8)[0]
    surroundings = world_of(loaded).surroundings(record, simpy.Environment())
    return surroundings.next_start_s(Ending("hang", is_clean=False)), record


def test_a_hang_ends_by_itself_or_by_the_watchdog_whichever_is_first() -> None:
    assert hang_end(100.0, watchdog_timeout_s=15.0) == HangEnd(115.0, is_reset=True)
    assert hang_end(100.0, watchdog_timeout_s=15.0, lasts_s=15.0) == HangEnd(115.0, is_reset=True)
    assert hang_end(100.0, watchdog_timeout_s=15.0, lasts_s=14.0) == HangEnd(114.0, is_reset=False)


@pytest.mark.parametrize(
    ("profile", "timeout_s"),
    [("raspberry_pi_zero_2_w", PI_S), ("esp32_gateway", ESP_S), ("phone_fast", PHONE_S)],
)
def test_the_watchdog_of_the_hardware_resets_a_device_that_hangs(
    tmp_path: Path, profile: str, timeout_s: float
) -> None:
    found_s, record = restarted(tmp_path, for_s=3600.0, profiles={profile: 1})
    assert (found_s, record.boot_cause) == (timeout_s + BOOT_S, "hang")


def test_a_scenario_says_otherwise_for_all_hardware(tmp_path: Path) -> None:
    found_s, _ = restarted(tmp_path, for_s=3600.0, watchdog_timeout_s=40.0)
    assert found_s == 40.0 + BOOT_S


def test_a_hang_that_is_over_before_the_watchdog_bites_is_no_boot(tmp_path: Path) -> None:
    found_s, record = restarted(tmp_path, for_s=8.0)
    assert (found_s, record.boot_cause) == (8.0, "")


@pytest.mark.parametrize(("population", "timeout_s"), [({}, PI_S), ({"watchdog_timeout_s": 40.0}, 40.0)])
def test_an_image_that_hangs_waits_for_the_same_watchdog(
    tmp_path: Path, population: dict[str, Any], timeout_s: float
) -> None:
    changes = with_population(**population) | {"days": 0.01}
    left = rolled_out(tmp_path, "hang", **changes)
    check_every_device_fell_back_and_the_study_went_on(left)
    for name in {event.device for event in left.of("firmware_reset")}:
        resets_s = [event.time_s for event in left.of("firmware_reset") if event.device == name]
        # From one hang to the next: the watchdog, the boot, and the time for which the image works.
        gaps_s = [later_s - earlier_s for earlier_s, later_s in itertools.pairwise(resets_s)]
        assert gaps_s == pytest.approx([timeout_s + ROLLOUT["boot_s"] + 8.0] * 2, abs=0.01)
