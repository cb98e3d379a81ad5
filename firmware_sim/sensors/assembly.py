"""From a scenario's ``[sensors]`` to a sensor; the only part that reads files (the recordings)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from firmware_sim.errors import SettingsError
from firmware_sim.sensors.config import SensorsConfig
from firmware_sim.sensors.diary import DAY_S, Diary
from firmware_sim.sensors.drift import Drift
from firmware_sim.sensors.label_noise import LabelNoise, symmetric
from firmware_sim.sensors.replay import ReplaySensor, require_replayable
from firmware_sim.sensors.sensor import NoSensor, Sensor
from firmware_sim.sensors.synthetic import SyntheticSensor, require_synthesisable
from firmware_sim.watch_data import default_cache, load_recordings
from fl_protocol.model_manifest import BundleManifest

HELD_OUT = (9, 10)
_AT = re.compile(r"^(.*) - at `\$([^`]*)`$", re.DOTALL)
_OWN = re.compile(r"^([a-z_]+): ")


def sensors_config(table: Mapping[str, Any]) -> SensorsConfig:
    """What a scenario's table ``[sensors]`` says.

    Raises:
        SettingsError: the text names the key, the value and what is allowed.
    """
    try:
        return msgspec.convert(table, SensorsConfig)
    except msgspec.ValidationError as error:
        raise SettingsError(_said(str(error))) from error


def make_sensor(config: SensorsConfig, manifest: BundleManifest, seed: int, *, cache: Path | None = None) -> Sensor:
    """The sensor of a fleet.

    Args:
        config: the table.
        manifest: of the model that is trained.
        seed: of the run, at least 0.
        cache: folder of the converted recordings; without it, where `load_recordings` keeps them.

    Raises:
        SettingsError: sensor and model do not fit each other.
        FleetError: the recordings cannot be read.
    """
    if config.kind == "none":
        return NoSensor(manifest.input.shape)
    sensor = _people(config, manifest, seed, cache or default_cache())
    for drift in config.drift:
        begins_s = drift.begins_day * DAY_S
        ends_s = begins_s if drift.ends_day is None else drift.ends_day * DAY_S
        sensor = Drift(sensor, seed, begins_s, ends_s, turn_degrees=drift.turn_degrees, amplitude=drift.amplitude)
    return _mislabelled(sensor, config, len(manifest.label.names), seed)


def _people(config: SensorsConfig, manifest: BundleManifest, seed: int, cache: Path) -> Sensor:
    """Who records, and what."""
    diary = Diary(
        seed,
        len(manifest.label.names),
        config.windows_per_day,
        spread=config.windows_spread,
        alpha=config.dirichlet_alpha,
        season_days=config.season.period_days if config.season else 365.0,
        season_strength=config.season.strength if config.season else 0.0,
    )
    if config.kind == "synthetic":
        require_synthesisable(manifest)
        return SyntheticSensor(manifest.input, diary, config.variation)
    held_out = HELD_OUT if config.held_out is None else config.held_out
    require_replayable(manifest, held_out)
    return ReplaySensor(load_recordings(cache), manifest.input, diary, held_out, config.variation)


def _mislabelled(sensor: Sensor, config: SensorsConfig, labels: int, seed: int) -> Sensor:
    """With wrong labels, if there are to be any."""
    if config.confusion is not None:
        if len(config.confusion) != labels:
            raise SettingsError(
                f"sensors.confusion: expected {labels} rows, one for each label, got {len(config.confusion)}"
            )
        return LabelNoise(sensor, np.array(config.confusion), seed)
    return LabelNoise(sensor, symmetric(labels, config.label_noise), seed) if config.label_noise else sensor


def _said(message: str) -> str:
    """An error of msgspec with the key and the value."""
    found = _AT.match(message)
    what, inside = (found[1], found[2]) if found else (message, "")
    unknown = re.match(r"Object contains unknown field `([^`]+)`", what)
    path = inside.strip(".")
    if unknown:
        known = ", ".join(_keys_at(path))
        return f"sensors{inside}.{unknown[1]}: there is no such key; expected one of {known}"
    if own := _OWN.match(what):  # of a __post_init__, for which msgspec names the table only
        return f"sensors{inside}.{what}" if own[1] in _keys_at(path) else f"sensors{inside}: {what}"
    if "enum value" in what:
        what = f"{what}, expected one of {', '.join(sorted(_choices_at(path)))}"
    return f"sensors{inside}: {what[:1].lower()}{what[1:]}"


def _keys_at(path: str) -> list[str]:
    """The keys of a table below ``[sensors]``."""
    return sorted(field.encode_name for field in _type_at(path).fields)


def _choices_at(path: str) -> tuple[str, ...]:
    """The values that a key may have which has a few."""
    choices: tuple[str, ...] = _type_at(path).values
    return choices


def _type_at(path: str) -> Any:
    """The description, of msgspec, of what is at a path such as ``drift[0].amplitude``."""
    info: Any = msgspec.inspect.type_info(SensorsConfig)
    for name in filter(None, re.sub(r"\[[^]]*\]", "", path).split(".")):
        info = next(field.type for field in info.fields if field.encode_name == name)
        if isinstance(info, msgspec.inspect.UnionType):
            info = next(one for one in info.types if isinstance(one, msgspec.inspect.StructType))
        info = getattr(info, "item_type", info)
    return info
