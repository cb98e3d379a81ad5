"""A model's manifest and sensors of each kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from firmware_sim.bundles import bundle_and_publisher
from firmware_sim.sensors.assembly import make_sensor, sensors_config
from firmware_sim.sensors.sensor import Sensor
from fl_protocol.bundle import open_bundle
from fl_protocol.model_manifest import BundleManifest
from fl_protocol.signing import public_key_from_hex

MakeSensor = Callable[..., Sensor]


def manifest_of(model: str) -> BundleManifest:
    path, publisher = bundle_and_publisher(model)
    return open_bundle(path.read_bytes(), publisher=public_key_from_hex(publisher)).manifest


@pytest.fixture(scope="session")
def manifest() -> BundleManifest:
    return manifest_of("watch_features")


@pytest.fixture(scope="session")
def sensor_of(manifest: BundleManifest, cache_home: Path) -> MakeSensor:
    """Makes a sensor from the keys of ``[sensors]``."""

    def make(seed: int = 1, **table: object) -> Sensor:
        return make_sensor(sensors_config(table), manifest, seed, cache=cache_home / "covey")

    return make
