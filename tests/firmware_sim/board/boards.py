"""Boards for the tests of this room."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from firmware_sim.board.board_state import BoardState
from firmware_sim.board.virtual_board import VirtualBoard
from firmware_sim.profiles.catalogue import load_profile
from firmware_sim.profiles.hardware_profile import HardwareProfile
from firmware_sim.virtual_device import VirtualClock
from firmware_sim.wearer.situation import Season
from firmware_sim.wearer.traces import TracedWearer, parse_traces

START_S = 1_800_230_400.0
"""A Monday, 0:00 UTC."""
WATCH, PHONE, PI = load_profile("smartwatch"), load_profile("phone_fast"), load_profile("raspberry_pi_5")
assert WATCH.battery is not None
CAPACITY_MWH = WATCH.battery.capacity_mwh


def traced(*events: tuple[float, str], season: Season = "mild") -> TracedWearer:
    """A wearer who does what is listed, in hours after the start; at home unless told otherwise."""
    lines = ["device,time,event", f"a,{START_S - 1e6},wifi_begins"]
    lines += [f"a,{START_S + hour * 3600},{event}" for hour, event in events]
    return TracedWearer(parse_traces(lines, where="the test")["a"], season=season)


@dataclass
class One:
    """A board and its clock."""

    board: VirtualBoard
    clock: VirtualClock

    def after(self, hours: float) -> VirtualBoard:
        """The board, so many hours after the start."""
        self.clock.time_s = START_S + hours * 3600
        self.board.advance(self.clock.time_s)
        return self.board


def one(
    wearer: TracedWearer,
    *,
    percent: float = 50.0,
    celsius: float = 25.0,
    profile: HardwareProfile = WATCH,
    on: bool = True,
    offset: float = 0.0,
) -> One:
    """A board at the start."""
    clock = VirtualClock(START_S)
    capacity = 0.0 if profile.battery is None else profile.battery.capacity_mwh
    state = BoardState(START_S, percent / 100 * capacity, celsius, on)
    return One(VirtualBoard(profile, wearer, clock=clock, state=state, sensor_offset_celsius=offset), clock)


def with_thermal(profile: HardwareProfile, **changes: float) -> HardwareProfile:
    """The profile with another thermal design."""
    return msgspec.structs.replace(profile, thermal=msgspec.structs.replace(profile.thermal, **changes))
