"""Reading a scenario file: strictly, with the key, the line and what is allowed in every error."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from aggregator.task_file import TaskConfig, read_task
from firmware_sim.bundles import bundle_and_publisher
from firmware_sim.errors import FleetError, ProfileError, SettingsError
from firmware_sim.faults.kinds import Fault
from firmware_sim.faults.parsing import parse_faults
from firmware_sim.profiles.catalogue import load_profile
from firmware_sim.profiles.hardware_profile import HardwareProfile
from firmware_sim.scenario.schema import Scenario
from firmware_sim.scenario.toml_lines import line_of, path_of
from firmware_sim.sensors.assembly import make_sensor
from fl_protocol.adapters.config_files import pinned_key, read_file, relative_to_config
from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.errors import ConfigError

SHIPPED = Path(__file__).resolve().parent.parent / "scenarios"
"""The scenarios that come with covey."""
TASK = "study"
"""What the scenario's task is called."""
_AT = re.compile(r" - at `(\$[^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]+)`")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")


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
    bundle_path, publisher_key = _bundle_of(path, scenario)
    bundle = open_bundle(read_file(bundle_path, "model"), publisher=pinned_key(path, "publisher_key", publisher_key))
    task = _task_of(path, text, scenario, bundle_path, publisher_key)
    try:
        faults = parse_faults(scenario.faults)
        profiles = {name: (load_profile(name), weight) for name, weight in scenario.population.profiles.items()}
    except (SettingsError, ProfileError) as error:
        raise ConfigError(f"scenario {path}: {error}") from error
    loaded = LoadedScenario(path, text, scenario, bundle_path, publisher_key, bundle, task, faults, profiles)
    _check_files(loaded)
    return loaded


def _check_files(loaded: LoadedScenario) -> None:
    """Whether what the scenario names beside its model is there, and fits. Raises ConfigError."""
    path, scenario = loaded.path, loaded.scenario
    if scenario.population.traces is not None and not relative_to_config(path, scenario.population.traces).exists():
        line = line_of(loaded.text, ("population", "traces"))
        raise ConfigError(
            f"scenario {path}: line {line}: population.traces: expected a CSV file, got {scenario.population.traces}, "
            "which is not there"
        )
    if scenario.fidelity == "recorded" and scenario.recorded is None:
        raise ConfigError(f"scenario {path}: recorded: this key is missing; the fidelity recorded plays a run back")
    if scenario.sensors.kind != "none":
        try:
            make_sensor(scenario.sensors, loaded.bundle.manifest, scenario.seed)
        except SettingsError as error:
            line = line_of(loaded.text, ("sensors",))
            raise ConfigError(f"scenario {path}: line {line}: sensors: {error}") from error


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
        raise ConfigError(said_of(path, text, str(error), Scenario)) from error


def said_of(path: Path, text: str, message: str, kind: type, *, below: str = "$") -> str:
    """An error of msgspec with its key, its line and what is allowed.

    Args:
        path: of the file.
        text: what it holds.
        message: msgspec's.
        kind: what was expected at `below`.
        below: where in the file the decoded part begins, such as ``$.task``.
    """
    at = _AT.search(message)
    inside = at[1].removeprefix("$") if at else ""
    what, where = _AT.sub("", message), below + inside
    if unknown := _UNKNOWN.search(what):
        key = f"{where}.{unknown[1]}"
        what = f"there is no such key; expected {', '.join(_keys_at(kind, path_of('$' + inside)))}"
    elif missing := _MISSING.search(what):
        key = f"{where}.{missing[1]}"
        what = "this key is missing"
    else:
        key = where
    line = line_of(text, path_of(key))
    place = f"line {line}: " if line is not None else ""
    return f"scenario {path}: {place}{key.removeprefix('$.')}: {what[:1].lower()}{what[1:]}"


def _keys_at(kind: Any, path: tuple[str | int, ...]) -> list[str]:
    """The keys that the table at a path may have."""
    here = msgspec.inspect.type_info(kind)
    for part in path:
        here = _inside(here, part)
    if isinstance(here, msgspec.inspect.StructType):
        return sorted(field.encode_name for field in here.fields)
    return ["other keys"]


def _inside(here: Any, part: str | int) -> Any:
    """The type of a field, or of an array's items."""
    if isinstance(here, msgspec.inspect.UnionType):
        tables = [one for one in here.types if not isinstance(one, msgspec.inspect.NoneType)]
        here = tables[0]
    if isinstance(here, msgspec.inspect.StructType):
        return next((field.type for field in here.fields if field.encode_name == part), here)
    return getattr(here, "item_type", here)


def _bundle_of(path: Path, scenario: Scenario) -> tuple[Path, str]:
    """The model's bundle, and its publisher's key. Raises ConfigError."""
    if scenario.model.endswith(".covey"):
        if scenario.publisher_key is None:
            raise ConfigError(f"scenario {path}: publisher_key: this key is missing; a bundle of your own needs it")
        return relative_to_config(path, scenario.model), scenario.publisher_key
    try:
        return bundle_and_publisher(scenario.model)
    except FleetError as error:
        raise ConfigError(f"scenario {path}: model: {error}; or give the path of a .covey file") from error


def _task_of(path: Path, text: str, scenario: Scenario, bundle_path: Path, publisher_key: str) -> TaskConfig:
    """The aggregator's task. Raises ConfigError."""
    given = {"name", "bundle", "publisher_key"} & scenario.task.keys()
    if given:
        raise ConfigError(
            said_of(path, text, f"Object contains unknown field `{min(given)}`", TaskConfig, below="$.task")
        )
    fields = {**scenario.task, "name": TASK, "bundle": str(bundle_path), "publisher_key": publisher_key}
    try:
        task = read_task(msgspec.toml.encode(fields).decode(), str(path))
    except ConfigError as error:
        message = str(error).removeprefix(f"task file {path}: ")
        raise ConfigError(said_of(path, text, message, TaskConfig, below="$.task")) from error
    if scenario.wire == "off" and (task.engine != "open" or task.rule.name != "mean"):
        line = line_of(text, ("wire",))
        raise ConfigError(
            f"scenario {path}: line {line}: wire: off goes with the engine open and the rule mean only, got "
            f"{task.engine} and {task.rule.name}"
        )
    if (task.engine == "secure") != bool(scenario.helpers):
        raise ConfigError(
            f"scenario {path}: helpers: expected at least 1 with the engine secure and none with the engine open, got "
            f"{scenario.helpers} with {task.engine}"
        )
    return task
