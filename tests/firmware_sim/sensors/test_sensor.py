"""What holds for every sensor and every wrapper: seeds, order, time, shapes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from device_client.training import Records
from firmware_sim.sensors import draws
from firmware_sim.sensors.diary import DAY_S
from firmware_sim.sensors.label_noise import symmetric
from firmware_sim.sensors.sensor import Sensor
from tests.enrolments import broken_copy
from tests.firmware_sim.sensors.conftest import MakeSensor

EVERYTHING = {
    "windows_per_day": 12,
    "dirichlet_alpha": 0.5,
    "label_noise": 0.3,
    "drift": [
        {"form": "linear", "begins_day": 0, "ends_day": 2, "turn_degrees": 40, "amplitude": 1.5},
        {"form": "jump", "begins_day": 1.5, "turn_degrees": 90},
    ],
    "season": {"period_days": 2, "strength": 2},
}
KINDS = ["replay", "synthetic"]
DEVICES = (0, 3, 17, 40)


def same(one: Records, other: Records) -> bool:
    return one.x.tobytes() == other.x.tobytes() and one.y.tobytes() == other.y.tobytes()


def check_bytes_depend_on_seed_and_device_alone(first: Sensor, second: Sensor) -> None:
    """Ask two sensors that should be the same in another order, and with time cut otherwise."""
    asked = {device: first.records(device, 0.0, 2 * DAY_S) for device in DEVICES}
    for device in reversed(DEVICES):
        cuts = [0.0, 10 * 3600.0, 10.5 * 3600.0, DAY_S, 1.4 * DAY_S, 2 * DAY_S]
        parts = [second.records(device, start, end) for start, end in itertools.pairwise(cuts)]
        whole = Records(np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts]))
        assert len(whole) > 4
        assert same(asked[device], whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bytes_in_any_order_and_however_time_is_cut(
    kind: str, sensor_of: MakeSensor
) -> None:
    check_bytes_depend_on_seed_and_device_alone(sensor_of(kind=kind, **EVERYTHING), sensor_of(kind=kind, **EVERYTHING))


def test_a_wrapper_that_draws_in_the_order_of_questions_is_noticed(sensor_of: MakeSensor) -> None:
    broken = broken_copy(
        "firmware_sim.sensors.label_noise",
        ("stream(self.seed, Purpose.WRONG_LABEL, device, moment).random()", "_SHARED.random()"),
        ("@dataclass(frozen=True)", "_SHARED = np.random.default_rng(1)\n\n\n@dataclass(frozen=True)"),
    )
    plain, noise = sensor_of(kind="synthetic", windows_per_day=12), symmetric(7, 0.3)
    with pytest.raises(AssertionError):
        check_bytes_depend_on_seed_and_device_alone(
            broken.LabelNoise(plain, noise, 1), broken.LabelNoise(plain, noise, 1)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_devices_differ(kind: str, sensor_of: MakeSensor) -> None:
    sensor = sensor_of(kind=kind)
    first = sensor.records(20, 0.0, DAY_S)
    assert not same(first, sensor.records(36, 0.0, DAY_S))  # of the same wrist when replayed
    assert not same(first, sensor_of(2, kind=kind).records(20, 0.0, DAY_S))


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_what_the_model_takes_and_in_the_time_asked_for(kind: str, sensor_of: MakeSensor) -> None:
    sensor = sensor_of(kind=kind, **EVERYTHING)
    told = sensor.recorded(21, 0.4 * DAY_S, 1.6 * DAY_S)
    assert told.records.x.shape == (len(told.at_s), 128, 6)
    assert told.records.x.dtype == np.float32
    assert told.records.y.dtype == np.int32
    assert np.isfinite(told.records.x).all()
    assert set(told.records.y.tolist()) <= set(range(7))
    assert (np.diff(told.at_s) > 0).all()
    assert 0.4 * DAY_S <= told.at_s[0] <= told.at_s[-1] < 1.6 * DAY_S


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_a_time_in_which_nobody_is_awake_has_no_records_of_the_right_shape(kind: str, sensor_of: MakeSensor) -> None:
    for start, end in ((0.0, 6 * 3600.0), (5.0, 5.0), (-DAY_S, 0.0)):
        records = sensor_of(kind=kind, label_noise=0.5 if kind != "none" else 0.0).records(3, start, end)
        assert records.x.shape == (0, 128, 6)
        assert (records.x.dtype, records.y.dtype) == (np.float32, np.int32)


def test_none_gives_nothing(sensor_of: MakeSensor) -> None:
    assert len(sensor_of(kind="none").records(0, 0.0, 1000 * DAY_S)) == len(sensor_of(kind="none").held_out(5)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_test_set_is_the_same_each_time_and_has_neither_noise_nor_drift(kind: str, sensor_of: MakeSensor) -> None:
    clean, spoilt = sensor_of(kind=kind).held_out(100), sensor_of(kind=kind, **EVERYTHING).held_out(100)
    assert len(clean) == 100
    assert same(clean, spoilt)
    assert set(clean.y.tolist()) == set(range(7))


def test_streams_of_different_purposes_differ() -> None:
    numbers = {draws.stream(1, purpose, 5, 6).random() for purpose in draws.Purpose}
    assert len(numbers) == len(draws.Purpose)
