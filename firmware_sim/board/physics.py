"""What a battery and a thermal mass do while nothing changes: closed forms, so that a night is one step.

- Off the charger the charge falls linearly: background draw and self-discharge are constant powers.
- On it the charge rises linearly up to the taper (constant current), then approaches full exponentially (constant
  voltage): dE/dt = P · (C - E) / (C - E_taper), with P the power at the taper, where both meet.
- Temperature is a first-order lag: dT/dt = (T_settled - T) / τ; see F. Incropera et al., "Fundamentals of Heat and Mass
  Transfer", section 5.1 (lumped capacitance).

A `Phase` holds until one of its ends: a level of charge at which the next phase begins. Pure.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from firmware_sim.profiles.hardware_profile import HardwareProfile

HOUR_S = 3_600.0
_MONTH_S = 30 * 86_400.0


class Surroundings(NamedTuple):
    """What of a wearer's situation the physics depends on.

    Args:
        on_charger: whether the charger is connected.
        cold: out of doors in winter.
    """

    on_charger: bool
    cold: bool


class Phase(NamedTuple):
    """A stretch in which one formula holds.

    Args:
        mwh_per_s: change of charge, where it is linear.
        tau_s: time constant of the approach to full; 0 where the change is linear.
        until_mwh: level at which the phase ends; None if no level ends it.
        settled_celsius: where temperature goes.
    """

    mwh_per_s: float
    tau_s: float
    until_mwh: float | None
    settled_celsius: float


class Physics:
    """A profile's constants, per second and in milliwatt hours.

    Args:
        profile: of the device.
    """

    def __init__(self, profile: HardwareProfile) -> None:
        battery, thermal = profile.battery, profile.thermal
        self.has_battery = battery is not None
        self.ambient_celsius, self.worn_celsius = thermal.ambient_celsius, thermal.worn_celsius
        self.charging_celsius, self.winter_drop = thermal.charging_celsius, thermal.winter_drop_kelvin
        self.thermal_tau_s, self.kelvin_per_watt = thermal.time_constant_s, thermal.resistance_kelvin_per_watt
        self.capacity_mwh = self.background = self.self_discharge = self.charge = self.taper_mwh = 0.0
        self.tau_s = self.restart_mwh = self.cold_floor_mwh = 0.0
        if battery is not None:
            self.capacity_mwh = battery.capacity_mwh
            self.background = battery.background_mw / HOUR_S
            self.self_discharge = battery.capacity_mwh * battery.self_discharge_percent_per_month / 100 / _MONTH_S
            self.charge = battery.charge_mw / HOUR_S
            self.taper_mwh = battery.taper_fraction * battery.capacity_mwh
            self.tau_s = (self.capacity_mwh - self.taper_mwh) / self.charge
            self.restart_mwh = battery.restart_fraction * battery.capacity_mwh
            self.cold_floor_mwh = battery.winter_loss_fraction * battery.capacity_mwh

    def floor_mwh(self, around: Surroundings) -> float:
        """Charge that the battery does not give."""
        return self.cold_floor_mwh if around.cold and not around.on_charger else 0.0

    def is_on(self, mwh: float, around: Surroundings, *, was_on: bool) -> bool:
        """Whether it runs from now on: an empty one stops, and starts again on its charger only."""
        if not self.has_battery:
            return True
        if was_on:
            return around.on_charger or mwh > self.floor_mwh(around)
        return around.on_charger and mwh >= self.restart_mwh

    def phase(self, mwh: float, around: Surroundings, *, on: bool) -> Phase:
        """What holds now.

        Args:
            mwh: charge.
            around: see there.
            on: of `is_on` at this charge.
        """
        if not self.has_battery:
            return Phase(0.0, 0.0, None, self.ambient_celsius)
        if not around.on_charger:
            settled = self.worn_celsius - self.winter_drop * around.cold
            if on:
                return Phase(-self.background - self.self_discharge, 0.0, self.floor_mwh(around), settled)
            return Phase(-self.self_discharge if mwh > 0 else 0.0, 0.0, 0.0 if mwh > 0 else None, settled)
        restart = self.restart_mwh if not on and mwh < self.restart_mwh else None
        if mwh < self.taper_mwh:
            until = self.taper_mwh if restart is None else min(restart, self.taper_mwh)
            return Phase(self.charge, 0.0, until, self.charging_celsius)
        return Phase(0.0, self.tau_s, restart, self.ambient_celsius)

    def time_to_mwh(self, mwh: float, phase: Phase, level: float) -> float:
        """Seconds until the charge is at a level, infinity if this phase does not lead there."""
        if phase.tau_s:
            return (
                phase.tau_s * math.log((self.capacity_mwh - mwh) / (self.capacity_mwh - level))
                if (mwh < level < self.capacity_mwh)
                else math.inf
            )
        ahead = level - mwh
        return ahead / phase.mwh_per_s if ahead * phase.mwh_per_s > 0 else math.inf

    def time_to_celsius(self, celsius: float, phase: Phase, level: float) -> float:
        """Seconds until the temperature is at a level, infinity if this phase does not lead there."""
        ahead, from_here = level - phase.settled_celsius, celsius - phase.settled_celsius
        # Between here and where it settles, and not yet there.
        if ahead * from_here <= 0 or abs(from_here) <= abs(ahead):
            return math.inf
        return self.thermal_tau_s * math.log(from_here / ahead)

    def mwh_after(self, mwh: float, phase: Phase, seconds: float) -> float:
        """Charge after a part of the phase."""
        if phase.tau_s:
            return self.capacity_mwh - (self.capacity_mwh - mwh) * math.exp(-seconds / phase.tau_s)
        return mwh + phase.mwh_per_s * seconds

    def celsius_after(self, celsius: float, phase: Phase, seconds: float) -> float:
        """Temperature after a part of the phase."""
        settled = phase.settled_celsius
        return settled + (celsius - settled) * math.exp(-seconds / self.thermal_tau_s)

    def percent(self, mwh: float, around: Surroundings) -> float:
        """Charge as a share of what the battery can give, 0 to 100."""
        floor = self.floor_mwh(around)
        return min(100.0, max(0.0, 100.0 * (mwh - floor) / (self.capacity_mwh - floor)))

    def mwh_at(self, percent: float, around: Surroundings) -> float:
        """The inverse of `percent`."""
        floor = self.floor_mwh(around)
        return floor + percent / 100 * (self.capacity_mwh - floor)

    def warming(self, joules: float, seconds: float) -> float:
        """Kelvin that work adds by its end, done evenly in so many seconds."""
        tau_s = self.thermal_tau_s
        per_joule = -math.expm1(-seconds / tau_s) / seconds if seconds > 0 else 1 / tau_s
        return self.kelvin_per_watt * joules * per_joule


@cache
def physics_of(profile: HardwareProfile) -> Physics:
    """A profile's constants, once for all its devices."""
    return Physics(profile)
