"""A run folder: everything one run needs and leaves behind, so that it can be looked at, resumed or thrown away.

run.json            settings                    logs/            one JSON line per event, a file per process
broker/             configuration, ACL, CA      model.covey      the trained bundle
aggregator/         configuration, task file,   model.tflite     for inference only
                    database and blobs      helpers/NAME/    configuration, identity, store
devices/NAME/       configuration, key, store   metrics.json, report.html
"""

from __future__ import annotations

import math
import os
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec.structs import asdict, replace

from aggregator.assembly import AggregatorFiles, bundle_of
from aggregator.certificates import KeyPair, issue, make_ca
from aggregator.config import AggregatorConfig, AggregatorSection, HelperSection
from aggregator.task_creation import create_task
from aggregator.task_file import TaskConfig, write_task
from device_client.assembly import DeviceFiles, RealDevice
from device_client.config import (
    DeviceConfig,
    DeviceSection,
    EligibilityConfig,
    PrivacyConfig,
    RecordsConfig,
    StudyConfig,
)
from device_client.device_store import create_identity
from device_client.session import Role
from firmware_sim.bundles import bundle_and_publisher, require_watch_model
from firmware_sim.errors import FleetError
from firmware_sim.helper_folders import register_devices, write_helper
from firmware_sim.settings import AGGREGATOR, STUDY, TASK, TENANT, DemoSettings
from firmware_sim.watch_data import Recording, Wrist, windows_of
from fl_protocol.adapters.files import write_atomic
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.bundle import open_bundle
from fl_protocol.helper_config import HelperPin
from fl_protocol.signing import public_key_from_hex, public_key_hex

HOST = "127.0.0.1"
_TLS_NAMES = ("ca.pem", "client.pem", "client.key")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    @property
    def settings_file(self) -> Path:
        """Settings; a folder without it is not a run."""
        return self.path / "run.json"

    @property
    def broker(self) -> Path:
        """Broker configuration, its certificates and the CA."""
        return self.path / "broker"

    @property
    def aggregator_toml(self) -> Path:
        """The aggregator's configuration."""
        return self.path / "aggregator" / "aggregator.toml"

    @property
    def task_toml(self) -> Path:
        """The task's file, as it was when the run was made."""
        return self.path / "aggregator" / "task.toml"

    def helper_toml(self, name: str) -> Path:
        """A helper's configuration."""
        return self.path / "helpers" / name / "helper.toml"

    def device_toml(self, wrist: Wrist) -> Path:
        """A device's configuration."""
        return self.path / "devices" / wrist.device_id / "device.toml"

    def log(self, name: str) -> Path:
        """A process's event log."""
        return self.path / "logs" / f"{name}.jsonl"

    def load_settings(self) -> DemoSettings:
        """The run's settings. Raises FleetError where the folder is not a run."""
        try:
            text = self.settings_file.read_bytes()
            settings = msgspec.json.decode(text, type=DemoSettings)
        except OSError as error:
            raise FleetError(f"{self.path} is not a run folder: {self.settings_file.name} {error.strerror}") from error
        except msgspec.DecodeError as error:
            raise FleetError(f"{self.settings_file} cannot be read ({error})") from error
        # What this covey would do by default, such as masking, may not be what the run was made for.
        missing = sorted(set(DemoSettings.__struct_fields__) - set(msgspec.json.decode(text)))
        if missing:
            raise FleetError(
                f"{self.settings_file} was written by an older covey: expected {', '.join(missing)}; start a new run"
            )
        return settings


def create_run(folder: Path, settings: DemoSettings, recordings: list[Recording]) -> RunFolder:
    """Provision a new run: CA, certificates, aggregator, helpers, and each wrist's keys, store and records.

    Raises:
        FleetError: the folder is not empty or cannot be written, or the settings cannot be carried out.
    """
    # What cannot be carried out is refused before anything is written.
    settings.plan()
    require_watch_model(settings.model)
    run = RunFolder(folder)
    try:
        if folder.exists() and any(folder.iterdir()):
            raise FleetError(f"{folder} is not empty; name a new folder, or use --resume to go on with a run")
        helpers = ["helpers"] if settings.operators else []
        for name in ("broker", "aggregator", "logs", "devices", *helpers):
            (folder / name).mkdir(parents=True, mode=0o700)
        write_configs(run, settings, port=1, tls=True)
        _write_certificates(run, settings)
        _provision(run, settings, recordings)
        # Last, so that a folder with settings is a whole run.
        write_atomic(run.settings_file, msgspec.json.format(msgspec.json.encode(settings), indent=1), mode=0o644)
    except OSError as error:
        raise FleetError(f"the run folder {folder} cannot be written ({error.strerror})") from error
    return run


