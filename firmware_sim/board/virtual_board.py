"""`device_client.ports.Board` over a profile's physics and a wearer: what a device's sensors read at a true time.

Lazy: nothing happens between two questions; `advance` then goes from change to change of the wearer's in closed form
(`firmware_sim.board.physics`), so one step and many give the same. All that lasts is a `BoardState`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Literal

from device_client.eligibility import BrokenReading, Conditions
from device_client.ports import Clock
from firmware_sim.board.board_state import BoardState
from firmware_sim.board.physics import Phase, Surroundings, physics_of
from firmware_sim.chance import key_of, uniforms
from firmware_sim.profiles.hardware_profile import HardwareProfile
from firmware_sim.wearer.situation import Situation, Wearing
from fl_protocol.errors import LocalMisuseError

Use = Literal["compute", "radio", "base"]

_JOULES_PER_MWH = 3.6
_GRAIN_S = 1e-3
"""A change is told of so much later, so that the reading has surely changed: rounding is not to the second."""
_SURROUNDINGS = {(charger, cold): Surroundings(charger, cold) for charger in (False, True) for cold in (False, True)}


class VirtualBoard:
    """One device's board.

    Args:
        profile: what it is made of.
        wearer: who carries it.
        clock: true time.
        state: where it stands, of `first_state` or of an earlier board's `state`.
        sensor_offset_celsius: error of its temperature sensor, of the function of this name.

    Attributes:
        sensor_faults: by the name of a reading: the number it is stuck at, or why it fails.
    """

    __slots__ = (
        "_around",
        "_background_mwh",
        "_base_mwh",
        "_brown_outs",
        "_celsius",
        "_charged_mwh",
        "_clock",
        "_compute_mwh",
        "_mwh",
        "_offset_celsius",
        "_on",
        "_physics",
        "_piece_ends_s",
        "_profile",
        "_radio_mwh",
        "_self_discharged_mwh",
        "_time_s",
        "_wearer",
        "sensor_faults",
    )

    def __init__(
        self,
        profile: HardwareProfile,
        wearer: Wearing,
        *,
        clock: Clock,
        state: BoardState,
        sensor_offset_celsius: float = 0.0,
    ) -> None:
        self._profile, self._wearer, self._clock = profile, wearer, clock
        self._physics = physics_of(profile)
        self._offset_celsius = sensor_offset_celsius
        self.sensor_faults: Mapping[str, float | str] = {}
        self._time_s = state.time_s
        self._mwh = state.charge_mwh
        self._celsius = state.celsius
        self._on = state.on
        self._charged_mwh = state.charged_mwh
        self._background_mwh = state.background_mwh
        self._self_discharged_mwh = state.self_discharged_mwh
        self._compute_mwh = state.compute_mwh
        self._radio_mwh = state.radio_mwh
        self._base_mwh = state.base_mwh
        self._brown_outs = state.brown_outs
        self._begin_piece()

    def read(self) -> Conditions:
        """The readings of this moment."""
        self.advance(self._clock.now_s())
        situation = self._situation(self._time_s)
        conditions = Conditions(
            battery_percent=self._gauge(),
            charging=situation.on_charger if self._physics.has_battery else None,
            idle=situation.idle,
            unmetered=not self._profile.link(situation.place).metered,
            temperature_celsius=round(self._celsius + self._offset_celsius, 1),
        )
        return _with_faults(conditions, self.sensor_faults) if self.sensor_faults else conditions

    @property
    def is_on(self) -> bool:
        """Whether the device runs: false from the battery's end until it is charged again."""
        return self._on

    def state(self) -> BoardState:
        """Where it stands; a board made from it has the same future."""
        return BoardState(
            self._time_s,
            self._mwh,
            self._celsius,
            self._on,
            self._charged_mwh,
            self._background_mwh,
            self._self_discharged_mwh,
            self._compute_mwh,
            self._radio_mwh,
            self._base_mwh,
            self._brown_outs,
        )

    def advance(self, to_s: float) -> None:
        """Let time pass.

        Args:
            to_s: true Unix seconds.

        Raises:
            LocalMisuseError: that is before the time it stands at.
        """
        if to_s < self._time_s:
            raise LocalMisuseError(f"to_s: expected at least {self._time_s}, to which the board has gone, got {to_s}")
        while self._time_s < to_s:
            if self._time_s >= self._piece_ends_s:
                self._begin_piece()
            end_s = min(to_s, self._piece_ends_s)
            self._integrate(end_s - self._time_s)
            self._time_s = end_s
        if self._time_s >= self._piece_ends_s:
            self._begin_piece()

    def spend(self, joules: float, seconds: float, use: Use) -> bool:
        """Do work now: it drains the battery and warms the board as by its end. Time does not advance.

        Args:
            joules: at least 0.
            seconds: that the work takes, at least 0.
            use: what for.

        Returns:
            Whether the device still runs; it stops when the battery has not got so much.

        Raises:
            LocalMisuseError: it is off, or the work is negative.
        """
        if not self._on or not (joules >= 0 and seconds >= 0):
            raise LocalMisuseError(
                f"spend: expected work of a device that is on, got {joules} J in {seconds} s"
                f" of one that is {'on' if self._on else 'off'}"
            )
        wanted = joules / _JOULES_PER_MWH
        taken = min(wanted, self._mwh) if self._physics.has_battery else wanted
        if use == "compute":
            self._compute_mwh += taken
        elif use == "radio":
            self._radio_mwh += taken
        else:
            self._base_mwh += taken
        self._celsius += self._physics.warming(taken * _JOULES_PER_MWH, seconds)
        if self._physics.has_battery:
            self._mwh -= taken
            if self._mwh <= self._physics.floor_mwh(self._around):
                self._stop()
        return self._on

    def compute_s(self, flop: float) -> float:
        """Seconds that computing takes at the present temperature.

        Args:
            flop: floating point operations, at least 0.
        """
        thermal = self._profile.thermal
        start, end = thermal.throttle_start_celsius, thermal.throttle_end_celsius
        hot = min(1.0, max(0.0, (self._celsius - start) / (end - start)))
        return flop / (self._profile.processor.flop_per_s * (1 - hot * (1 - thermal.throttle_factor)))

    def next_change_s(self, *, battery_percents: Sequence[float] = (), celsius: Sequence[float] = ()) -> float:
        """When a look at the board next finds something else that matters, if no work is done.

        Args:
            battery_percents: levels; that the gauge crosses one is a change.
            celsius: levels, in the same way of the temperature that is read.

        Returns:
            True Unix seconds, up to a millisecond after charger, use or metering change, a level is crossed, or the
            device goes off or on; infinity if that never happens.
        """
        return _Search(self, battery_percents, celsius).next_s()

    def _situation(self, time_s: float) -> Situation:
        """Of the wearer; what is on the mains is at home."""
        situation = self._wearer.situation(time_s)
        return situation if self._physics.has_battery else situation._replace(place="home")

    def _around_of(self, situation: Situation) -> Surroundings:
        """What of it the physics depends on."""
        cold = situation.place == "away" and self._wearer.season == "winter"
        return _SURROUNDINGS[situation.on_charger, cold]

    def _begin_piece(self) -> None:
        """Look up what the wearer does, and until when."""
        if not self._physics.has_battery:
            self._around, self._piece_ends_s = _SURROUNDINGS[True, False], math.inf
            return
        self._around = self._around_of(self._wearer.situation(self._time_s))
        self._piece_ends_s = self._wearer.next_move_s(self._time_s)
        self._switch()

    def _switch(self) -> None:
        """Stop or start, as the charge has it."""
        on = self._physics.is_on(self._mwh, self._around, was_on=self._on)
        if self._on and not on:
            self._stop()
        self._on = on

    def _stop(self) -> None:
        """Brown-out."""
        self._on = False
        self._brown_outs += 1

    def _integrate(self, seconds: float) -> None:
        """Some time of one piece, phase by phase."""
        physics = self._physics
        while seconds > 0:
            phase = physics.phase(self._mwh, self._around, on=self._on)
            span = seconds
            ends = False
            if phase.until_mwh is not None:
                until_s = physics.time_to_mwh(self._mwh, phase, phase.until_mwh)
                ends = until_s <= seconds
                span = min(until_s, seconds)
            after = (
                phase.until_mwh if ends and phase.until_mwh is not None else physics.mwh_after(self._mwh, phase, span)
            )
            self._account(after - self._mwh, span)
            self._mwh, self._celsius = after, physics.celsius_after(self._celsius, phase, span)
            if ends:
                self._switch()
            seconds -= span

    def _account(self, change_mwh: float, seconds: float) -> None:
        """Write down where a phase's energy went."""
        if self._around.on_charger:
            self._charged_mwh += change_mwh
        elif self._on:
            background = self._physics.background * seconds
            self._background_mwh += background
            self._self_discharged_mwh += -change_mwh - background
        else:
            self._self_discharged_mwh -= change_mwh

    def _gauge(self) -> float | None:
        """The battery's charge in whole percent, as gauges show it."""
        return float(round(self._physics.percent(self._mwh, self._around))) if self._physics.has_battery else None


