"""Checks of what the wearer decides: which studies are granted, and whether the conditions let the device train."""

from __future__ import annotations

from collections.abc import Sequence

from device_client.checks.findings import Result, ok, warning
from device_client.eligibility import Blocked, Conditions


def check_consent(study: str, reason: str) -> Result:
    """Whether a study is granted; `reason` says why it may not run, empty if it may."""
    if not reason:
        return ok("granted by the wearer")
    return warning(reason, f"read covey-device consent list; to agree: covey-device consent grant {study}")


def check_conditions(conditions: Conditions, blocked: Sequence[Blocked]) -> Result:
    """What the sensors say, and what would keep the device from training now."""
    text = ", ".join(_readings(conditions))
    if conditions.broken:
        broken = "; ".join(one.cause for one in conditions.broken)
        return warning(f"{text}; a sensor does not answer: {broken}", "choose another source in [board]")
    if blocked:
        return ok(f"{text}; would not train now: {'; '.join(one.reason for one in blocked)}")
    return ok(f"{text}; may train now")


def _readings(conditions: Conditions) -> list[str]:
    """Every reading in words; a rule whose reading is missing holds nothing up."""
    battery, celsius = conditions.battery_percent, conditions.temperature_celsius
    return [
        "no battery" if battery is None else f"battery {battery:g} %",
        _switch(conditions.charging, "on the charger", "not on the charger", "charger unknown"),
        _switch(conditions.idle, "idle", "in use", "use unknown"),
        _switch(conditions.unmetered, "network unmetered", "network metered", "network's cost unknown"),
        "no temperature" if celsius is None else f"{celsius:.1f} °C",
    ]


def _switch(value: bool | None, yes: str, no: str, unknown: str) -> str:
    return unknown if value is None else yes if value else no
