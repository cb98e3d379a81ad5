"""From a configuration file to a device: opens the store, verifies the bundle, loads graph, ledger and records."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from device_client.adapters.encrypted_files import KEY_BYTES, EncryptedFiles
from device_client.adapters.system_entropy import system_entropy
from device_client.adapters.tflite_graph import TfliteGraph
from device_client.config import DeviceConfig
from device_client.daemon import DeviceDaemon
from device_client.device_store import load_identity, load_records, load_session
from device_client.errors import StoreError
from device_client.ledger import Budget, PrivacyLedger
from device_client.participation import Outbox, Participant
from device_client.personal import PersonalLayers
from device_client.session import DeviceSession, Floors, SessionConfig
from fl_protocol.adapters.config_files import load_toml, pinned_key, read_file, relative_to_config
from fl_protocol.adapters.connect import make_transport
from fl_protocol.adapters.files import write_atomic
from fl_protocol.adapters.journal import Journal
from fl_protocol.adapters.mqtt import LastWill
from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.errors import CoveyError


class SystemClock:
    """The machine's clock."""

    def now_s(self) -> float:
        """Unix seconds."""
        return time.time()


@dataclass(frozen=True)
class DeviceFiles:
    """A configuration file and what it names."""

    path: Path
    config: DeviceConfig

    @classmethod
    def load(cls, path: Path) -> DeviceFiles:
        """Read and check a ``device.toml``. Raises ConfigError."""
        return cls(path, load_toml(path, DeviceConfig))

    def open_store(self, *, create: bool = False) -> EncryptedFiles:
        """The encrypted store; with `create`, its key is made where there is none.

        Raises:
            StoreError: no key, a key that others can read, or a store that cannot be opened.
        """
        key_path = relative_to_config(self.path, self.config.device.store_key)
        if create and not key_path.exists():
            key_path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(key_path, os.urandom(KEY_BYTES))
        try:
            mode = key_path.stat().st_mode
            key = key_path.read_bytes()
        except OSError as error:
            raise StoreError(f"no store key at {key_path} ({error.strerror}); run covey-device init first") from error
        # Security: a key that others can read protects nothing.
        if mode & 0o077:
            raise StoreError(f"the store key {key_path} can be read by others; run chmod 600 on it")
        if len(key) != KEY_BYTES:
            raise StoreError(f"the store key {key_path}: expected {KEY_BYTES} bytes, got {len(key)}")
        return EncryptedFiles(relative_to_config(self.path, self.config.device.store), key)

    def open_bundle(self) -> ModelBundle:
        """The verified bundle. Raises ConfigError or BundleError."""
        study = self.config.study
        data = read_file(relative_to_config(self.path, study.bundle), "study.bundle")
        return open_bundle(
            data,
            publisher=pinned_key(self.path, "study.publisher_key", study.publisher_key),
            minimum_version=study.minimum_bundle_version,
        )

    def open_ledger(self, store: EncryptedFiles) -> PrivacyLedger:
        """The ledger under the configured budget. Raises LedgerError."""
        privacy = self.config.privacy
        return PrivacyLedger(store, Budget(privacy.epsilon, privacy.delta))


def assemble(files: DeviceFiles, *, software: str, journal: Journal) -> DeviceDaemon:
    """A daemon on the real adapters, ready to run.

    Raises:
        CoveyError: one sentence about what is missing or wrong.
    """
    store = files.open_store()
    try:
        return _assemble(files, store, software=software, journal=journal)
    except CoveyError:
        store.close()
        raise


def _assemble(files: DeviceFiles, store: EncryptedFiles, *, software: str, journal: Journal) -> DeviceDaemon:
    """`assemble` on an open store."""
    config, study, bundle = files.config, files.config.study, files.open_bundle()
    manifest = bundle.manifest
    participant = Participant(
        device=config.device.id,
        signing_key=load_identity(store),
        ledger=files.open_ledger(store),
        graph=TfliteGraph.of_bundle(bundle),
        records=load_records(store, window_shape=manifest.input.shape, label=manifest.label),
        personal=PersonalLayers(store, task=study.task, initial=bundle.params[manifest.num_shared_parameters :]),
        outbox=Outbox(store),
        entropy=system_entropy,
    )
    session = DeviceSession(
        SessionConfig(
            tenant=study.tenant,
            task=study.task,
            device=config.device.id,
            role=config.device.role,
            aggregator_key=pinned_key(files.path, "study.aggregator_key", study.aggregator_key),
            graph_digest=bundle.graph_digest,
            num_parameters=manifest.num_shared_parameters,
            floors=Floors(config.privacy.minimum_noise_multiplier, config.privacy.minimum_cohort),
            software=software,
        ),
        entropy=os.urandom,
        state=load_session(store),
        outbox=participant.outbox,
    )
    will = session.offline_presence()
    transport = make_transport(
        config.broker, config=files.path, client_id=config.device.id, will=LastWill(will.topic, will.payload)
    )
    return DeviceDaemon(session, participant, store, transport, SystemClock(), journal)
