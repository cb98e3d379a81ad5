"""From a configuration file to a device on this machine's hardware: real adapters behind every port."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_client.adapters.certificate_files import claim_tls_files, tls_files
from device_client.adapters.counter_file import CounterFile
from device_client.adapters.encrypted_files import KEY_BYTES, EncryptedFiles
from device_client.adapters.line_server import LineServer
from device_client.adapters.linux_board import LinuxBoard
from device_client.adapters.system_entropy import system_entropy
from device_client.adapters.system_time import SystemBell, SystemClock
from device_client.adapters.systemd import Systemd
from device_client.adapters.tpm2_tls_keys import Tpm2TlsKeys
from device_client.config import DeviceConfig, StudyConfig
from device_client.control import answer
from device_client.device import Device
from device_client.device_ports import Connection, DevicePorts
from device_client.errors import StoreError
from device_client.ledger import Counter
from device_client.recordings.ingestion import encode_reply, ingest
from device_client.tls_keys import SoftwareTlsKeys, TlsKeys
from fl_protocol.adapters.config_files import load_toml, pinned_key, pinned_publishers, read_file, relative_to_config
from fl_protocol.adapters.connect import make_transport
from fl_protocol.adapters.files import SystemDisk, write_atomic
from fl_protocol.adapters.journal import Journal
from fl_protocol.adapters.mqtt import LastWill, MqttTransport
from fl_protocol.adapters.software import software_version
from fl_protocol.adapters.tflite_graph import TfliteGraph
from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.errors import ConfigError
from fl_protocol.joining import Claim
from fl_protocol.transport import Transport

_CREDENTIAL = "credential:"
MOST_REQUESTS = 16
"""Requests answered in one turn of the loop, before messages and training get theirs."""


class NoJournal:
    """Tells nobody."""

    def write(self, event: str, /, *, at_s: float, **fields: Any) -> None:
        """Nothing."""


@dataclass(frozen=True)
class DeviceFiles:
    """A configuration file and what it names."""

    path: Path
    config: DeviceConfig

    @classmethod
    def load(cls, path: Path) -> DeviceFiles:
        """Read and check a ``device.toml``. Raises ConfigError."""
        return cls(path, load_toml(path, DeviceConfig))

    @property
    def store_folder(self) -> Path:
        """Where the encrypted store is."""
        return relative_to_config(self.path, self.config.device.store)

    @property
    def control_socket(self) -> Path:
        """Where a running daemon answers questions."""
        named = self.config.device.control_socket
        return relative_to_config(self.path, named) if named else _beside(self.store_folder, ".sock")

    @property
    def counter_file(self) -> Path:
        """Where the ledger's counter is."""
        named = self.config.device.counter
        return relative_to_config(self.path, named) if named else _beside(self.store_folder, ".counter")

    @property
    def tls_keys(self) -> TlsKeys:
        """Where the TLS keys of new names come from."""
        return Tpm2TlsKeys() if self.config.device.tls_keys == "tpm2" else SoftwareTlsKeys()

    def key_path(self) -> Path:
        """The store key's file, or systemd's copy of the credential that holds it. Raises ConfigError."""
        name = self.config.device.store_key
        if not name.startswith(_CREDENTIAL):
            return relative_to_config(self.path, name)
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        if not folder:
            raise ConfigError(
                f"configuration {self.path}: device.store_key is {name}, but systemd passed no credentials; start the "
                "unit, or run the command with systemd-run --property=LoadCredential=..."
            )
        return Path(folder) / name.removeprefix(_CREDENTIAL)

    def store_key(self, *, create: bool = False) -> bytes:
        """The store's key; with `create`, it is made where there is none.

        Raises:
            StoreError: there is none, or one that others can read or that is no key.
        """
        path = self.key_path()
        if create:
            _make_key(path)
        try:
            mode = path.stat().st_mode
            key = path.read_bytes()
        except OSError as error:
            raise StoreError(f"no store key at {path} ({error.strerror}); run covey-device init first") from error
        # Security: a key that others can read protects nothing. A credential's access is systemd's business: from
        # version 254 on it is 0440 with an access control list for the unit's user.
        if mode & 0o077 and not self.config.device.store_key.startswith(_CREDENTIAL):
            raise StoreError(f"the store key {path} can be read by others; run chmod 600 on it")
        if len(key) != KEY_BYTES:
            raise StoreError(f"the store key {path}: expected {KEY_BYTES} bytes, got {len(key)}")
        return key

    def open_store(self, *, create: bool = False) -> EncryptedFiles:
        """The encrypted store, locked for this process. Raises StoreError."""
        return EncryptedFiles.in_folder(self.store_folder, self.store_key(create=create))

    def open_counter(self, key: bytes) -> Counter:
        """The ledger's counter. Raises StoreError."""
        path = self.counter_file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the folder of the counter {path} cannot be made ({error.strerror})") from error
        return CounterFile(SystemDisk(path.parent), path.name, key)

    def open_bundle(self, study: StudyConfig) -> ModelBundle:
        """A study's verified bundle. Raises ConfigError or BundleError."""
        data = read_file(relative_to_config(self.path, study.bundle), f"{study.study}: bundle")
        return open_bundle(
            data,
            publisher=pinned_publishers(self.path, study.publisher_pins, section="study"),
            minimum_version=study.minimum_bundle_version,
        )

    def connect(self, wanted: Connection, *, wake: Callable[[], None]) -> Transport:
        """A study's transport, not opened yet. Raises ConfigError, StoreError."""
        study, pseudonym = wanted.study, wanted.pseudonym
        with ExitStack() as stack:
            tls = stack.enter_context(tls_files(pseudonym)) if pseudonym is not None else None
            return make_transport(
                study.broker,
                config=self.path,
                client_id=wanted.device,
                will=LastWill(wanted.will_topic, wanted.will_payload),
                wake=wake,
                tls=tls,
            )

    def connect_to_desk(self, claim: Claim, client: str, *, wake: Callable[[], None] = lambda: None) -> Transport:
        """A transport to where devices join, not opened yet. Raises StoreError, LocalMisuseError."""
        with claim_tls_files(claim) as tls:
            return MqttTransport(host=claim.broker.host, port=claim.broker.port, client_id=client, tls=tls, wake=wake)