class _Search:
    """The next change of a board, found on a copy of its numbers."""

    def __init__(self, board: VirtualBoard, percents: Sequence[float], celsius: Sequence[float]) -> None:
        self._board, self._physics = board, board._physics
        # A gauge rounds to whole percent, a thermometer to tenths: readings cross in the middle.
        self._percents = [percent - 0.5 for percent in percents] if self._physics.has_battery else []
        self._levels = [level + 0.05 - board._offset_celsius for level in celsius]
        self._mwh, self._celsius, self._on = board._mwh, board._celsius, board._on
        self._time_s = board._time_s

    def next_s(self) -> float:
        """The first change."""
        board = self._board
        while True:
            situation = board._situation(self._time_s)
            around = board._around_of(situation)
            end_s = board._wearer.next_change_s(self._time_s)
            found_s = self._within(around, end_s)
            if found_s is not None:
                return found_s
            if end_s == math.inf:
                return math.inf
            self._time_s = end_s
            after = board._situation(end_s)
            # Cold moves the gauge at once, so it is a change too.
            if self._reads(after) != self._reads(situation) or board._around_of(after).cold != around.cold:
                return end_s
            if self._physics.is_on(self._mwh, board._around_of(after), was_on=self._on) != self._on:
                return end_s

    def _reads(self, situation: Situation) -> tuple[bool, bool, bool]:
        """What the board reads of a situation; on the mains there is no charger to be read."""
        charging = situation.on_charger and self._physics.has_battery
        return charging, situation.idle, self._board._profile.link(situation.place).metered

    def _within(self, around: Surroundings, end_s: float) -> float | None:
        """The first crossing, or switching, before the wearer's next change; None, and the numbers of then."""
        physics = self._physics
        while True:
            phase = physics.phase(self._mwh, around, on=self._on)
            left_s = end_s - self._time_s
            until_s = math.inf
            if phase.until_mwh is not None:
                until_s = physics.time_to_mwh(self._mwh, phase, phase.until_mwh)
            crossing_s = self._crossing(phase, around)
            if crossing_s <= min(until_s, left_s) and crossing_s < math.inf:
                return self._time_s + crossing_s + _GRAIN_S
            if until_s > left_s or until_s == math.inf:
                if left_s < math.inf:
                    self._celsius = physics.celsius_after(self._celsius, phase, left_s)
                    self._mwh = physics.mwh_after(self._mwh, phase, left_s)
                return None
            self._celsius = physics.celsius_after(self._celsius, phase, until_s)
            self._mwh, self._time_s = phase.until_mwh or 0.0, self._time_s + until_s
            if physics.is_on(self._mwh, around, was_on=self._on) != self._on:
                return self._time_s + _GRAIN_S

    def _crossing(self, phase: Phase, around: Surroundings) -> float:
        """Seconds to the first level that this phase leads through."""
        physics = self._physics
        by_charge = (
            physics.time_to_mwh(self._mwh, phase, physics.mwh_at(percent, around)) for percent in self._percents
        )
        by_heat = (physics.time_to_celsius(self._celsius, phase, level) for level in self._levels)
        return min((*by_charge, *by_heat), default=math.inf)


