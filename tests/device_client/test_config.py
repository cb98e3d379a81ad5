"""``device.toml``: what is documented is read, everything else is refused by name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_client import config as module
from device_client.config import DeviceConfig, EligibilityConfig, StudyConfig
from fl_protocol.adapters.config_files import load_toml
from fl_protocol.errors import ConfigError
from tests.device_client.one_device import OneDevice

WHOLE = """
[device]
store = "store"
store_key = "credential:key"
counter = "/boot/covey.counter"
control_socket = "/run/covey.sock"
maximum_outbox_bytes = 1000000

[[study]]
tenant = "clinic"
task = "watch"
broker = { host = "broker.example", port = 8883 }
bundle = "watch.covey"
publisher_key = "aa"
aggregator_key = "bb"
minimum_bundle_version = 3
role = "evaluate"
stream = "wrist"
epsilon = 1.5
tags = ["imu", "left-wrist"]

[privacy]
epsilon = 3.0
delta = 1e-5
period_days = 30
minimum_noise_multiplier = 1.0
minimum_cohort = 8
maximum_l2_norm_clip = 1.0

[eligibility]
minimum_battery_percent = 50
charging_lifts_battery_floor = true
require_charging = true
require_idle = false
require_unmetered = false
maximum_temperature_celsius = 40
windows = ["22:00-06:00", "12:00-13:00"]
minimum_new_records = 10
new_records_noise = 20
minimum_separation_hours = 12

[board]
battery = "BAT0"
thermal_zone = "none"
network = "metered"
idle = "idle"
idle_load = 0.2

[records]
maximum_count = 100
maximum_age_days = 30
held_out_fraction = 0.1
ingest_socket = "in.sock"
ingest_group = "sensors"
"""


def test_a_whole_file_is_read_and_written_back(tmp_path: Path) -> None:
    path = tmp_path / "device.toml"
    path.write_text(WHOLE)
    config = load_toml(path, DeviceConfig)
    assert config.studies[0].study == "clinic/watch"
    assert config.studies[0].tags == ("imu", "left-wrist")
    assert config.eligibility.windows == ("22:00-06:00", "12:00-13:00")
    assert config.records.ingest_group == "sensors"
    path.write_bytes(msgspec.toml.encode(config))
    assert load_toml(path, DeviceConfig) == config


def test_the_defaults_are_androids_conditions() -> None:
    assert EligibilityConfig() == EligibilityConfig(
        minimum_battery_percent=30.0, require_idle=True, require_unmetered=True, require_charging=False
    )


@pytest.mark.parametrize("name", ["DeviceSection", "StudyConfig", "PrivacyConfig", "EligibilityConfig"])
def test_every_key_is_documented(name: str) -> None:
    kind = getattr(module, name)
    text = inspect.getdoc(kind) or ""
    for key in kind.__struct_fields__:
        assert re.search(rf"^ +(\w+, )*{key}(, \w+)*:", text, re.M), f"{name}.{key} is not documented"


KEYS = ["aa" * 32, "bb" * 32, "cc" * 32]


def with_publishers(tmp_path: Path, lines: str) -> StudyConfig:
    path = tmp_path / "device.toml"
    path.write_text(WHOLE.replace('publisher_key = "aa"', lines))
    return load_toml(path, DeviceConfig).studies[0]


def test_several_publishers_are_read_and_written_back(tmp_path: Path) -> None:
    study = with_publishers(tmp_path, f"publishers = {KEYS}\npublisher_threshold = 2")
    assert (study.publisher_key, study.publisher_pins) == (None, (tuple(KEYS), 2))
    assert msgspec.toml.decode(msgspec.toml.encode(study), type=StudyConfig) == study
    assert with_publishers(tmp_path, 'publisher_key = "AA"').publisher_pins == (("aa",), 1)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "expected publisher_key, or publishers with publisher_threshold, got neither"),
        (f"publishers = {KEYS}", "publisher_threshold: expected how many of the 3 publishers"),
        (f"publishers = {KEYS}\npublisher_threshold = 0", "expected 1 to 3"),
        (f"publishers = {KEYS}\npublisher_threshold = 4", "expected 1 to 3"),
        (f"publishers = {KEYS}\npublisher_threshold = 1.5", "publisher_threshold"),
        (f"publishers = {[*KEYS, KEYS[0].upper()]}\npublisher_threshold = 2", "each key once"),
        (f"publishers = {[f'{n:064x}' for n in range(17)]}\npublisher_threshold = 2", "1 to 16 keys, got 17"),
        (f'publishers = {KEYS}\npublisher_threshold = 2\npublisher_key = "aa"', "got both"),
        ('publisher_key = "aa"\npublisher_threshold = 1', "publisher_threshold: goes with publishers"),
        ("publishers = []\npublisher_threshold = 1", "got neither"),
    ],
)
def test_publishers_that_cannot_be_are_refused_by_the_name_of_the_key(tmp_path: Path, lines: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        with_publishers(tmp_path, lines)


@pytest.mark.parametrize("tags", ['["IMU"]', '[""]', '"imu"', "[1]", f"{[f'tag-{n}' for n in range(65)]}"])
def test_tags_are_names_and_not_too_many(tags: str, tmp_path: Path) -> None:
    path = tmp_path / "device.toml"
    path.write_text(WHOLE.replace('["imu", "left-wrist"]', tags))
    with pytest.raises(ConfigError, match="tags"):
        load_toml(path, DeviceConfig)


@given(st.lists(st.sampled_from(WHOLE.splitlines()), max_size=40), st.binary(max_size=40))
def test_whatever_the_file_holds_it_is_read_or_refused(lines: list[str], noise: bytes) -> None:
    try:
        msgspec.toml.decode("\n".join(lines).encode() + noise, type=DeviceConfig)
    except (msgspec.DecodeError, UnicodeDecodeError):  # what `load_toml` turns into ConfigError
        return


def test_studies_are_named_whole_or_by_a_task_that_only_one_has() -> None:
    config = OneDevice(tasks=("watch", "steps")).config()
    assert config.study_named("steps").study == config.study_named("clinic/steps").study == "clinic/steps"
    for name in (None, "", "dance", "clinic"):
        with pytest.raises(ConfigError, match=r"expected .*one of clinic/watch, clinic/steps"):
            config.study_named(name)
    twice = msgspec.structs.replace(
        config, studies=(config.studies[0], msgspec.structs.replace(config.studies[0], tenant="other"))
    )
    with pytest.raises(ConfigError, match="one of clinic/watch, other/watch"):
        twice.study_named("watch")
    assert OneDevice().config().study_named(None).study == "clinic/watch"
