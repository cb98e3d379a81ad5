"""Two firmware slots: rules, power cuts, whole lives with bad images."""

from __future__ import annotations

import math
from contextlib import suppress
from random import Random
from types import ModuleType
from typing import Any

import pytest

from firmware_sim.firmware import slots
from firmware_sim.firmware.images import Defect, FirmwareImage, Rollout, Wave
from firmware_sim.firmware.life import FirmwareLife, FirmwareTerms
from firmware_sim.firmware.slot_file import SlotFile
from firmware_sim.firmware.slots import (
    Booting,
    Downloaded,
    FirmwareSlots,
    Healthy,
    Reboot,
    RolledBack,
    Run,
    Save,
    SlotRecord,
)
from firmware_sim.virtual_flash import PowerCut, PowerCutError, VirtualFlash
from fl_protocol.errors import LocalMisuseError
from tests.enrolments import broken_copy

FACTORY = SlotRecord(active=0, versions=("1.0", "1.0"))
GOOD = FirmwareImage(version="1.0")
TERMS = FirmwareTerms(factory="1.0", boot_s=10, boot_limit=3, confirm_after_s=300)


def _on_trial(**options: Any) -> FirmwareSlots:
    machine = FirmwareSlots(FACTORY, **options)
    machine.handle(Booting("power_on"), 0.0)
    saved, reboot = machine.handle(Downloaded("2.0"), 50.0)
    assert saved == Save(SlotRecord(active=1, versions=("1.0", "2.0"), confirmed=False))
    assert reboot == Reboot()
    return machine


def test_an_update_that_works_is_confirmed_after_its_time() -> None:
    machine = _on_trial()
    assert machine.handle(Booting("reset"), 60.0)[-1] == Run("2.0")
    assert machine.confirms_s == 360.0
    assert machine.handle(Healthy(), 359.0) == ()
    (saved,) = machine.handle(Healthy(), 360.0)
    assert saved == Save(SlotRecord(active=1, versions=("1.0", "2.0")))
    assert machine.handle(Booting("crash"), 400.0) == (Run("2.0"),)


def test_an_image_that_never_works_is_given_up_after_its_boots_and_not_taken_again() -> None:
    machine = _on_trial(boot_limit=3)
    for cause in ("reset", "crash", "watchdog"):
        assert machine.handle(Booting(cause), 60.0)[-1] == Run("2.0")  # type: ignore[arg-type]
    record = SlotRecord(active=0, versions=("1.0", "2.0"), rejected="2.0")
    assert machine.handle(Booting("crash"), 90.0) == (Save(record), RolledBack("2.0", "1.0"), Run("1.0"))
    assert machine.handle(Downloaded("2.0"), 100.0) == ()
    assert machine.handle(Downloaded("2.1"), 100.0)[-1] == Reboot()


def test_the_count_is_saved_before_the_image_is_booted() -> None:
    saved, run = _on_trial().handle(Booting("reset"), 60.0)
    assert isinstance(saved, Save)
    assert (saved.record.boots, run) == (1, Run("2.0"))


def test_power_that_goes_away_is_not_the_image_s_fault() -> None:
    machine = _on_trial(boot_limit=1)
    for cause in ("reset", "brown_out", "power_on", "brown_out"):
        assert machine.handle(Booting(cause), 60.0)[-1] == Run("2.0")  # type: ignore[arg-type]
    assert machine.handle(Booting("watchdog"), 60.0)[-1] == Run("1.0")


def _staged_while_on_trial(module: ModuleType) -> tuple[str, str]:
    machine = module.FirmwareSlots(module.SlotRecord(active=0, versions=("1.0", "1.0")))
    machine.handle(module.Booting("power_on"), 0.0)
    machine.handle(module.Downloaded("2.0"), 50.0)
    machine.handle(module.Booting("reset"), 60.0)
    machine.handle(module.Downloaded("3.0"), 70.0)
    versions: tuple[str, str] = machine.record.versions
    return versions


def test_nothing_overwrites_what_there_is_to_fall_back_to() -> None:
    assert _staged_while_on_trial(slots) == ("1.0", "2.0")


