"""Reading a scenario file: strictly, with the key, the line and what is allowed in every error."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from aggregator.task_file import TaskConfig, read_task
from firmware_sim.attackers.kinds import Attacker, Replay
from firmware_sim.attackers.parsing import parse_attackers, require_possible
from firmware_sim.bundles import bundle_and_publisher
from firmware_sim.errors import FleetError, ProfileError, SettingsError
from firmware_sim.faults.kinds import Fault
from firmware_sim.faults.parsing import parse_faults
from firmware_sim.profiles.catalogue import load_profile
from firmware_sim.profiles.hardware_profile import HardwareProfile, Job
from firmware_sim.scenario.schema import Scenario
from firmware_sim.scenario.telling import placed, said_of, said_of_fault
from firmware_sim.sensors.assembly import make_sensor
from fl_protocol.adapters.config_files import relative_to_config
from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.errors import BundleError, ConfigError, LocalMisuseError
from fl_protocol.signing import public_key_from_hex

SHIPPED = Path(__file__).resolve().parent.parent / "scenarios"
"""The scenarios that come with covey."""
RECORDED = "fleet.json"
"""What a run that has ended leaves, and the fidelity `recorded` plays back."""
TASK = "study"
"""What the scenario's task is called."""


@dataclass(frozen=True)
class LoadedScenario:
    """A scenario and what it names.

    Args:
        path: of its file.
        text: of its file.
        scenario: what the text says.
        bundle_path, publisher_key: of the model.
        bundle: of the model, verified.
        task: the aggregator's.
        faults: that befall the fleet.
        attackers: that are among the devices.
        profiles: hardware and its weights, by name; empty for ideal devices.
    """

    path: Path
    text: str
    scenario: Scenario
    bundle_path: Path
    publisher_key: str
    bundle: ModelBundle
    task: TaskConfig
    faults: tuple[Fault, ...]
    profiles: dict[str, tuple[HardwareProfile, float]]
    attackers: tuple[Attacker, ...] = ()


def load_scenario(path: Path, *, changes: dict[str, Any] | None = None) -> LoadedScenario:
    """Read and check a scenario file.

    Args:
        path: of the file; the name of one that comes with covey will do.
        changes: keys to set instead of the file's, such as ``{"devices": 10}``.

    Raises:
        ConfigError: the file or what it names is missing, or a key is unknown, missing or wrong: the text names the
            key, its line, and what is allowed.
    """
    path = _found(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"scenario {path}: expected a readable TOML file ({error})") from error
    fields = _parsed(path, text)
    fields.update(changes or {})
    scenario = _converted(path, text, fields)
    bundle_path, publisher_key = _bundle_of(path, text, scenario)
    bundle = _opened(path, text, bundle_path, publisher_key)
    task = _task_of(path, text, scenario, bundle_path, publisher_key)
    try:
        faults = parse_faults(scenario.faults)
    except SettingsError as error:
        raise ConfigError(said_of_fault(f"scenario {path}", text, str(error))) from error
    try:
        attackers = parse_attackers(scenario.attackers)
        require_possible(attackers, bundle.manifest)
    except SettingsError as error:
        raise ConfigError(f"scenario {path}: {error}") from error
    profiles = _profiles(path, text, scenario)
    loaded = LoadedScenario(path, text, scenario, bundle_path, publisher_key, bundle, task, faults, profiles, attackers)
    _check_files(loaded)
    return loaded


def _check_files(loaded: LoadedScenario) -> None:
    """Whether what the scenario names beside its model is there, and fits. Raises ConfigError."""
    path, text, scenario = loaded.path, loaded.text, loaded.scenario
    traces, recorded = scenario.population.traces, scenario.recorded
    if traces is not None and not relative_to_config(path, traces).is_file():
        raise _wrong(path, text, ("population", "traces"), f"expected a CSV file, got {traces!r}, which is not there")
    if scenario.rollout is not None and not scenario.population.profiles:
        what = "expected population.profiles beside it; ideal devices have no firmware"
        raise _wrong(path, text, ("rollout",), what)
    if scenario.fidelity == "recorded" and recorded is None:
        raise _wrong(path, text, ("recorded",), "this key is missing; the fidelity recorded plays a run back")
    if recorded is not None and not (relative_to_config(path, recorded) / RECORDED).is_file():
        what = f"expected the folder of a run that has ended, got {recorded!r}, in which there is no {RECORDED}"
        raise _wrong(path, text, ("recorded",), what)
    computing = [one for one in loaded.attackers if not isinstance(one, Replay)]
    if computing and scenario.fidelity != "real":
        kind = str(computing[0].__struct_config__.tag)
        came = f"got {scenario.fidelity}; without tensors there is nothing to attack"
        what = f"expected real with attackers of the kind {kind}, {came}"
        raise _wrong(path, text, ("fidelity",), what)
    if scenario.sensors.kind != "none":
        try:
            make_sensor(scenario.sensors, loaded.bundle.manifest, scenario.seed)
        except SettingsError as error:
            raise _wrong(path, text, ("sensors",), str(error)) from error


def _wrong(path: Path, text: str, key: tuple[str, ...], what: str) -> ConfigError:
    """An error about a key."""
    return ConfigError(placed(f"scenario {path}", text, key, what))


def shipped_scenarios() -> list[Path]:
    """The files of the scenarios that come with covey, by name."""
    return sorted(SHIPPED.glob("*.toml"))


