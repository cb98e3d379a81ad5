"""Replayed people: whose windows they are, and what is varied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from firmware_sim.errors import SettingsError
from firmware_sim.sensors.assembly import make_sensor, sensors_config
from firmware_sim.sensors.diary import DAY_S, Diary
from firmware_sim.sensors.replay import ReplaySensor
from firmware_sim.sensors.wearer import Variation, straight_wearer, warped_time, wearer_of
from firmware_sim.watch_data import Recording, Wrist, all_wrists, windows_of
from fl_protocol.model_manifest import BundleManifest
from tests.enrolments import broken_copy
from tests.firmware_sim.sensors.conftest import MakeSensor, manifest_of

NOTHING = Variation(**dict.fromkeys(Variation.__struct_fields__, 0.0))


def marked(recordings: list[Recording]) -> list[Recording]:
    """Every sample says whose it is."""
    return [Recording(r.wrist, r.label, np.full_like(r.samples, r.wrist.person)) for r in recordings]


def check_nobody_held_out_is_on_a_device(
    kind: type[ReplaySensor], recordings: list[Recording], m: BundleManifest
) -> None:
    sensor = kind(marked(recordings), m.input, Diary(1, 7, 20.0), (3, 10), NOTHING)
    seen = {float(one) for device in range(40) for one in np.unique(sensor.records(device, 0.0, DAY_S).x)}
    assert seen == {1, 2, 4, 5, 6, 7, 8, 9}
    assert set(np.unique(sensor.held_out(1000).x)) == {3, 10}


def test_people_held_out_are_on_no_device_and_everybody_else_is(
    recordings: list[Recording], manifest: BundleManifest
) -> None:
    check_nobody_held_out_is_on_a_device(ReplaySensor, recordings, manifest)


def test_a_fleet_that_replays_everybody_is_noticed(recordings: list[Recording], manifest: BundleManifest) -> None:
    broken = broken_copy(
        "firmware_sim.sensors.replay",
        (
            "wrists = [wrist for wrist in all_wrists() if wrist.person not in self.held_out_people]",
            "wrists = all_wrists()",
        ),
    )
    with pytest.raises(AssertionError):
        check_nobody_held_out_is_on_a_device(broken.ReplaySensor, recordings, manifest)


def test_the_first_device_of_a_wrist_replays_its_samples_as_they_are(
    recordings: list[Recording], sensor_of: MakeSensor
) -> None:
    records = sensor_of(kind="replay").records(1, 0.0, DAY_S)
    assert len(records) > 5
    for x, y in zip(records.x, records.y, strict=True):
        (own,) = [r.samples for r in recordings if r.wrist == all_wrists()[1] and r.label == y]
        # linear interpolation between two neighbouring samples, at the same place between them throughout the window
        middle = own.astype(np.float64)
        distances = np.abs(middle[: len(own) - 127, 0] - x[0, 0])
        starts = [s for s in np.argsort(distances) if s + 129 <= len(own)]
        assert any(_lies_between(middle, s, x) for s in starts)


def _lies_between(samples: np.ndarray, start: int, x: np.ndarray) -> bool:
    left, right = samples[start : start + 128], samples[start + 1 : start + 129]
    step = right - left
    share = ((x - left) * step).sum() / (step * step).sum()
    return bool(-1e-6 <= share <= 1 + 1e-6 and np.abs(left + share * step - x).max() < 1e-4)


def test_the_test_set_is_the_disjoint_windows_of_those_held_out(
    recordings: list[Recording], sensor_of: MakeSensor
) -> None:
    records = sensor_of(kind="replay", held_out=[9]).held_out(10_000)
    expected = [windows_of(recordings, Wrist(9, side), samples=128) for side in ("left", "right")]
    np.testing.assert_array_equal(records.x, np.concatenate([one.x for one in expected]))
    np.testing.assert_array_equal(records.y, np.concatenate([one.y for one in expected]))


# What is varied.


def test_a_straight_wearer_measures_what_there_is(manifest: BundleManifest) -> None:
    motion = np.random.default_rng(1).normal(size=(3, 128, 6))
    measured = straight_wearer(manifest.input).measured(motion, np.zeros((3, 3)), np.ones_like(motion))
    np.testing.assert_allclose(measured, motion, atol=1e-12)
    np.testing.assert_array_equal(
        warped_time(straight_wearer(manifest.input), np.full((1, 2), 0.7), 128)[0], np.arange(128)
    )


def test_a_turned_watch_measures_vectors_of_the_same_length(manifest: BundleManifest) -> None:
    only_turned = Variation(**{name: 0.0 for name in Variation.__struct_fields__ if name != "seat_degrees"})
    motion = np.random.default_rng(1).normal(size=(3, 128, 6))
    wearer = wearer_of(1, 5, only_turned, manifest.input)
    turned = wearer.measured(motion, np.zeros((3, 3)), motion)
    assert np.abs(turned - motion).max() > 0.01
    for axes in (slice(0, 3), slice(3, 6)):
        lengths = [np.linalg.norm(x[:, :, axes], axis=2) for x in (turned, motion)]
        np.testing.assert_allclose(*lengths, rtol=1e-9)
    angle = np.degrees(np.arccos((np.trace(wearer.seat[:3, :3]) - 1) / 2))
    assert 0 < angle <= 20


def test_time_never_runs_backwards_and_goes_at_the_wearers_pace(manifest: BundleManifest) -> None:
    wearer = wearer_of(1, 5, Variation(warp=0.5), manifest.input)
    at = warped_time(wearer, np.random.default_rng(1).random((200, 2)), 128)
    assert (np.diff(at, axis=1) > 0).all()
    assert (at[:, 0] == 0).all()
    np.testing.assert_allclose(at[:, -1].mean() / 127, wearer.pace, rtol=0.02)


def test_lost_samples_repeat_the_last_one_and_only_where_chance_says_so(manifest: BundleManifest) -> None:
    wearer = wearer_of(
        1, 5, Variation(**{**dict.fromkeys(Variation.__struct_fields__, 0.0), "dropout": 0.5}), manifest.input
    )
    motion = np.arange(2 * 128 * 6, dtype=float).reshape(2, 128, 6)
    kept, lossy = wearer.measured(motion, np.array([[0.5, 0.5, 0.5], [0.49, 0.5, 0.5]]), motion)
    np.testing.assert_allclose(kept, motion[0])
    expected = motion[1].copy()
    expected[64:81] = expected[63]  # 1 + half of a quarter of the window
    np.testing.assert_allclose(lossy, expected)


def test_the_fastest_wearer_stays_within_the_recordings(manifest: BundleManifest, cache_home: Path) -> None:
    config = sensors_config({"kind": "replay", "variation": {"pace": 1.0, "warp": 0.5}})
    sensor = make_sensor(config, manifest, 3, cache=cache_home / "covey")
    assert isinstance(sensor, ReplaySensor)
    assert max(sensor.wearer(device).pace for device in range(16, 60)) > 5
    for device in range(16, 60):
        assert np.isfinite(sensor.records(device, 0.0, DAY_S).x).all()


@pytest.mark.parametrize("model", ["ecg_beat", "image_cnn", "ppg_heart_rate"])
def test_a_model_for_other_data_is_refused(model: str, cache_home: Path) -> None:
    with pytest.raises(SettingsError, match="expected a model for windows of 6 channels at 50 Hz with the labels PEN"):
        make_sensor(sensors_config({"kind": "replay"}), manifest_of(model), 1, cache=cache_home / "covey")


@pytest.mark.parametrize("people", [[], [11], list(range(1, 11))])
def test_people_who_do_not_exist_or_are_all_are_refused(people: list[int], sensor_of: MakeSensor) -> None:
    with pytest.raises(SettingsError, match=r"sensors\.held_out: expected some but not all of 1 to 10, got"):
        sensor_of(kind="replay", held_out=people)
