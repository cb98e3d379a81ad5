"""What `device_client.ports.Board` promises, run over Linux's files and the virtual board alike: one evening of a
wearer gives the same readings, and the same rules block. So do two days that the simulator's board made up itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from device_client.adapters.linux_board import NETWORK_CACHE_S, LinuxBoard
from device_client.config import BoardConfig
from device_client.eligibility import BrokenReading, Conditions, Eligibility, EligibilityPolicy, TimeWindow
from device_client.ports import Board
from firmware_sim.board.board_state import BoardState
from firmware_sim.board.virtual_board import VirtualBoard
from firmware_sim.profiles.catalogue import load_profile
from firmware_sim.wearer.habits import Habits
from firmware_sim.wearer.traces import TracedWearer, parse_traces
from firmware_sim.wearer.wearer import Wearer

START_S = 1.8e9
STEP_S = 2 * NETWORK_CACHE_S
POLICY = EligibilityPolicy(require_charging=True, windows=(TimeWindow(12 * 3600, 13 * 3600),))
GOOD = Conditions(battery_percent=80, charging=True, idle=True, unmetered=True, temperature_celsius=31.5)
EVENING: tuple[tuple[str, Conditions, tuple[str, ...]], ...] = (
    ("all is well", GOOD, ()),
    ("in use", dataclasses.replace(GOOD, idle=False), ("idle",)),
    ("put down", GOOD, ("idle",)),
    ("left alone", GOOD, ()),
    ("unplugged", dataclasses.replace(GOOD, charging=False, battery_percent=50), ("charging",)),
    ("drained", dataclasses.replace(GOOD, charging=False, battery_percent=29), ("battery", "charging")),
    ("plugged in", dataclasses.replace(GOOD, battery_percent=31), ("battery", "charging")),
    ("charging", dataclasses.replace(GOOD, battery_percent=34), ("battery",)),
    ("charged enough", dataclasses.replace(GOOD, battery_percent=35), ()),
    ("hot", dataclasses.replace(GOOD, temperature_celsius=45.1), ("temperature",)),
    ("cooling", dataclasses.replace(GOOD, temperature_celsius=43.0), ("temperature",)),
    ("cooled", dataclasses.replace(GOOD, temperature_celsius=41.9), ()),
    ("away", dataclasses.replace(GOOD, unmetered=False), ("network",)),
    ("home again", GOOD, ("network",)),
    ("at home", GOOD, ()),
    ("impossible charge", dataclasses.replace(GOOD, battery_percent=300), ("battery",)),
    ("gauge recovers", GOOD, ("battery",)),
    ("gauge is right", GOOD, ()),
    (
        "gauge fails",
        dataclasses.replace(GOOD, battery_percent=None, broken=(BrokenReading("battery_percent", ""),)),
        ("battery",),
    ),
)


class Scene:
    """A board whose sensors read what they are told, and its clock."""

    def __init__(self) -> None:
        self.time_s = START_S

    def now_s(self) -> float:
        return self.time_s

    def local_time_s(self) -> float:
        return 12.5 * 3600


class LinuxScene(Scene):
    """The kernel's files, rewritten for every reading."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._supplies = folder / "sys/class/power_supply"
        self._zone = folder / "sys/class/thermal/thermal_zone0"
        for path in (self._supplies / "usb", self._supplies / "battery", self._zone, folder / "proc", folder / "bin"):
            path.mkdir(parents=True)
        (self._supplies / "usb/type").write_text("USB\n")
        (self._supplies / "battery/type").write_text("Battery\n")
        (self._zone / "type").write_text("cpu-thermal\n")
        busctl = folder / "bin/busctl"
        busctl.write_text(f"#!/bin/sh\nread answer < {folder}/metered && echo v u $answer\n")
        busctl.chmod(0o755)

    def board(self) -> Board:
        return LinuxBoard(
            BoardConfig(),
            sysfs=self._folder / "sys",
            proc=self._folder / "proc",
            monotonic_s=self.now_s,
            own_cpu_s=lambda: 0.0,
            cores=4,
            search_path=str(self._folder / "bin"),
        )

    def becomes(self, conditions: Conditions) -> None:
        (self._supplies / "usb/online").write_text(f"{int(bool(conditions.charging))}\n")
        (self._supplies / "battery/status").write_text("Not charging\n" if conditions.charging else "Discharging\n")
        percent, celsius = conditions.battery_percent, conditions.temperature_celsius
        # A gauge that fails gives text that is no number.
        (self._supplies / "battery/capacity").write_text("error\n" if percent is None else f"{percent:.0f}\n")
        assert celsius is not None
        (self._zone / "temp").write_text(f"{round(celsius * 1000)}\n")
        load = "0.30" if conditions.idle else "3.10"
        (self._folder / "proc/loadavg").write_text(f"{load} 0.50 0.50 1/95 27601\n")
        (self._folder / "metered").write_text("4\n" if conditions.unmetered else "3\n")


