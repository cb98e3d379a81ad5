"""The real device code on virtual hardware: a `Device` over a virtual flash, board, clock and broker connection.

Nothing here stands in for code of the device; only its ports are virtual. Time moves only when it is told to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from device_client.adapters.counter_file import CounterFile
from device_client.adapters.encrypted_files import EncryptedFiles
from device_client.config import DeviceConfig, StudyConfig
from device_client.device import Device
from device_client.device_ports import Connection, DevicePorts
from device_client.downloads import Download, Downloads
from device_client.eligibility import Conditions
from device_client.ports import Bell, Board, Clock, Graph, Transport
from device_client.sealer import Sealer
from device_client.training import LocalTraining, Trainer
from device_client.work_vectors import IN_ENTRY, WorkVectors
from fl_protocol.adapters.journal import Journal
from fl_protocol.bundle import ModelBundle
from fl_protocol.durable import Disk
from fl_protocol.errors import ConfigError
from fl_protocol.integer_noise import Entropy
from fl_protocol.joining import Claim
from fl_protocol.sealing import seal_update

_DAY_S = 86_400.0


@dataclass
class VirtualClock:
    """`device_client.ports.Clock` that moves only when it is told to; local time is UTC.

    Args:
        time_s: Unix seconds.
    """

    time_s: float = 1_000_000.0

    def now_s(self) -> float:
        """Unix seconds."""
        return self.time_s

    def local_time_s(self) -> float:
        """Seconds since midnight."""
        return self.time_s % _DAY_S


class VirtualBell:
    """`device_client.ports.Bell`: virtual time does not pass while somebody waits."""

    def ring(self) -> None:
        """Nothing waits."""

    def wait(self, timeout_s: float) -> None:
        """Return at once."""


class VirtualWatchdog:
    """`device_client.ports.Watchdog` that nobody reads."""

    longest_wait_s = 3600.0

    def alive(self, status: str) -> None:
        """Nothing."""


class SteadyBoard:
    """`device_client.ports.Board` whose readings are what they were set to."""

    def __init__(self, conditions: Conditions | None = None) -> None:
        self.conditions = conditions if conditions is not None else Conditions()

    def read(self) -> Conditions:
        """The readings."""
        return self.conditions


def no_desk(claim: Claim, _client: str) -> Transport:
    """Where a fleet's devices were admitted beforehand, nobody joins. Raises ConfigError."""
    raise ConfigError(f"{claim.tenant}/{claim.task}: this fleet has no enrolment desk")


@dataclass(frozen=True)
class VirtualHardware:
    """What one device consists of, beside its code.

    Args:
        flash: holds the store; `device_client.adapters.encrypted_files.EncryptedFiles` over it.
        counter_flash: holds the ledger's counter, kept apart.
        store_key: 32 bytes.
        entropy: for training, sealing and identities.
        nonces: for the store's encryption.
        jitter: for coins and back-off; a stream of its own, so that resending does not change later noise.
        connect: a connection to the broker, not opened yet.
        bell: asked to wait when there is nothing to do.
        trainer: does the local steps.
        sealer: closes up updates.
        vectors: how work in the outbox holds its vectors.
        downloads: how models are fetched.
        desk: a connection to where devices join, not opened yet.
        files, counter_file: make the store over its flash, and the counter over its own.
    """

    flash: Disk
    counter_flash: Disk
    store_key: bytes
    clock: Clock
    board: Board
    entropy: Entropy
    nonces: Entropy
    jitter: Entropy
    connect: Callable[[Connection], Transport]
    journal: Journal
    bell: Bell = field(default_factory=VirtualBell)
    trainer: Trainer = LocalTraining
    sealer: Sealer = seal_update
    vectors: WorkVectors = IN_ENTRY
    downloads: Downloads = Download
    files: Callable[..., EncryptedFiles] = EncryptedFiles
    counter_file: Callable[..., CounterFile] = CounterFile
    desk: Callable[[Claim, str], Transport] = no_desk


def virtual_device(
    config: DeviceConfig,
    hardware: VirtualHardware,
    *,
    bundle: Callable[[StudyConfig], ModelBundle],
    graph: Callable[[ModelBundle], Graph],
    aggregator_key: Ed25519PublicKey,
    kind: Callable[[DeviceConfig, DevicePorts], Device] = Device,
) -> Device:
    """Start a device, as after a reboot: whatever its flash holds is there.

    Args:
        config: its ``device.toml``.
        hardware: what it runs on.
        bundle: a study's verified bundle.
        graph: the bundle's graph, loaded; may be shared by devices that do not run at the same time.
        aggregator_key: that all its studies are pinned to.
        kind: makes the device.

    Raises:
        CoveyError: as `Device` does.
    """
    ports = DevicePorts(
        store=hardware.files(hardware.flash, hardware.store_key, entropy=hardware.nonces, where="the virtual flash"),
        counter=hardware.counter_file(hardware.counter_flash, "counter", hardware.store_key, entropy=hardware.nonces),
        clock=hardware.clock,
        board=hardware.board,
        bell=hardware.bell,
        watchdog=VirtualWatchdog(),
        journal=hardware.journal,
        entropy=hardware.entropy,
        jitter=hardware.jitter,
        bundle=bundle,
        graph=graph,
        aggregator_key=lambda _study: aggregator_key,
        connect=hardware.connect,
        desk=hardware.desk,
        software="covey virtual",
        trainer=hardware.trainer,
        sealer=hardware.sealer,
        vectors=hardware.vectors,
        downloads=hardware.downloads,
    )
    return kind(config, ports)