def write_configs(run: RunFolder, settings: DemoSettings, *, port: int, tls: bool) -> None:
    """Write every configuration file, for the broker's port of this start."""
    bundle, publisher = bundle_and_publisher(settings.model)
    broker = BrokerConfig(HOST, port, *_TLS_NAMES) if tls else BrokerConfig(HOST, port)
    aggregator = AggregatorConfig(
        aggregator=AggregatorSection(
            tenant=TENANT, client_id=AGGREGATOR, database="aggregator.db", signing_key="signing.key"
        ),
        broker=broker,
    )
    key = public_key_hex(AggregatorFiles(run.aggregator_toml, aggregator).signing_key(create=True).public_key())
    pins = _write_helpers(run, settings, aggregator_key=key, broker=broker)
    helpers = tuple(HelperSection(**asdict(pin)) for pin in pins)
    write_atomic(run.aggregator_toml, msgspec.toml.encode(replace(aggregator, helpers=helpers)))
    for wrist in settings.training_wrists + settings.held_out_wrists:
        role: Role = "evaluate" if wrist.person in settings.held_out else "train"
        device = DeviceConfig(
            studies=(
                StudyConfig(
                    tenant=TENANT,
                    task=TASK,
                    broker=broker,
                    bundle=str(bundle),
                    publisher_key=publisher,
                    aggregator_key=key,
                    id=wrist.device_id,
                    role=role,
                    helpers=pins,
                ),
            ),
            device=DeviceSection(store="store", store_key="store.key"),
            privacy=PrivacyConfig(
                epsilon=math.inf if settings.epsilon is None else settings.epsilon,
                delta=settings.delta,
                minimum_noise_multiplier=settings.noise_multiplier,
                minimum_cohort=settings.minimum_cohort,
                # With these the wrist sends its updates masked or not at all.
                minimum_helpers=len(pins),
                minimum_operators=len({pin.operator for pin in pins}),
            ),
            # All wrists share this machine, which is no wrist: its load and its network say nothing about them.
            eligibility=EligibilityConfig(require_idle=False, require_unmetered=False, minimum_battery_percent=0.0),
            records=RecordsConfig(held_out_fraction=0.0),
        )
        path = run.device_toml(wrist)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        write_atomic(path, msgspec.toml.encode(device))


def _write_helpers(
    run: RunFolder, settings: DemoSettings, *, aggregator_key: str, broker: BrokerConfig
) -> tuple[HelperPin, ...]:
    """Write every helper's configuration; how others pin them."""
    return tuple(
        write_helper(
            run.helper_toml(name),
            operator=operator,
            minimum_cohort=settings.minimum_cohort,
            tenant=TENANT,
            aggregator_key=aggregator_key,
            broker=broker,
        )
        for name, operator in settings.operators.items()
    )


def task_file(settings: DemoSettings) -> str:
    """What ``covey-aggregator task create`` is given."""
    bundle, publisher = bundle_and_publisher(settings.model)
    model = open_bundle(bundle.read_bytes(), publisher=public_key_from_hex(publisher))
    return write_task(
        TaskConfig(
            name=TASK,
            bundle=str(bundle),
            publisher_key=publisher,
            plan=settings.plan(),
            server=settings.server(),
            rounds=settings.rounds,
            goal=len(settings.training_wrists),
            minimum_cohort=settings.minimum_cohort,
            round_duration_s=settings.round_duration_s,
            engine=settings.engine,
            secure=settings.secure(len(model.shared_params)),
        )
    )


def _write_certificates(run: RunFolder, settings: DemoSettings) -> None:
    """One CA, one certificate for the broker, one for the aggregator, and one for each helper and each wrist."""
    now_s = time.time()
    ca = make_ca(f"covey {TENANT}", now_s=now_s)
    write_atomic(run.broker / "ca.pem", ca.certificate)
    broker = issue(ca, "broker", now_s=now_s, server_hosts=(HOST, "localhost"))
    write_atomic(run.broker / "broker.pem", broker.certificate)
    write_atomic(run.broker / "broker.key", broker.key)
    clients = {AGGREGATOR: run.aggregator_toml.parent}
    for wrist in settings.training_wrists + settings.held_out_wrists:
        clients[wrist.device_id] = run.device_toml(wrist).parent
    clients |= {name: run.helper_toml(name).parent for name in settings.operators}
    for name, folder in clients.items():
        _write_client_certificate(folder, ca, issue(ca, name, now_s=now_s))


def _write_client_certificate(folder: Path, ca: KeyPair, client: KeyPair) -> None:
    """A client's three TLS files."""
    for name, data in zip(_TLS_NAMES, (ca.certificate, client.certificate, client.key), strict=True):
        write_atomic(folder / name, data)


def _provision(run: RunFolder, settings: DemoSettings, recordings: list[Recording]) -> None:
    """Create the task, and each wrist's identity, encrypted records and registration, with the helpers too."""
    registered: list[tuple[str, bytes]] = []
    store = AggregatorFiles.load(run.aggregator_toml).open_store()
    write_atomic(run.task_toml, task_file(settings).encode())
    create_task(store, run.task_toml, now_s=time.time())
    samples = bundle_of(store, store.tasks.get(TASK)).manifest.input.shape[0]
    for wrist in settings.training_wrists + settings.held_out_wrists:
        path, records = run.device_toml(wrist), windows_of(recordings, wrist, samples=samples)
        with closing(DeviceFiles.load(path).open_store(create=True)) as device_store:
            key = create_identity(device_store, STUDY, os.urandom)
        with RealDevice.open(path) as device:
            device.add(records.x, records.y)
            device.grant(STUDY)
        if wrist.person not in settings.held_out:
            registered.append((wrist.device_id, key.public_key().public_bytes_raw()))
            store.devices.add(*registered[-1], time.time())
    store.close()
    for name in settings.operators:
        register_devices(run.helper_toml(name), TENANT, registered)
