"""A run folder: everything one run needs and leaves behind, so that it can be looked at, resumed or thrown away.

run.json            settings                    logs/            one JSON line per event, a file per process
broker/             configuration, ACL, CA      model.covey      the trained bundle
aggregator/         configuration, task file,   model.tflite     for inference only
                    database and blobs      helpers/NAME/    configuration, identity, store
devices/NAME/       configuration, key, store   metrics.json, report.html
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec.structs import asdict, replace

from aggregator.assembly import AggregatorFiles
from aggregator.certificates import KeyPair, issue, make_ca
from aggregator.config import AggregatorConfig, AggregatorSection, HelperSection
from device_client.assembly import DeviceFiles, RealDevice
from device_client.config import DeviceConfig
from device_client.device_store import create_identity
from device_client.training import Records
from firmware_sim.errors import FleetError
from firmware_sim.helper_folders import write_helper
from firmware_sim.settings import AGGREGATOR, DemoSettings
from fl_protocol.adapters.files import write_atomic
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.helper_config import HelperPin
from fl_protocol.signing import public_key_hex

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

    def device_toml(self, device: str) -> Path:
        """A device's configuration, by its name on the wire."""
        return self.path / "devices" / device / "device.toml"

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


class Servers(NamedTuple):
    """What devices are told of a run's aggregator and helpers.

    Args:
        aggregator_key: that signs manifests and receipts, 64 hex digits.
        helpers: as devices pin them.
    """

    aggregator_key: str
    helpers: tuple[HelperPin, ...]


def make_folders(run: RunFolder, *, helpers: bool) -> None:
    """Make the folders of a run, for their owner only.

    Args:
        run: where.
        helpers: whether there are any.
    """
    for name in ("broker", "aggregator", "logs", "devices", *(["helpers"] if helpers else [])):
        (run.path / name).mkdir(parents=True, mode=0o700)


def broker_at(port: int, *, tls: bool) -> BrokerConfig:
    """The run's broker as its clients are told of it, whose TLS files are beside their configurations."""
    return BrokerConfig(HOST, port, *_TLS_NAMES) if tls else BrokerConfig(HOST, port)


def write_servers(
    run: RunFolder, *, tenant: str, broker: BrokerConfig, operators: Mapping[str, str], minimum_cohort: int
) -> Servers:
    """Write the configurations of aggregator and helpers, the first time with their keys.

    Args:
        run: where.
        tenant: name on the wire.
        broker: of this start.
        operators: of the helpers, by name.
        minimum_cohort: fewest updates that helpers add up.
    """
    aggregator = AggregatorConfig(
        aggregator=AggregatorSection(
            tenant=tenant,
            client_id=AGGREGATOR,
            database="aggregator.db",
            signing_key="signing.key",
        ),
        broker=broker,
    )
    key = public_key_hex(AggregatorFiles(run.aggregator_toml, aggregator).signing_key(create=True).public_key())
    pins = tuple(
        write_helper(
            run.helper_toml(name),
            operator=operator,
            minimum_cohort=minimum_cohort,
            tenant=tenant,
            aggregator_key=key,
            broker=broker,
        )
        for name, operator in operators.items()
    )
    helpers = tuple(HelperSection(**asdict(pin)) for pin in pins)
    write_atomic(run.aggregator_toml, msgspec.toml.encode(replace(aggregator, helpers=helpers)))
    return Servers(key, pins)


def write_device(run: RunFolder, device: str, config: DeviceConfig) -> None:
    """Write a device's configuration into its folder."""
    path = run.device_toml(device)
    path.parent.mkdir(exist_ok=True, mode=0o700)
    write_atomic(path, msgspec.toml.encode(config))


def provision_device(path: Path, study: str, records: Records | None) -> bytes:
    """Make a device's store and identity, give it what it has recorded, and grant its study; its public key.

    Args:
        path: of its ``device.toml``.
        study: ``tenant/task``.
        records: None for none.
    """
    with closing(DeviceFiles.load(path).open_store(create=True)) as store:
        key = create_identity(store, study, os.urandom)
    with RealDevice.open(path) as device:
        if records is not None:
            device.add(records.x, records.y)
        device.grant(study)
    return key.public_key().public_bytes_raw()


def write_certificates(run: RunFolder, *, tenant: str, devices: Iterable[str], helpers: Iterable[str]) -> None:
    """One CA, one certificate for the broker, one for the aggregator, and one for each helper and each device."""
    now_s = time.time()
    ca = make_ca(f"covey {tenant}", now_s=now_s)
    write_atomic(run.broker / "ca.pem", ca.certificate)
    broker = issue(ca, "broker", now_s=now_s, server_hosts=(HOST, "localhost"))
    write_atomic(run.broker / "broker.pem", broker.certificate)
    write_atomic(run.broker / "broker.key", broker.key)
    clients = {AGGREGATOR: run.aggregator_toml.parent}
    clients |= {name: run.device_toml(name).parent for name in devices}
    clients |= {name: run.helper_toml(name).parent for name in helpers}
    for name, folder in clients.items():
        _write_client_certificate(folder, ca, issue(ca, name, now_s=now_s))


def _write_client_certificate(folder: Path, ca: KeyPair, client: KeyPair) -> None:
    """A client's three TLS files."""
    for name, data in zip(_TLS_NAMES, (ca.certificate, client.certificate, client.key), strict=True):
        write_atomic(folder / name, data)
