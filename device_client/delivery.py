"""Delivering sealed updates: sent in chunks, resent with back-off and jitter, held until the signed receipt. Pure.

The same bytes every time: an update is never re-noised or re-sealed, so resending releases nothing new.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from device_client.events import Action, Discard, Note, PendingUpdate, Publish
from device_client.noise import Entropy
from fl_protocol.chunking import missing_indices, split
from fl_protocol.errors import RefusalReason
from fl_protocol.limits import chunk_data_bytes
from fl_protocol.messages import NackMsg, ReceiptMsg, encode
from fl_protocol.topics import upload_topic

FIRST_RETRY_S = 5.0
LONGEST_RETRY_S = 300.0
GRACE_S = 3600.0
"""How long past its round's deadline an update is still offered: the aggregator may hold it and the receipt be lost."""


@dataclass
class _Delivery:
    """One update on its way."""

    pending: PendingUpdate
    attempts: int = 0
    next_send_s: float = 0.0
    asked_s: float = -math.inf  # when a NACK last had missing chunks sent


class Deliveries:
    """All updates in the outbox and when each is sent next."""

    def __init__(self, *, tenant: str, device: str, entropy: Entropy, outbox: Iterable[PendingUpdate] = ()) -> None:
        self._tenant, self._device, self._entropy = tenant, device, entropy
        self._open = {pending.update_id: _Delivery(pending) for pending in outbox}
        self._chunk_bytes: int | None = None

    def __len__(self) -> int:
        return len(self._open)

    def connected(self, maximum_packet_bytes: int | None) -> None:
        """Send everything again at once: what was in flight when the connection broke may be lost."""
        self._chunk_bytes = chunk_data_bytes(maximum_packet_bytes)
        for delivery in self._open.values():
            delivery.next_send_s = 0.0

    def disconnected(self) -> None:
        """Hold everything until the next connection."""
        self._chunk_bytes = None

    def add(self, pending: PendingUpdate) -> None:
        """Take over an update that is in the outbox."""
        self._open[pending.update_id] = _Delivery(pending)

    def next_wake_s(self) -> float | None:
        """When `due` next has something to do."""
        if self._chunk_bytes is None or not self._open:
            return None
        return min(delivery.next_send_s for delivery in self._open.values())

    def due(self, now_s: float) -> list[Action]:
        """Send what is due; give up what is hopelessly late."""
        actions: list[Action] = []
        if self._chunk_bytes is None:
            return actions
        for delivery in list(self._open.values()):
            pending = delivery.pending
            if now_s > pending.deadline_s + GRACE_S:
                actions += self._close(pending.update_id, "update_expired", round=pending.round)
            elif now_s >= delivery.next_send_s:
                delivery.attempts += 1
                delivery.next_send_s = now_s + self._back_off_s(delivery.attempts)
                actions += self._chunks(pending, now_s)
                actions.append(
                    Note(
                        "update_sent",
                        {"round": pending.round, "attempt": delivery.attempts, "bytes": len(pending.envelope)},
                    )
                )
        return actions

    def receipt(self, message: ReceiptMsg) -> list[Action]:
        """A verified receipt: the update is delivered if it names exactly the bytes that were sent."""
        delivery = self._open.get(message.update_id)
        if delivery is None:
            return []  # a second receipt, for a resend that crossed the first
        if message.sealed_digest != delivery.pending.sealed_digest or message.device != self._device:
            return [Note("receipt_refused", {"reason": "it names other bytes than were sent"})]
        return self._close(message.update_id, "update_delivered", round=delivery.pending.round)

    def nack(self, message: NackMsg, now_s: float) -> list[Action]:
        """A verified NACK: send the missing chunks, or give the update up."""
        delivery = self._open.get(message.update_id)
        if delivery is None or message.device != self._device:
            return []
        if message.reason is RefusalReason.TRUNCATED:
            # A NACK can be replayed by the broker; answering each would let it drain the battery.
            if self._chunk_bytes is None or now_s < delivery.asked_s + FIRST_RETRY_S:
                return []
            delivery.asked_s = now_s
            return self._chunks(delivery.pending, now_s, only=message.missing)
        fields = {"round": delivery.pending.round, "reason": message.reason.value, "detail": message.detail}
        return self._close(message.update_id, "update_refused", **fields)

    def _close(self, update_id: bytes, event: str, **fields: object) -> list[Action]:
        """Take an update out of the outbox and say why."""
        del self._open[update_id]
        return [Discard(update_id), Note(event, fields)]

    def _chunks(self, pending: PendingUpdate, now_s: float, *, only: bytes | None = None) -> list[Action]:
        """Publish actions for an update's chunks, or for those in the bitmap `only`."""
        if self._chunk_bytes is None:
            return []
        chunks = list(split(pending.update_id, pending.envelope, data_bytes=self._chunk_bytes))
        wanted = range(len(chunks)) if only is None else missing_indices(only, len(chunks))
        expires_s = max(1, int(pending.deadline_s - now_s))
        return [
            Publish(
                upload_topic(self._tenant, self._device, pending.update_id, index),
                encode(chunks[index]),
                expires_s=expires_s,
            )
            for index in wanted
        ]

    def _back_off_s(self, attempts: int) -> float:
        """Exponential, with the upper half jittered so that a fleet does not resend in step."""
        longest = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(attempts - 1, 10))
        return longest * (0.5 + 0.5 * uniform(self._entropy))


def uniform(entropy: Entropy) -> float:
    """A number in [0, 1) with 53 random bits."""
    return float(int.from_bytes(entropy(8), "little") >> 11) / float(2**53)
