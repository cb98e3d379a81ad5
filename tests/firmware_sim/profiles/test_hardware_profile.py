"""The profiles that come with covey, and what a wrong one is answered."""

from __future__ import annotations

import re

import msgspec
import pytest

from firmware_sim.errors import ProfileError
from firmware_sim.profiles.catalogue import FOLDER, load_profile, profile_names
from firmware_sim.profiles.hardware_profile import Job, Resident, read_profile

SHIPPED = (
    "esp32_gateway",
    "phone_fast",
    "phone_midrange",
    "raspberry_pi_4",
    "raspberry_pi_5",
    "raspberry_pi_zero_2_w",
    "smartwatch",
)
WATCH = (FOLDER / "smartwatch.toml").read_text()


def test_seven_profiles_are_shipped_and_read() -> None:
    assert profile_names() == SHIPPED
    for name in SHIPPED:
        assert load_profile(name).name == name


def test_what_runs_on_the_mains_is_resident_and_what_is_worn_is_a_job() -> None:
    for name in SHIPPED:
        profile = load_profile(name)
        assert isinstance(profile.residency, Resident if profile.battery is None else Job)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_figure_stands_below_a_comment_that_says_where_it_is_from(name: str) -> None:
    sourced = False
    for line in (FOLDER / f"{name}.toml").read_text().splitlines():
        if line.startswith("#"):
            sourced = True
        elif not line or line.startswith("["):
            sourced = False
        elif re.search(r"= *[-\d]", line):
            assert sourced or line in TOGETHER, line


TOGETHER = ("winter_drop_kelvin = 0.0", "wake_joule = 0.0", "loss = 0.0001")
"""Nothing, or nearly: wired lines and the mains."""


def test_the_faster_kind_is_faster_and_the_larger_battery_larger() -> None:
    speed = {name: load_profile(name).processor.flop_per_s for name in SHIPPED}
    order = ["esp32_gateway", "raspberry_pi_zero_2_w", "raspberry_pi_4", "raspberry_pi_5", "phone_fast"]
    assert [speed[name] for name in order] == sorted(speed[name] for name in order)
    assert speed["phone_midrange"] < speed["phone_fast"]


@pytest.mark.parametrize(
    ("wrong", "right", "expected"),
    [
        ("capacity_mwh", "capacity_mah", r"unknown field `capacity_mah`.*battery.*capacity_mwh"),
        ("capacity_mwh = 1390.0\n", "", r"missing required field `capacity_mwh`.*the keys of \$\.battery are"),
        ("capacity_mwh = 1390.0", "capacity_mwh = 0.0", r"> 0.*battery\.capacity_mwh"),
        ("taper_fraction = 0.8", "taper_fraction = 1.0", r"< 1.*battery\.taper_fraction"),
        ('kind = "job"', 'kind = "sometimes"', r"sometimes"),
        ("throttle_end_celsius = 45.0", "throttle_end_celsius = 40.0", r"less than throttle_end_celsius"),
        ("[battery]", "[battery", r"smartwatch"),
    ],
)
def test_a_wrong_key_is_named_with_what_is_allowed(wrong: str, right: str, expected: str) -> None:
    assert wrong in WATCH
    with pytest.raises(ProfileError, match=expected):
        read_profile(WATCH.replace(wrong, right, 1).encode(), where="smartwatch.toml")


def test_a_profile_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(ProfileError, match="raspberry_pi_4"):
        load_profile("raspberry_pi_6")


def test_a_profile_survives_being_written() -> None:
    for name in SHIPPED:
        profile = load_profile(name)
        assert read_profile(msgspec.toml.encode(profile), where=name) == profile