def test_slots_that_overwrite_their_fallback_are_caught() -> None:
    copy = broken_copy("firmware_sim.firmware.slots", ("if not self.record.confirmed or version in", "if version in"))
    assert "1.0" not in _staged_while_on_trial(copy)


# The record on the flash.


def _outcome(kind: Any, cut: PowerCut, seed: int) -> tuple[int, SlotRecord | None]:
    """The power goes while a record is saved: its number, and what the next boot reads."""
    flash = VirtualFlash(random=Random(seed))  # noqa: S311 - a simulation
    file = kind(flash)
    file.save(_numbered(0))
    flash.power_cut = PowerCut(flash.operations + cut.at, cut.moment)
    number = 0
    with suppress(PowerCutError):
        while True:
            number += 1
            file.save(_numbered(number))
    return number, kind(flash.after_power_cut(Random(seed + 1))).load()  # noqa: S311


def _numbered(number: int) -> SlotRecord:
    return SlotRecord(active=number % 2, versions=("1.0", f"2.{number}" * 8))


def _outcomes(kind: Any) -> list[tuple[int, SlotRecord | None]]:
    """Of many cuts."""
    return [
        _outcome(kind, PowerCut(at, moment), seed)
        for at in range(9)
        for moment in ("before", "during", "after")
        for seed in range(12)
    ]


def test_a_torn_write_leaves_the_record_of_before_or_after() -> None:
    for number, record in _outcomes(SlotFile):
        assert record in {_numbered(number - 1), _numbered(number)}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(("self._name(number % 2)", "self._name(0)"), id="one file"),
        pytest.param(("        self._disk.sync(name)\n", ""), id="not synced"),
    ],
)
def test_a_slot_file_that_can_be_torn_is_caught(change: tuple[str, str]) -> None:
    copy = broken_copy("firmware_sim.firmware.slot_file", change)
    assert any(record not in {_numbered(n - 1), _numbered(n)} for n, record in _outcomes(copy.SlotFile))


def _with_a_flipped_bit(kind: Any, position: int) -> SlotRecord | None:
    flash = VirtualFlash()
    kind(flash).save(_numbered(1))
    kind(flash).save(_numbered(2))
    raw = bytearray(flash.read("firmware/slots.1") or b"")
    raw[position % len(raw)] ^= 1
    flash.write("firmware/slots.1", bytes(raw))
    record: SlotRecord | None = kind(flash).load()
    return record


def test_a_flipped_bit_brings_the_record_of_before_back() -> None:
    assert {_with_a_flipped_bit(SlotFile, position) == _numbered(1) for position in range(100)} == {True}


def test_a_slot_file_without_its_checksum_is_caught() -> None:
    copy = broken_copy("firmware_sim.firmware.slot_file", ("!= checksum:", "!= checksum and False:"))
    read = [_with_a_flipped_bit(copy.SlotFile, position) for position in range(100)]
    assert any(record not in {_numbered(1), _numbered(2)} for record in read)


def test_a_flash_with_neither_record_starts_from_the_factory_s() -> None:
    flash = VirtualFlash()
    SlotFile(flash).save(_numbered(1))
    flash.write("firmware/slots.0", b"rubbish")
    life = FirmwareLife({"1.0": GOOD}, terms=TERMS, disk=flash, watchdog_timeout_s=60)
    assert life.boot("power_on", 0.0) == GOOD


# Whole lives.


def _live(life: FirmwareLife, until_s: float) -> list[tuple[float, str]]:
    """Boot, and go on until then; when it reset, and why."""
    resets: list[tuple[float, str]] = []
    life.boot("power_on", 0.0)
    if life.update(FirmwareImage(version="2.0"), 20.0):
        life.boot("reset", 20.0)
    while (now_s := life.next_event_s()) <= until_s:
        cause = life.advance(now_s)
        if cause is not None:
            resets.append((now_s, cause))
            life.boot(cause, now_s)
    return resets


def _life(defect: Defect, flash: VirtualFlash | None = None, **options: Any) -> FirmwareLife:
    bad = FirmwareImage(version="2.0", defect=defect, **options)
    disk = VirtualFlash() if flash is None else flash
    return FirmwareLife({"1.0": GOOD, "2.0": bad}, terms=TERMS, disk=disk, watchdog_timeout_s=60)


