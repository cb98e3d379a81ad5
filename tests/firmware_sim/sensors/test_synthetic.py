"""Synthetic persons: learnable, and each somebody else."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from device_client.training import Records
from firmware_sim.errors import SettingsError
from firmware_sim.sensors.assembly import make_sensor, sensors_config
from firmware_sim.sensors.diary import DAY_S, Diary
from firmware_sim.sensors.synthetic import SyntheticSensor
from firmware_sim.sensors.wearer import Variation
from fl_protocol.model_manifest import BundleManifest
from tests.firmware_sim.sensors.conftest import MakeSensor, manifest_of

PERSONS, DAYS = 30, 2
NOTHING = Variation(**dict.fromkeys(Variation.__struct_fields__, 0.0))


def features(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean, and power in each of the lowest frequencies, of every channel: [n, features]."""
    power = np.abs(np.fft.rfft(x - x.mean(axis=1, keepdims=True), axis=1))[:, 1:16]
    return np.concatenate([x.mean(axis=1), np.log(power + 1.0).reshape(len(x), -1)], axis=1)


def accuracy(trained: Records, tested: Records) -> float:
    """Of telling windows by ridge regression on standardised features."""
    one, other = features(trained.x), features(tested.x)
    mean, deviation = one.mean(axis=0), one.std(axis=0) + 1e-9
    one, other = (one - mean) / deviation, (other - mean) / deviation
    weights = np.linalg.solve(one.T @ one + 10.0 * np.eye(one.shape[1]), one.T @ (np.eye(7)[trained.y] - 1 / 7))
    return float(((other @ weights).argmax(axis=1) == tested.y).mean())


def fleet(sensor_of: MakeSensor, **table: object) -> Records:
    sensor = sensor_of(kind="synthetic", **table)
    parts = [sensor.records(device, 0.0, DAYS * DAY_S) for device in range(PERSONS)]
    return Records(np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts]))


def test_what_is_learned_from_some_persons_holds_for_others(sensor_of: MakeSensor) -> None:
    """Chance is 1/7; asked for: 40 points above it, and with labels that say nothing within 10 points of chance.

    The seeds are fixed, so the test gives the same numbers in every run.
    """
    unseen = sensor_of(kind="synthetic").held_out(400)
    assert accuracy(fleet(sensor_of), unseen) > 1 / 7 + 0.4
    assert abs(accuracy(fleet(sensor_of, label_noise=6 / 7), unseen) - 1 / 7) < 0.1


def windows_by_person(variation: Variation, manifest: BundleManifest) -> list[NDArray[np.float64]]:
    """Features of each person's windows of label 2."""
    sensor = SyntheticSensor(manifest.input, Diary(1, 7, 60.0), variation)
    told = [sensor.records(device, 0.0, DAY_S) for device in range(PERSONS)]
    return [features(one.x[one.y == 2]) for one in told]


def between_over_within(persons: list[NDArray[np.float64]]) -> float:
    """Variance of the persons' means over that of a person's windows, summed over features."""
    between = np.stack([one.mean(axis=0) for one in persons]).var(axis=0).sum()
    return float(between / np.mean([one.var(axis=0).sum() for one in persons]))


def test_a_person_differs_less_from_themselves_than_from_others(manifest: BundleManifest) -> None:
    assert between_over_within(windows_by_person(Variation(), manifest)) > 1
    assert between_over_within(windows_by_person(NOTHING, manifest)) < 0.5  # identical ones would be noticed


def test_motions_of_a_label_are_the_same_in_every_run(sensor_of: MakeSensor) -> None:
    assert accuracy(fleet(sensor_of), sensor_of(2, kind="synthetic").held_out(400)) > 1 / 7 + 0.4


def test_a_watch_at_rest_measures_one_g(manifest: BundleManifest) -> None:
    sensor = SyntheticSensor(manifest.input, Diary(1, 7, 20.0), NOTHING)
    np.testing.assert_allclose(np.linalg.norm(sensor._motions.posture[:, :3], axis=1), 1.0)
    assert (sensor._motions.posture[:, 3:] == 0).all()


def test_persons_of_the_test_set_are_on_no_device_and_know_every_label_equally(sensor_of: MakeSensor) -> None:
    unseen = sensor_of(kind="synthetic").held_out(140)
    assert np.bincount(unseen.y).tolist() == [20] * 7
    known = {window.tobytes() for window in fleet(sensor_of).x}
    assert not known & {window.tobytes() for window in unseen.x}


def test_other_models_over_time_are_served_and_the_rest_refused() -> None:
    config = sensors_config({"kind": "synthetic"})
    records = make_sensor(config, manifest_of("ecg_beat"), 1).records(0, 0.0, DAY_S)
    assert records.x.shape[1:] == (187, 1)
    assert set(records.y.tolist()) <= set(range(5))
    for model in ("image_cnn", "ppg_heart_rate", "autoencoder"):
        with pytest.raises(SettingsError, match="tells classes apart; this one takes"):
            make_sensor(config, manifest_of(model), 1)