def _found(path: Path) -> Path:
    """The file that is meant."""
    shipped = SHIPPED / f"{path.name.removesuffix('.toml')}.toml"
    if path.exists() or not shipped.exists() or len(path.parts) > 1:
        if not path.exists():
            known = ", ".join(one.stem for one in shipped_scenarios())
            raise ConfigError(f"scenario {path}: there is no such file; expected a path, or one of {known}")
        return path
    return shipped


def _parsed(path: Path, text: str) -> dict[str, Any]:
    """The file's keys. Raises ConfigError, which names line and column."""
    try:
        fields: dict[str, Any] = msgspec.toml.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError(f"scenario {path}: {error}") from error
    begins = fields.get("begins")
    if isinstance(begins, datetime.datetime) and begins.tzinfo is None:
        fields["begins"] = begins.replace(tzinfo=datetime.timezone.utc)
    return fields


def _converted(path: Path, text: str, fields: dict[str, Any]) -> Scenario:
    """The file's keys, checked."""
    try:
        return msgspec.convert(fields, Scenario)
    except msgspec.ValidationError as error:
        raise ConfigError(said_of(f"scenario {path}", text, str(error), fields, Scenario)) from error


def _profiles(path: Path, text: str, scenario: Scenario) -> dict[str, tuple[HardwareProfile, float]]:
    """The fleet's hardware, and its weights. Raises ConfigError."""
    result: dict[str, tuple[HardwareProfile, float]] = {}
    own = scenario.population.own_profiles
    if own is not None and not relative_to_config(path, own).is_dir():
        raise _wrong(path, text, ("population", "own_profiles"), f"expected a folder, got {own!r}, which is not there")
    for name, weight in scenario.population.profiles.items():
        try:
            result[name] = (_profile(name, scenario, path), weight)
        except ProfileError as error:
            raise _wrong(path, text, ("population", "profiles", name), str(error)) from error
    return result


def _profile(name: str, scenario: Scenario, path: Path) -> HardwareProfile:
    """A profile with the scenario's network and watchdog, its jobs waiting only for what the wearers' rules ask for.

    Raises ProfileError.
    """
    own = scenario.population.own_profiles
    profile = load_profile(name, own=relative_to_config(path, own) if own is not None else None)
    if scenario.population.network == "away":
        profile = msgspec.structs.replace(profile, home=profile.away)
    if (timeout_s := scenario.population.watchdog_timeout_s) is not None:
        profile = msgspec.structs.replace(profile, watchdog_timeout_s=timeout_s)
    if isinstance(profile.residency, Job) and not scenario.eligibility.require_unmetered:
        profile = msgspec.structs.replace(
            profile, residency=msgspec.structs.replace(profile.residency, unmetered=False)
        )
    return profile


def _bundle_of(path: Path, text: str, scenario: Scenario) -> tuple[Path, str]:
    """The model's bundle, and its publisher's key. Raises ConfigError."""
    if scenario.model.endswith(".covey"):
        if scenario.publisher_key is None:
            raise _wrong(path, text, ("publisher_key",), "this key is missing; a bundle of your own needs it")
        return relative_to_config(path, scenario.model), scenario.publisher_key
    try:
        return bundle_and_publisher(scenario.model)
    except FleetError as error:
        raise _wrong(path, text, ("model",), f"{error}; or give the path of a .covey file") from error


def _opened(path: Path, text: str, bundle_path: Path, publisher_key: str) -> ModelBundle:
    """The model, verified. Raises ConfigError."""
    try:
        key = public_key_from_hex(publisher_key)
    except LocalMisuseError as error:
        raise _wrong(path, text, ("publisher_key",), str(error)) from error
    try:
        return open_bundle(bundle_path.read_bytes(), publisher=key)
    except OSError as error:
        what = f"expected a readable file at {bundle_path} ({error.strerror})"
        raise _wrong(path, text, ("model",), what) from error
    except BundleError as error:
        raise _wrong(path, text, ("model",), str(error)) from error


def _task_of(path: Path, text: str, scenario: Scenario, bundle_path: Path, publisher_key: str) -> TaskConfig:
    """The aggregator's task. Raises ConfigError."""
    own = {"name", "bundle", "publisher_key", "publishers", "publisher_threshold"}
    given, where = sorted(own & scenario.task.keys()), f"scenario {path}"
    if given:
        what = f"there is no such key in a scenario: covey sets it itself, got {scenario.task[given[0]]!r}"
        raise _wrong(path, text, ("task", given[0]), what)
    fields = {**scenario.task, "name": TASK, "bundle": str(bundle_path), "publisher_key": publisher_key}
    try:
        task = read_task(msgspec.toml.encode(fields).decode(), str(path))
    except ConfigError as error:
        message = str(error).removeprefix(f"task file {path}: ")
        plan = fields.get("plan")
        if isinstance(plan, dict):
            fields["plan"] = {"kind": fields.pop("kind", "train"), **plan}
        raise ConfigError(said_of(where, text, message, fields, TaskConfig, below="$.task")) from error
    if scenario.wire == "off" and (task.engine != "open" or task.rule.name != "mean"):
        what = "off goes with the engine open and the rule mean only"
        raise _wrong(path, text, ("wire",), f"{what}, got {task.engine} and {task.rule.name}")
    if (task.engine == "secure") != bool(scenario.helpers):
        what = "expected at least 1 with the engine secure and none with the engine open"
        raise _wrong(path, text, ("helpers",), f"{what}, got {scenario.helpers} with {task.engine}")
    return task