@pytest.mark.parametrize(
    ("defect", "options", "resets"),
    [
        ("crash_at_boot", {}, [(30, "crash"), (40, "crash"), (50, "crash")]),
        ("reboot_loop", {"after_s": 100}, [(130, "crash"), (240, "crash"), (350, "crash")]),
        ("hang", {"after_s": 5}, [(95, "watchdog"), (170, "watchdog"), (245, "watchdog")]),
    ],
)
def test_a_bad_image_is_rolled_back(defect: Defect, options: dict[str, Any], resets: list[tuple[float, str]]) -> None:
    flash = VirtualFlash()
    life = _life(defect, flash, **options)
    assert _live(life, 1e6) == resets
    assert (life.image, life.rolled_back) == (GOOD, ["2.0"])
    assert FirmwareLife({"1.0": GOOD}, terms=TERMS, disk=flash, watchdog_timeout_s=60).image == GOOD
    assert life.next_event_s() == math.inf


def test_a_good_or_hungry_image_stays() -> None:
    hungry = _life("hungry", energy_factor=2.0)
    assert _live(hungry, 1e6) == []
    assert (hungry.image.version, hungry.image.energy_factor) == ("2.0", 2.0)
    assert hungry.up_s == 30.0


def test_an_image_that_crashes_after_it_was_confirmed_stays_and_goes_on_crashing() -> None:
    life = _life("reboot_loop", after_s=400)
    resets = _live(life, 2_000)
    assert [at_s for at_s, _ in resets] == [430, 840, 1250, 1660]
    assert life.rolled_back == []


def test_a_hang_lasts_until_the_watchdog_bites() -> None:
    life = _life("hang", after_s=5)
    life.boot("power_on", 0.0)
    life.update(FirmwareImage(version="2.0"), 20.0)
    life.boot("reset", 20.0)
    assert (life.hangs_s, life.next_event_s()) == (35.0, 95.0)
    assert life.advance(94.0) is None
    assert life.advance(95.0) == "watchdog"


def test_an_image_that_hangs_is_not_confirmed_while_the_watchdog_waits() -> None:
    disk, bad = VirtualFlash(), FirmwareImage(version="2.0", defect="hang", after_s=5)
    life = FirmwareLife({"1.0": GOOD, "2.0": bad}, terms=TERMS, disk=disk, watchdog_timeout_s=600)
    life.boot("power_on", 0.0)
    life.update(bad, 20.0)
    life.boot("reset", 20.0)  # up at 30, hangs at 35; one that works would be confirmed at 330
    assert life.next_event_s() == 635.0
    assert life.advance(330.0) is None
    assert life.is_on_trial
    assert life.advance(635.0) == "watchdog"


def test_waves_reach_their_shares_and_move_nobody() -> None:
    small = Rollout(image=GOOD, waves=(Wave(100, 0.1),), spread_s=50)
    whole = Rollout(image=GOOD, waves=(Wave(100, 0.1), Wave(500, 0.5), Wave(900, 1.0)), spread_s=50)
    names = [f"watch-{number}" for number in range(2000)]
    times = [whole.offered_s(seed=1, device=name) for name in names]
    first = [small.offered_s(seed=1, device=name) for name in names]
    # Binomial(2000, 0.1) and (2000, 0.5): more than six standard deviations away has a probability of 2e-9.
    assert abs(sum(100 <= time < 150 for time in times) - 200) < 81
    assert abs(sum(time < 550 for time in times) - 1000) < 135
    assert max(times) < 950
    assert all(early in {late, math.inf} for early, late in zip(first, times, strict=True))


def test_impossible_images_and_waves_are_refused() -> None:
    with pytest.raises(LocalMisuseError, match="energy_factor: expected above 1"):
        FirmwareImage(version="2.0", defect="hungry")
    with pytest.raises(LocalMisuseError, match=r"waves: expected times and shares to ascend, got 0.5 at 100 s"):
        Rollout(image=GOOD, waves=(Wave(100, 0.5), Wave(200, 0.5)))
    with pytest.raises(LocalMisuseError, match="factory: expected one of"):
        FirmwareLife({}, terms=TERMS, disk=VirtualFlash(), watchdog_timeout_s=60)
