"""Hardware of one's own in a scenario, and what a slow flash does."""

from __future__ import annotations

from pathlib import Path

import pytest

from firmware_sim.fleet.simulation import begin_run
from firmware_sim.profiles.catalogue import FOLDER
from firmware_sim.scenario.loading import load_scenario
from fl_protocol.errors import ConfigError
from tests.firmware_sim.fleet.small_fleets import HARDWARE, Ran, ran, scenario_file

SPEED = "write_bytes_per_s = "


def own_profile(folder: Path, *, bytes_per_s: float, name: str = "our_pi") -> None:
    """A Raspberry Pi whose flash is as fast as that, in the folder `mine`."""
    lines = (FOLDER / "raspberry_pi_zero_2_w.toml").read_text().splitlines()
    changes = {"name = ": f'name = "{name}"', SPEED: f"{SPEED}{bytes_per_s}"}
    changed = [next((new for old, new in changes.items() if line.startswith(old)), line) for line in lines]
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "our_pi.toml").write_text("\n".join(changed))


def ran_on(folder: Path, *, bytes_per_s: float) -> Ran:
    """A fleet of such computers."""
    own_profile(folder, bytes_per_s=bytes_per_s)
    return ran(folder, **{**HARDWARE, "population": {"profiles": {"our_pi": 1}, "own_profiles": "mine"}})


def test_devices_are_of_a_profile_of_ones_own_and_a_slower_flash_delivers_later(tmp_path: Path) -> None:
    fast, slow = (ran_on(tmp_path / name, bytes_per_s=speed) for name, speed in (("fast", 50e6), ("slow", 20e3)))
    first_s = [min(event.time_s for event in left.of("update_delivered")) for left in (fast, slow)]
    assert {event.profile for event in fast.of("update_delivered")} == {"our_pi"}
    # An update is written four pages at least, each of which takes a fifth of a second at 20 kB/s.
    assert first_s[1] > first_s[0] + 4 * 4096 / 20e3
    assert fast.count("round_committed") == slow.count("round_committed") == 6


def test_a_run_keeps_copies_of_its_profiles(tmp_path: Path) -> None:
    own_profile(tmp_path / "here", bytes_per_s=1e6)
    population = {"profiles": {"our_pi": 1, "smartwatch": 1}, "own_profiles": "mine"}
    loaded = load_scenario(scenario_file(tmp_path / "here", population=population))
    begun = begin_run(tmp_path / "run", loaded)
    (tmp_path / "here" / "mine" / "our_pi.toml").unlink()
    assert begun.profiles == load_scenario(begun.path).profiles == loaded.profiles


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name = 1", "Expected `str`"),
        ('name = "our_pi"\nspeed = 3', "the keys of $ are name, title"),
        (None, "expected the name 'our_pi', as the file is called, got 'another'"),
    ],
)
def test_a_wrong_profile_is_told_with_its_file(tmp_path: Path, text: str | None, told: str) -> None:
    own_profile(tmp_path, bytes_per_s=1e6, name="another")
    if text is not None:
        (tmp_path / "mine" / "our_pi.toml").write_text(text)
    path = scenario_file(tmp_path, population={"profiles": {"our_pi": 1}, "own_profiles": "mine"})
    with pytest.raises(ConfigError) as raised:
        load_scenario(path)
    assert told in str(raised.value)
    assert "our_pi.toml" in str(raised.value)
    assert "population.profiles.our_pi" in str(raised.value)
