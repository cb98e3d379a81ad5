"""One participation in a round, in the only order that is safe: charge, train, seal, store; then it may be sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_client.errors import StoreError
from device_client.events import PendingUpdate
from device_client.ledger import PrivacyLedger
from device_client.noise import Entropy
from device_client.personal import PersonalLayers
from device_client.ports import Float32, Graph, Store
from device_client.training import Evaluation, Records, evaluate, train_locally
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import RoundManifestMsg, UpdateBodyMsg, UpdateEnvelopeMsg, UpdateHeaderMsg, decode
from fl_protocol.sealing import seal_update

_OUTBOX = "outbox/"


class Outbox:
    """Sealed updates on disk, each held from before its first sending until its receipt."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def put(self, pending: PendingUpdate) -> None:
        """Durably keep an update. Raises StoreError when the disk does not take it."""
        self._store.write(_OUTBOX + pending.update_id.hex(), msgspec.msgpack.encode(pending))

    def discard(self, update_id: bytes) -> None:
        """Durably forget an update."""
        self._store.delete(_OUTBOX + update_id.hex())

    def __iter__(self) -> Iterator[PendingUpdate]:
        """All updates that are held, in the order of their names."""
        for name in self._store.names(_OUTBOX):
            data = self._store.read(name)
            if data is not None:
                try:
                    yield msgspec.msgpack.decode(data, type=PendingUpdate)
                except msgspec.DecodeError as error:
                    raise StoreError(f"the outbox entry {name} cannot be read ({error})") from error


@dataclass(frozen=True)
class Participant:
    """All that a participation needs, bound together once per device."""

    device: str
    signing_key: Ed25519PrivateKey
    ledger: PrivacyLedger
    graph: Graph
    records: Records
    personal: PersonalLayers
    outbox: Outbox
    entropy: Entropy

    def participate(self, manifest: RoundManifestMsg, params: Float32, *, now_s: float) -> PendingUpdate:
        """Take part in a round; on return the update is charged for and durably in the outbox.

        Raises:
            BudgetSpentError: the ledger refuses; nothing was computed.
            StoreError: the disk did not take the charge or the update; nothing may be sent.
            TrainingError: training diverged; the charge stands.
            ProtocolError: the recipient key cannot be sealed to; the charge stands.
        """
        # Security: the charge is durable before the first gradient is computed.
        self.ledger.reserve(task=manifest.task, round_number=manifest.round, plan=manifest.plan, now_s=now_s)
        own = self.personal.values
        # All layers are trained with noise on all of them, so what is shared is as private as if all were.
        start = np.concatenate([params, own])
        change = train_locally(self.graph, start, self.records, plan=manifest.plan, entropy=self.entropy)
        self.personal.keep(own + change[len(params) :])
        pending = self._seal(manifest, change[: len(params)])
        self.outbox.put(pending)
        return pending

    def measure(self, params: Float32) -> Evaluation:
        """How a global model, with this device's personal layers, does on its records. Raises TrainingError."""
        return evaluate(self.graph, np.concatenate([params, self.personal.values]), self.records)

    def _seal(self, manifest: RoundManifestMsg, change: Float32) -> PendingUpdate:
        """The update as it will be sent, and resent."""
        update_id = self.entropy(16)
        envelope = seal_update(
            UpdateBodyMsg(num_parameters=len(change), values=np.ascontiguousarray(change, "<f4").tobytes()),
            manifest=manifest,
            device=self.device,
            update_id=update_id,
            signing_key=self.signing_key,
        )
        return PendingUpdate(
            update_id=update_id,
            task=manifest.task,
            round=manifest.round,
            envelope=envelope,
            sealed_digest=sealed_digest_of(envelope),
            deadline_s=manifest.deadline_s,
        )


def sealed_digest_of(envelope: bytes) -> bytes:
    """The digest that a receipt for this envelope must name."""
    outer = decode(envelope, UpdateEnvelopeMsg)
    digest = decode(outer.header, UpdateHeaderMsg).sealed_digest
    if hashlib.sha256(outer.sealed).digest() != digest:
        raise ProtocolError("the envelope's header names other sealed bytes than it carries")
    return digest