def first_state(profile: HardwareProfile, wearer: Wearing, *, time_s: float, seed: int | str, index: int) -> BoardState:
    """A board at the beginning of a run: a charge left to chance, as warm as it gets.

    Args:
        profile: what it is made of.
        wearer: who carries it.
        time_s: true Unix seconds.
        seed: of the fleet.
        index: which device.

    Returns:
        Its state; of the charge, 30 to 100 % is equally likely.
    """
    physics = physics_of(profile)
    share = 0.3 + 0.7 * uniforms(key_of("first charge", seed), index)[0]
    mwh = share * physics.capacity_mwh
    situation = wearer.situation(time_s)
    settled = physics.phase(mwh, _SURROUNDINGS[situation.on_charger, False], on=True).settled_celsius
    return BoardState(time_s, mwh, settled)


def sensor_offset_celsius(profile: HardwareProfile, *, seed: int | str, index: int) -> float:
    """Error of a device's temperature sensor, for life: normal, within three standard deviations.

    Args:
        profile: what it is made of.
        seed: of the fleet.
        index: which device.
    """
    deviation = NormalDist().inv_cdf(uniforms(key_of("sensor offset", seed), index)[0])
    return profile.thermal.sensor_offset_sd_celsius * min(3.0, max(-3.0, deviation))


def _with_faults(conditions: Conditions, faults: Mapping[str, float | str]) -> Conditions:
    """Readings of which some are stuck or fail."""
    readings = {
        "battery_percent": conditions.battery_percent,
        "charging": conditions.charging,
        "idle": conditions.idle,
        "unmetered": conditions.unmetered,
        "temperature_celsius": conditions.temperature_celsius,
    }
    broken = []
    for name, fault in faults.items():
        if isinstance(fault, str):
            broken.append(BrokenReading(name, fault))
            readings[name] = None
        else:
            readings[name] = fault
    return Conditions(**readings, broken=tuple(broken))  # type: ignore[arg-type]
