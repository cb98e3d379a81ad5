"""Habits, wrong labels, drift: how often, how much, when. Statistical bounds are 5 standard deviations (6e-7 each)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from firmware_sim.sensors.diary import DAY_S, SLEEPS_S, WAKES_S, Diary
from firmware_sim.sensors.drift import Drift
from firmware_sim.sensors.label_noise import LabelNoise, symmetric
from tests.firmware_sim.sensors.conftest import MakeSensor


def test_windows_a_day_are_log_normal_over_wearers_about_the_mean_that_was_asked_for() -> None:
    diary = Diary(1, 7, 40.0, spread=0.5)
    logs = np.log([diary.habits(device)[0] for device in range(4000)])
    assert abs(logs.mean() - (math.log(40) - 0.125)) < 5 * 0.5 / math.sqrt(4000)
    assert abs(logs.std() - 0.5) < 5 * 0.5 / math.sqrt(8000)


def test_a_day_has_a_poisson_number_of_windows_and_none_at_night() -> None:
    at_s = Diary(1, 7, 40.0).entries(3, 0.0, 200 * DAY_S).at_s
    assert abs(len(at_s) - 8000) < 5 * math.sqrt(8000)
    assert (at_s % DAY_S >= WAKES_S).all()
    assert (at_s % DAY_S < SLEEPS_S).all()


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_labels_of_wearers_are_dirichlet(alpha: float) -> None:
    likes = np.stack([Diary(1, 7, 40.0, alpha=alpha).habits(device)[1] for device in range(2000)])
    np.testing.assert_allclose(likes.sum(axis=1), 1)
    # sum of squares: mean (alpha + 1) / (7 alpha + 1), at most 1, so a standard deviation of at most 1/2
    expected = (alpha + 1) / (7 * alpha + 1)
    squares = (likes**2).sum(axis=1)
    assert abs(squares.mean() - expected) < 5 * squares.std() / math.sqrt(2000)


def test_a_wearer_records_the_labels_they_like() -> None:
    diary = Diary(1, 7, 1000.0, alpha=0.5)
    labels = diary.entries(4, 0.0, 10 * DAY_S).label
    share = np.bincount(labels, minlength=7) / len(labels)
    assert np.abs(share - diary.habits(4)[1]).max() < 5 * 0.5 / math.sqrt(len(labels))


def test_each_label_has_its_season() -> None:
    diary = Diary(1, 4, 500.0, season_days=8.0, season_strength=2.0)
    for label in range(4):
        best, worst = (
            diary.entries(0, (8 + day) * DAY_S, (9 + day) * DAY_S).label for day in (2 * label, 2 * label + 4)
        )
        assert (best == label).mean() > 0.4
        assert (worst == label).mean() < 0.1


def test_a_share_of_labels_is_wrong_and_no_window_is_changed(sensor_of: MakeSensor) -> None:
    clean, noisy = (sensor_of(kind="synthetic", windows_per_day=500, windows_spread=0, label_noise=p) for p in (0, 0.3))
    one, other = (sensor.records(2, 0.0, 4 * DAY_S) for sensor in (clean, noisy))
    assert one.x.tobytes() == other.x.tobytes()
    assert abs((one.y != other.y).mean() - 0.3) < 5 * math.sqrt(0.21 / len(one))
    mistaken = other.y[(one.y == 3) & (other.y != 3)]
    assert set(mistaken.tolist()) == {0, 1, 2, 4, 5, 6}


def test_a_confusion_matrix_says_what_is_called_what(sensor_of: MakeSensor) -> None:
    clean = sensor_of(kind="synthetic", windows_per_day=300)
    confusion = np.eye(7)
    confusion[3] = [0, 0.5, 0, 0.5, 0, 0, 0]
    one, other = clean.records(2, 0.0, 4 * DAY_S), LabelNoise(clean, confusion, 1).records(2, 0.0, 4 * DAY_S)
    assert (other.y[one.y != 3] == one.y[one.y != 3]).all()
    called = other.y[one.y == 3]
    assert set(called.tolist()) == {1, 3}
    assert abs((called == 1).mean() - 0.5) < 5 * 0.5 / math.sqrt(len(called))


def test_symmetric_noise_is_a_distribution_for_each_label() -> None:
    noise = symmetric(7, 0.3)
    np.testing.assert_allclose(noise.sum(axis=1), 1)
    np.testing.assert_allclose(np.diag(noise), 0.7)


def test_a_jump_changes_nothing_before_and_everything_after(sensor_of: MakeSensor) -> None:
    plain = sensor_of(kind="synthetic")
    drifted = Drift(plain, 1, DAY_S, DAY_S, turn_degrees=90.0, amplitude=2.0)
    before, same = plain.records(1, 0.0, DAY_S), drifted.records(1, 0.0, DAY_S)
    np.testing.assert_allclose(same.x, before.x, atol=1e-6)
    after, turned = plain.records(1, DAY_S, 2 * DAY_S), drifted.records(1, DAY_S, 2 * DAY_S)
    spread = [np.linalg.norm(x - x.mean(axis=1, keepdims=True), axis=2) for x in (after.x, turned.x)]
    np.testing.assert_allclose(spread[1], 2 * spread[0], rtol=1e-3)
    gravity = [x[:, :, :3].mean(axis=1).astype(np.float64) for x in (after.x, turned.x)]
    np.testing.assert_allclose(*(np.linalg.norm(one, axis=1) for one in gravity), rtol=1e-4)
    assert np.abs(gravity[0] - gravity[1]).max() > 0.2


def test_linear_drift_grows_from_beginning_to_end(sensor_of: MakeSensor) -> None:
    drift = Drift(sensor_of(kind="synthetic"), 1, DAY_S, 3 * DAY_S, amplitude=2.0)
    np.testing.assert_allclose(drift.done(np.array([0, 1, 1.5, 2, 3, 9]) * DAY_S), [0, 0, 0.25, 0.5, 1, 1])
