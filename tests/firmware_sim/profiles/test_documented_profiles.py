"""The table of docs/simulation-hardware.md says what the profiles say."""

from __future__ import annotations

from pathlib import Path

import pytest

from firmware_sim.profiles.catalogue import load_profile, profile_names

DOCUMENT = (Path(__file__).parents[3] / "docs/simulation-hardware.md").read_text()


@pytest.mark.parametrize("name", profile_names())
def test_the_documented_row_is_that_of_the_profile(name: str) -> None:
    profile = load_profile(name)
    battery, heat, processor = profile.battery, profile.thermal, profile.processor
    cells = [
        f"`{name}`",
        "mains" if battery is None else f"{battery.capacity_mwh:g} mWh, {battery.background_mw:g} mW",
        f"{processor.flop_per_s / 1e9:g}",
        f"{processor.joule_per_flop * 1e9:.2g}",
        f"{profile.memory_bytes / 2**20:g}",
        f"{profile.watchdog_timeout_s:g}",
        f"{heat.time_constant_s:g}",
        f"{heat.throttle_start_celsius:g}-{heat.throttle_end_celsius:g} °C × {heat.throttle_factor:g}",
        f"{profile.home.kind} / {profile.away.kind}",
        type(profile.residency).__name__.lower(),
    ]
    assert f"| {' | '.join(cells)} |\n" in DOCUMENT
