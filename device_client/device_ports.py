"""What one whole device needs of the outside: the ports of `device_client.ports`, and where its files come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from device_client.config import StudyConfig
from device_client.downloads import Download, Downloads
from device_client.ledger import Counter
from device_client.ports import Bell, Board, Clock, Graph, Store, Transport, Watchdog
from device_client.pseudonyms import Pseudonym
from device_client.recordings.window_store import WindowFiles
from device_client.sealer import Sealer
from device_client.tls_keys import SoftwareTlsKeys, TlsKeys
from device_client.training import LocalTraining, Trainer
from device_client.work_vectors import IN_ENTRY, WorkVectors
from fl_protocol.adapters.journal import Journal
from fl_protocol.bundle import ModelBundle
from fl_protocol.integer_noise import Entropy
from fl_protocol.joining import Claim
from fl_protocol.sealing import seal_update


class DeviceStore(WindowFiles, Store, Protocol):
    """The encrypted store: blobs, logs, frames, and their destruction."""

    def shred(self, scope: str) -> None:
        """Destroy the key of a scope's data, then the data. Raises StoreError."""


@dataclass(frozen=True)
class Connection:
    """What is needed to connect for a study.

    Args:
        device: name on the wire, and MQTT client id.
        pseudonym: with its certificate; None for a study with a fixed name.
        will_topic, will_payload: the last will.
    """

    study: StudyConfig
    device: str
    pseudonym: Pseudonym | None
    will_topic: str
    will_payload: bytes


@dataclass(frozen=True)
class DevicePorts:
    """All that a device needs of the outside.

    Args:
        store: encrypted blobs, logs and frames.
        counter: the ledger's, kept apart from the store.
        bundle: a study's verified bundle. Raises CoveyError.
        graph: the bundle's graph, loaded; called when a study starts. Raises CoveyError.
        aggregator_key: that a study is pinned to. Raises CoveyError.
        connect: a transport that is opened by the caller. Raises CoveyError.
        desk: a transport to where a claim says that devices join, under a client id; opened by the caller. Raises
            CoveyError.
        software: name and version, for presence.
        trainer: does the local steps.
        sealer: closes up updates.
        vectors: how work in the outbox holds its vectors.
        downloads: how models are fetched.
        tls_keys: where TLS keys of new names come from.
    """

    store: DeviceStore
    counter: Counter
    clock: Clock
    board: Board
    bell: Bell
    watchdog: Watchdog
    journal: Journal
    entropy: Entropy
    jitter: Entropy
    bundle: Callable[[StudyConfig], ModelBundle]
    graph: Callable[[ModelBundle], Graph]
    aggregator_key: Callable[[StudyConfig], Ed25519PublicKey]
    connect: Callable[[Connection], Transport]
    desk: Callable[[Claim, str], Transport]
    software: str
    trainer: Trainer = LocalTraining
    sealer: Sealer = seal_update
    vectors: WorkVectors = IN_ENTRY
    downloads: Downloads = Download
    tls_keys: TlsKeys = SoftwareTlsKeys()  # noqa: RUF009 - has no state
