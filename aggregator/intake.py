"""Uploads: chunks come in, updates are admitted and committed, and only then receipts go out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from aggregator.errors import DatabaseError
from aggregator.ingest import AdmittedUpdate, OpenRoundKeys, admit, verify_header
from aggregator.store import AggregatorStore
from fl_protocol.adapters.journal import Journal
from fl_protocol.chunking import Reassembler
from fl_protocol.errors import ProtocolError, RefusalReason, RefusedError
from fl_protocol.messages import ChunkMsg, NackMsg, ReceiptMsg, UpdateHeaderMsg, decode
from fl_protocol.signing import sign
from fl_protocol.topics import UploadTopic, down_topic, parse_upload_topic
from fl_protocol.transport import Received, Transport

STALLED_AFTER_S = 10.0
"""A transfer this old and incomplete gets a NACK that names its missing chunks."""
FORGET_AFTER_S = 120.0
"""A transfer this old is dropped; its sender starts over with its own back-off."""


@dataclass
class Intake:
    """Takes every upload message; see the module docstring."""

    tenant: str
    task: str
    signing_key: Ed25519PrivateKey
    store: AggregatorStore
    transport: Transport
    journal: Journal
    now_s: Callable[[], float]
    _transfers: dict[str, Reassembler] = field(default_factory=dict)
    _nacked_s: dict[bytes, float] = field(default_factory=dict)

    def take(self, message: Received, current: OpenRoundKeys | None) -> bool:
        """Take one chunk; refuse with a typed reason, or drop what nobody known sent.

        Returns:
            Whether it completed an update that is now committed to the open round.
        """
        try:
            topic = parse_upload_topic(message.topic)
            if topic.tenant != self.tenant:
                raise ProtocolError(f"expected tenant {self.tenant}")
        except ProtocolError as error:
            self._count_refusal(RefusalReason.MALFORMED, device="", detail=str(error))
            return False
        try:
            key = self.store.device_key(topic.device)
            if key is None:
                # Nobody to answer: an unknown sender gets nothing, and nothing of it is kept.
                self._count_refusal(RefusalReason.UNKNOWN_DEVICE, device=topic.device, detail="not registered")
                return False
            return self._on_chunk(topic, message.payload, Ed25519PublicKey.from_public_bytes(key), current)
        except RefusedError as refusal:
            self._count_refusal(refusal.reason, device=topic.device, detail=refusal.detail)
            self._nack(topic.device, topic.update_id, refusal.reason, detail=refusal.detail)
        except DatabaseError as error:
            # No receipt was sent, so the device sends again later, when the disk may have room.
            self._note("store_failed", reason=str(error))
        return False

    def _on_chunk(
        self, topic: UploadTopic, payload: bytes, device_key: Ed25519PublicKey, current: OpenRoundKeys | None
    ) -> bool:
        """Reassemble; verify and commit when whole; then the receipt."""
        try:
            chunk = decode(payload, ChunkMsg)
        except ProtocolError as error:
            raise RefusedError(RefusalReason.MALFORMED, str(error)[:200]) from error
        if chunk.transfer_id != topic.update_id or chunk.index != topic.chunk_index:
            raise RefusedError(RefusalReason.MALFORMED, "the chunk does not belong to its topic")
        whole = self._transfers.setdefault(topic.device, Reassembler()).accept(chunk, self.now_s())
        if whole is None:
            return False
        header, sealed = verify_header(
            whole, tenant=self.tenant, task=self.task, device=topic.device, device_key=device_key
        )
        if header.update_id != topic.update_id:
            raise RefusedError(RefusalReason.MALFORMED, "the header names another update than the topic")
        decision = admit(header, sealed, current=current, accepted=self.store)
        now_s = self.now_s()
        if isinstance(decision, AdmittedUpdate):
            self.store.add_update(header, decision.values, bytes_up=len(whole), now_s=now_s)
            self._note(
                "update_accepted",
                round=header.round,
                device=header.device,
                bytes=len(whole),
            )
        self._receipt(header, now_s)
        return isinstance(decision, AdmittedUpdate)

    def _receipt(self, header: UpdateHeaderMsg, now_s: float) -> None:
        """Tell a device that its update is committed; only ever called when it is."""
        receipt = ReceiptMsg(
            tenant=self.tenant,
            task=self.task,
            round=header.round,
            device=header.device,
            update_id=header.update_id,
            sealed_digest=header.sealed_digest,
            accepted_s=now_s,
        )
        self.transport.publish(down_topic(self.tenant, header.device, "receipt"), sign(receipt, self.signing_key))

    def _nack(
        self, device: str, update_id: bytes, reason: RefusalReason, *, missing: bytes = b"", detail: str = ""
    ) -> None:
        """Tell a device why its update was not taken, or which chunks to send again."""
        nack = NackMsg(
            tenant=self.tenant, device=device, update_id=update_id, reason=reason, missing=missing, detail=detail[:400]
        )
        self.transport.publish(down_topic(self.tenant, device, "nack"), sign(nack, self.signing_key))

    def _count_refusal(self, reason: RefusalReason, *, device: str, detail: str) -> None:
        """Log and count a refusal."""
        self._note("update_refused", reason=reason.value, device=device, detail=detail[:200])
        try:
            self.store.count_refusal(reason)
        except DatabaseError as error:
            self._note("store_failed", reason=str(error))

    def ask_for_missing_chunks(self) -> None:
        """NACK transfers that stall, once per `STALLED_AFTER_S`; drop them when they are hopeless."""
        now_s = self.now_s()
        for device, reassembler in self._transfers.items():
            reassembler.forget_before(now_s - FORGET_AFTER_S)
            for update_id, missing in reassembler.stalled(now_s - STALLED_AFTER_S):
                if now_s - self._nacked_s.get(update_id, 0.0) >= STALLED_AFTER_S:
                    self._nacked_s[update_id] = now_s
                    self._nack(device, update_id, RefusalReason.TRUNCATED, missing=missing)
        self._transfers = {device: open_ for device, open_ in self._transfers.items() if len(open_)}
        self._nacked_s = {key: at_s for key, at_s in self._nacked_s.items() if now_s - at_s < FORGET_AFTER_S}

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self.journal.write(event, at_s=self.now_s(), **fields)