class RealDevice(Device):
    """A device on this machine; the store is locked until `close`."""

    def __init__(self, files: DeviceFiles, ports: DevicePorts, store: EncryptedFiles, watchdog: Systemd) -> None:
        super().__init__(files.config, ports)
        self._files, self._locked, self._watchdog = files, store, watchdog
        self._control: LineServer | None = None
        self._ingest: LineServer | None = None

    @classmethod
    def open(cls, path: Path | str, *, journal: Journal | None = None) -> RealDevice:
        """See `Device.open`."""
        files = DeviceFiles.load(Path(path))
        if not files.config.studies:
            raise ConfigError(f"configuration {path}: no [[study]] yet; join one with covey-device enroll")
        key = files.store_key()
        store = EncryptedFiles.in_folder(files.store_folder, key)
        bell, watchdog = SystemBell(), Systemd()
        try:
            ports = DevicePorts(
                store=store,
                counter=files.open_counter(key),
                clock=SystemClock(),
                board=LinuxBoard(files.config.board),
                bell=bell,
                watchdog=watchdog,
                journal=journal if journal is not None else NoJournal(),
                entropy=system_entropy,
                jitter=os.urandom,
                bundle=files.open_bundle,
                graph=TfliteGraph.of_bundle,
                aggregator_key=lambda study: pinned_key(files.path, "study.aggregator_key", study.aggregator_key),
                connect=lambda wanted: files.connect(wanted, wake=bell.ring),
                desk=lambda claim, client: files.connect_to_desk(claim, client, wake=bell.ring),
                software=f"covey {software_version()}",
                tls_keys=files.tls_keys,
            )
            return cls(files, ports, store, watchdog)
        except BaseException:
            store.close()
            raise

    def listen(self) -> None:
        """Open the control socket, and the one for recordings if one is configured. Raises ConfigError, DeviceError."""
        records = self.config.records
        self._control = LineServer(self._files.control_socket, wake=self._ports.bell.ring)
        if records.ingest_socket is not None:
            path = relative_to_config(self._files.path, records.ingest_socket)
            self._ingest = LineServer(path, wake=self._ports.bell.ring, group=records.ingest_group)
        self.daemon.serve = self._serve

    def close(self) -> None:
        """Put training aside, say goodbye, and let another process open the store."""
        self._watchdog.stopping()
        for server in (self._control, self._ingest):
            if server is not None:
                server.close()
        super().close()
        self._locked.close()

    def __enter__(self) -> RealDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> bool:
        """Answer what waits on the sockets; whether anything did."""
        return any([self._answer_questions(), self._take_recordings()])

    def _answer_questions(self) -> int:
        """Of the device's own user, and of root."""
        for count in range(MOST_REQUESTS):
            request = self._control.take() if self._control is not None else None
            if request is None:
                return count
            if request.peer_uid not in {0, os.getuid()}:  # Security: the file's mode says the same
                request.reply(b'{"error":"only the user that the daemon runs as, or root, may ask"}')
            else:
                request.reply(answer(self, request.payload))
        return MOST_REQUESTS

    def _take_recordings(self) -> int:
        """Of whoever may write to the ingest socket."""
        for count in range(MOST_REQUESTS):
            request = self._ingest.take() if self._ingest is not None else None
            if request is None:
                return count
            reply = ingest(request.payload, request.encoding, streams=self.targets(), now_s=self._ports.clock.now_s())
            request.reply(encode_reply(reply, request.encoding))
        return MOST_REQUESTS


def _make_key(path: Path) -> None:
    """A new store key where there is none. Raises StoreError."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, os.urandom(KEY_BYTES))
    except OSError as error:
        raise StoreError(f"the store key {path} cannot be made ({error.strerror})") from error


def _beside(folder: Path, suffix: str) -> Path:
    """A file next to a folder, not in it."""
    return folder.with_name(folder.name + suffix)