class VirtualScene(Scene):
    """A watch whose wearer does what the evening says; gauge and thermometer are stuck at its figures, or fail."""

    WATCH = load_profile("smartwatch")

    def __init__(self, _: Path) -> None:
        super().__init__()
        kinds = {"charging": "charging", "idle": "idle", "wifi": "unmetered"}
        lines = ["device,time,event", *(f"watch,0,{kind}_begins" for kind in kinds)]
        for step, ((_, before, _), (_, after, _)) in enumerate(pairwise(EVENING), 1):
            for kind, field in kinds.items():
                was, becomes = getattr(before, field), getattr(after, field)
                if was != becomes:
                    lines.append(f"watch,{START_S + step * STEP_S},{kind}_{'begins' if becomes else 'ends'}")
        wearer = TracedWearer(parse_traces(lines, where="the evening")["watch"])
        state = BoardState(START_S, 1_000.0, 30.0)
        self._board = VirtualBoard(self.WATCH, wearer, clock=self, state=state)

    def board(self) -> Board:
        return self._board

    def becomes(self, conditions: Conditions) -> None:
        percent, celsius = conditions.battery_percent, conditions.temperature_celsius
        assert celsius is not None
        self._board.sensor_faults = {
            "battery_percent": "error" if percent is None else percent,
            "temperature_celsius": celsius,
        }


SCENES = pytest.mark.parametrize("scene_of", [LinuxScene, VirtualScene])
AnyScene = LinuxScene | VirtualScene


def _without_causes(conditions: Conditions) -> Conditions:
    """What is broken, without the words that each board finds for it."""
    broken = tuple(dataclasses.replace(reading, cause="") for reading in conditions.broken)
    return dataclasses.replace(conditions, broken=broken)


@SCENES
def test_one_evening_reads_the_same_on_every_board(scene_of: Callable[[Path], AnyScene], tmp_path: Path) -> None:
    scene = scene_of(tmp_path)
    scene.becomes(GOOD)
    board = scene.board()
    for step, (what, conditions, _) in enumerate(EVENING):
        scene.time_s = START_S + step * STEP_S
        scene.becomes(conditions)
        assert _without_causes(board.read()) == conditions, what


@SCENES
def test_one_evening_blocks_the_same_rules_on_every_board(scene_of: Callable[[Path], AnyScene], tmp_path: Path) -> None:
    scene = scene_of(tmp_path)
    scene.becomes(GOOD)
    board, eligibility = scene.board(), Eligibility(POLICY)
    for step, (what, conditions, rules) in enumerate(EVENING):
        scene.time_s = START_S + step * STEP_S
        scene.becomes(conditions)
        found = eligibility.update(board.read(), now_s=scene.time_s, local_time_s=scene.local_time_s())
        assert tuple(blocked.rule for blocked in found) == rules, what
        assert all(blocked.reason for blocked in found)


def test_days_that_the_simulator_made_up_read_and_block_the_same_on_linux(tmp_path: Path) -> None:
    """Its battery drains and charges, it warms and works; the kernel's files say the same, look for look."""
    linux = LinuxScene(tmp_path)
    linux.becomes(GOOD)
    watch, wearer = load_profile("smartwatch"), Wearer("contract", 3, Habits(docked=0.0))
    state = BoardState(START_S, 300.0, 30.0)
    simulated = VirtualBoard(watch, wearer, clock=linux, state=state)
    board, rules, same_rules = linux.board(), Eligibility(POLICY), Eligibility(POLICY)
    found = set()
    for _ in range(96):
        linux.time_s += 1_800.0
        expected = simulated.read()
        if simulated.is_on:
            simulated.spend(120.0, 60.0, "compute")
        linux.becomes(expected)
        reading = board.read()
        assert reading == expected
        times = {"now_s": linux.time_s, "local_time_s": linux.local_time_s()}
        blocked = rules.update(reading, **times)
        assert blocked == same_rules.update(expected, **times)
        found |= {one.rule for one in blocked}
    assert found >= {"battery", "charging", "idle"}


def test_every_rule_but_the_timetable_blocks_in_the_course_of_the_evening() -> None:
    assert {rule for _, _, rules in EVENING for rule in rules} == {
        "battery",
        "charging",
        "idle",
        "network",
        "temperature",
    }
