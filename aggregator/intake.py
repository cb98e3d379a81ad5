"""Uploads: chunks come in, updates are admitted and committed, and only then receipts go out.

A device that lost its connection asks where it stands with a single chunk. If its update is committed, the receipt
comes at once; else, when the transfer stays quiet, a NACK with the missing chunks, whether or not that chunk was
news. The
chunk proves nothing, and need not: the receipt is true whoever asked, and goes to the update's own device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from aggregator.errors import DatabaseError
from aggregator.ingest import AcceptedUpdate, AdmittedUpdate, OpenRoundKeys, admit, verify_header
from aggregator.store import AggregatorStore
from fl_protocol.adapters.journal import Journal
from fl_protocol.chunking import Reassembler
from fl_protocol.errors import ProtocolError, RefusalReason, RefusedError
from fl_protocol.messages import ChunkMsg, NackMsg, ReceiptMsg, decode
from fl_protocol.signing import sign
from fl_protocol.topics import UploadTopic, down_topic, parse_upload_topic
from fl_protocol.transport import Received, Transport

STALLED_AFTER_S = 10.0
"""A transfer this long without a chunk, and incomplete, gets a NACK that names its missing chunks."""
FORGET_AFTER_S = 120.0
"""A transfer this long without a chunk is dropped; its sender starts over with its own back-off."""
RECEIPT_EVERY_S = 1.0
"""Chunks of an update that is committed get its receipt at most this often."""


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
    # By device too: nobody's transfers may keep another device from its answers.
    _nacked_s: dict[tuple[str, bytes], float] = field(default_factory=dict)
    _receipted_s: dict[tuple[str, bytes], float] = field(default_factory=dict)

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
            key = self.store.device_key(topic.device, self.now_s())
            if key is None:
                # Nobody to answer: an unknown sender gets nothing, and nothing of it is kept.
                self._count_refusal(
                    RefusalReason.UNKNOWN_DEVICE, device=topic.device, detail="not registered, or not its time"
                )
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
        """Reassemble; verify and commit when whole; then the receipt. At once if it is committed already."""
        try:
            chunk = decode(payload, ChunkMsg)
        except ProtocolError as error:
            raise RefusedError(RefusalReason.MALFORMED, str(error)[:200]) from error
        if chunk.transfer_id != topic.update_id or chunk.index != topic.chunk_index:
            raise RefusedError(RefusalReason.MALFORMED, "the chunk does not belong to its topic")
        transfers = self._transfers.setdefault(topic.device, Reassembler())
        if topic.update_id not in transfers:  # only ever open for what is not committed
            known = self.store.accepted(topic.update_id)
            if known is not None and known.device == topic.device:
                self._repeat_receipt(known)
                return False
        whole = transfers.accept(chunk, self.now_s())
        if whole is None:
            return False
        header, sealed = verify_header(
            whole,
            tenant=self.tenant,
            task=self.task,
            device=topic.device,
            device_key=device_key,
            update_id=topic.update_id,
        )
        decision = admit(header, sealed, current=current, accepted=self.store)
        if not isinstance(decision, AdmittedUpdate):
            self._repeat_receipt(decision.update)
            return False
        now_s = self.now_s()
        self.store.add_update(header, decision.values, bytes_up=len(whole), now_s=now_s)
        self._note("update_accepted", round=header.round, device=header.device, bytes=len(whole))
        self._receipt(AcceptedUpdate(header.update_id, header.device, header.round, header.sealed_digest, now_s))
        return True

    def _repeat_receipt(self, update: AcceptedUpdate) -> None:
        """Answer a chunk of a committed update, unless that was done a moment ago: it has a thousand chunks perhaps."""
        if not _within(RECEIPT_EVERY_S, self._receipted_s.get((update.device, update.update_id)), self.now_s()):
            self._receipt(update)

    def _receipt(self, update: AcceptedUpdate) -> None:
        """Tell a device that its update is committed; only ever called when it is."""
        receipt = ReceiptMsg(
            tenant=self.tenant,
            task=self.task,
            round=update.round,
            device=update.device,
            update_id=update.update_id,
            sealed_digest=update.sealed_digest,
            accepted_s=update.accepted_s,
        )
        self._receipted_s[update.device, update.update_id] = self.now_s()
        self.transport.publish(down_topic(self.tenant, update.device, "receipt"), sign(receipt, self.signing_key))

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
        """NACK transfers that went quiet, once per `STALLED_AFTER_S`; drop them when they are hopeless."""
        now_s = self.now_s()
        for device, reassembler in self._transfers.items():
            reassembler.forget_before(now_s - FORGET_AFTER_S)
            for update_id in reassembler.quiet_since(now_s - STALLED_AFTER_S):
                if not _within(STALLED_AFTER_S, self._nacked_s.get((device, update_id)), now_s):
                    self._nacked_s[device, update_id] = now_s
                    missing = reassembler.missing(update_id)
                    self._nack(device, update_id, RefusalReason.TRUNCATED, missing=missing)
        self._transfers = {device: open_ for device, open_ in self._transfers.items() if len(open_)}
        self._nacked_s = {key: at_s for key, at_s in self._nacked_s.items() if _within(FORGET_AFTER_S, at_s, now_s)}
        self._receipted_s = {
            key: at_s for key, at_s in self._receipted_s.items() if _within(RECEIPT_EVERY_S, at_s, now_s)
        }

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self.journal.write(event, at_s=self.now_s(), **fields)


def _within(duration_s: float, since_s: float | None, now_s: float) -> bool:
    """Whether it happened, and less than a duration ago; a clock that was set back has nobody wait for its return."""
    return since_s is not None and 0 <= now_s - since_s < duration_s
