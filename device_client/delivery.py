"""Delivering sealed updates: in chunks, as fast as the broker takes them, until the signed receipt. Pure.

The same bytes every time: an update is never re-noised or re-sealed, so resending releases nothing new. No more than
`WINDOW` messages are handed to the transport before the broker has acknowledged some (which says that the line is free,
and nothing about delivery); the back-off to the next attempt begins when the last one has left. Large updates are
held while the network or the battery speaks against them. A large update that may
be there in part is first asked about: its last chunk is sent alone, and the aggregator answers with what it misses.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from device_client.events import Action, Discard, Note, PendingUpdate, Publish
from device_client.refusals import printable
from fl_protocol.chunking import missing_indices, split
from fl_protocol.errors import RefusalReason
from fl_protocol.integer_noise import Entropy
from fl_protocol.limits import chunk_data_bytes
from fl_protocol.messages import ChunkMsg, NackMsg, ReceiptMsg, encode
from fl_protocol.topics import update_label, upload_topic

FIRST_RETRY_S = 5.0
LONGEST_RETRY_S = 300.0
GRACE_S = 3600.0
"""How long past its round's deadline an update is still offered: the aggregator may hold it and the receipt be lost."""
LEAST_ATTEMPTS = 8
"""How often at least it was offered in this life of the process: the clock alone, which may be wrong, throws nothing
away."""
LARGE_BYTES = 64 * 1024
"""A larger update is sent only when network and battery allow it; less costs hardly more than the connection."""
WINDOW = 8
"""Messages on their way to the broker at a time."""
ASK_FIRST_CHUNKS = 4
"""An update of more chunks than this is asked about before it is sent again."""
SILENT_AFTER = 8
"""After as many attempts without an answer, any update of several chunks is asked about first."""
ANSWER_WITHIN_S = 15.0
"""How long the aggregator may take to say what it misses (it answers about 10 s after the chunk)."""
THROTTLED_S = 600.0
"""How long at most a device that is told to slow down sends nothing of the update; at least half of it."""
LONGEST_EXPIRY_S = 2**32 - 1
"""The most that MQTT can say; a clock that is years behind would ask for more."""

RETRYABLE = frozenset(
    {RefusalReason.MALFORMED, RefusalReason.OVERSIZED, RefusalReason.BAD_SIGNATURE, RefusalReason.UNSEALABLE}
)
"""What only bytes that were changed on the way can be refused for: this device's own are well-formed."""

_WHOLE = frozenset(2**power for power in range(1, 64))
"""Which attempts in a row without an answer send the whole, and do not ask."""


@dataclass
class _Delivery:
    """One update on its way."""

    pending: PendingUpdate
    silence: int  # attempts without an answer, from 0 if parts of it may be at the aggregator, from 1 if none are
    attempts: int = 0
    next_send_s: float = -math.inf
    wait_s: float = 0.0  # from when the last chunk has left to the next attempt
    queue: deque[int] = field(default_factory=deque)  # chunks of this attempt that are not handed over yet
    is_leaving: bool = False  # handed over, and not seen to have left
    was_waited_for: bool = False  # seen not to have left
    answered_s: float = -math.inf  # when a NACK last had missing chunks sent
    answers: int = 0  # NACKs in a row that were answered and told of no progress
    least_missing: float = math.inf
    garbled: tuple[int, str] = (0, "")  # the attempt that was last refused for changed bytes, and how
    deadline_s: float = -math.inf  # the latest that is known
    is_throttled: bool = False  # nothing of it is sent before `next_send_s`

    def __post_init__(self) -> None:
        self.deadline_s = max(self.deadline_s, self.pending.deadline_s)

    def look_at_line(self, now_s: float, *, backlog: int) -> None:
        """The wait for an answer begins when the last chunk has left."""
        longest_s = THROTTLED_S if self.is_throttled else LONGEST_RETRY_S
        self.next_send_s = min(self.next_send_s, now_s + longest_s)  # the clock may have been set back by years
        if self.is_leaving and (backlog or self.was_waited_for or now_s < self.next_send_s):
            self.next_send_s = now_s + self.wait_s
        self.is_leaving = self.was_waited_for = self.is_leaving and backlog > 0


class Deliveries:
    """All updates in the outbox and when each is sent next."""

    def __init__(self, *, tenant: str, entropy: Entropy, outbox: Iterable[PendingUpdate] = ()) -> None:
        self._tenant, self._entropy = tenant, entropy
        self._open = {pending.update_id: _Delivery(pending, silence=0) for pending in outbox}
        self._chunk_bytes: int | None = None
        self._holds_large = True  # until the conditions have been read
        self._window = WINDOW
        self._cut: tuple[bytes, list[ChunkMsg]] = (b"", [])  # the update that is being sent now, in chunks
        self._line_busy_s = -math.inf  # until when it is not asked whether the line is free, unless something happens

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[PendingUpdate]:
        return (delivery.pending for delivery in self._open.values())

    def connected(self, maximum_packet_bytes: int | None, *, receive_maximum: int | None = None) -> None:
        """Send everything again at once: what was in flight when the connection broke may be lost."""
        self._chunk_bytes = chunk_data_bytes(maximum_packet_bytes)
        self._window = WINDOW if receive_maximum is None else min(WINDOW, max(1, receive_maximum))
        self._cut = (b"", [])
        for delivery in self._open.values():
            delivery.least_missing, delivery.is_leaving = math.inf, False
            if not delivery.is_throttled:
                delivery.next_send_s = -math.inf
            delivery.queue.clear()

    def disconnected(self) -> None:
        """Hold everything until the next connection."""
        self._chunk_bytes = None
        self._cut = (b"", [])

    def hold_large(self, *, hold: bool) -> None:
        """Whether large updates wait, those that are on their way included: the network may be a metered one now."""
        self._holds_large = hold

    @property
    def has_large(self) -> bool:
        """Whether `hold_large` matters."""
        return any(_is_large(one) for one in self._open.values())

    def add(self, pending: PendingUpdate) -> None:
        """Take over an update that is in the outbox."""
        self._open[pending.update_id] = _Delivery(pending, silence=1)

    def count_until(self, deadline_s: float, *, since_round: int) -> None:
        """Updates of this round and later ones still count until then: a deadline was moved, or theirs may be late."""
        for delivery in self._open.values():
            if delivery.pending.round >= since_round:
                delivery.deadline_s = max(delivery.deadline_s, deadline_s)

    def next_wake_s(self) -> float:
        """When `due` next has something to do; while the line is busy, its progress wakes it earlier."""
        free = [one for one in self._open.values() if not self._is_held(one)]
        if self._chunk_bytes is None or not free:
            return math.inf
        next_send_s = min(-math.inf if one.queue else one.next_send_s for one in free)
        return max(self._line_busy_s, next_send_s)

    def due(self, now_s: float, *, backlog: int) -> list[Action]:
        """Send what is due; give up what is hopelessly late.

        Args:
            now_s: Unix seconds.
            backlog: messages that the broker has not acknowledged yet.
        """
        actions: list[Action] = []
        if self._chunk_bytes is None:
            return actions
        for delivery in list(self._open.values()):
            pending = delivery.pending
            delivery.look_at_line(now_s, backlog=backlog)
            if self._is_held(delivery):
                continue
            if not delivery.queue and not backlog and now_s >= delivery.next_send_s:
                if now_s > delivery.deadline_s + GRACE_S and delivery.attempts >= LEAST_ATTEMPTS:
                    actions += self._close(pending.update_id, "expired", round=pending.round)
                    continue
                actions.append(self._begin_attempt(delivery, now_s))
            sent = self._hand_over(delivery, now_s, room=self._window - backlog)
            delivery.is_leaving |= bool(sent)
            backlog += len(sent)
            actions += sent
        self._line_busy_s = now_s + FIRST_RETRY_S if backlog else -math.inf
        return actions

    def receipt(self, message: ReceiptMsg) -> list[Action]:
        """A verified receipt: the update is delivered if it names exactly the bytes that were sent."""
        delivery = self._open.get(message.update_id)
        if delivery is None:
            return []  # a second receipt, for a resend that crossed the first
        pending = delivery.pending
        if (message.sealed_digest, message.device) != (pending.sealed_digest, pending.device):
            label = update_label(message.update_id)
            return [Note("receipt_refused", {"update": label, "reason": "it names other bytes than were sent"})]
        return self._close(message.update_id, "delivered", round=pending.round)

    def nack(self, message: NackMsg, now_s: float) -> list[Action]:
        """A verified NACK: send the missing chunks, send all again later, or give the update up."""
        delivery = self._open.get(message.update_id)
        if delivery is None or message.device != delivery.pending.device:
            return []
        if message.reason is RefusalReason.TRUNCATED:
            return self._send_missing(delivery, message.missing, now_s)
        fields = {
            "update": update_label(message.update_id),
            "round": delivery.pending.round,
            "reason": message.reason.value,
            "detail": printable(message.detail, length=400),
        }
        if message.reason in {RefusalReason.THROTTLED, RefusalReason.QUARANTINED}:
            return self._slow_down(delivery, fields, now_s)
        if message.reason not in RETRYABLE:
            return self._close(message.update_id, "refused", **fields)
        # Somebody changed bytes on the way; giving up here would let a broker throw updates away for good. Once an
        # attempt: a replay must not put the next one off for ever.
        known, delivery.garbled = delivery.garbled, (delivery.attempts, message.reason.value)
        if known[0] == delivery.attempts:
            return []
        delivery.queue.clear()
        delivery.silence = 1  # whatever the aggregator holds of it is not worth asking about
        delivery.next_send_s = max(delivery.next_send_s, now_s + self._back_off_s(delivery.attempts))
        return [] if known[1] == delivery.garbled[1] else [Note("update_garbled", fields)]

    def _slow_down(self, delivery: _Delivery, fields: dict[str, object], now_s: float) -> list[Action]:
        """Send nothing of an update for a while; once an attempt, so that a replay puts the next one off only once."""
        if delivery.is_throttled or not delivery.attempts:
            return []
        delivery.queue.clear()
        delivery.silence, delivery.is_throttled = 0, True  # a large one is asked about before it is sent again
        delivery.wait_s = THROTTLED_S * (0.5 + 0.5 * uniform(self._entropy))
        delivery.next_send_s = max(delivery.next_send_s, now_s + delivery.wait_s)
        return [Note(f"update_{fields['reason']}", fields)]

    def _send_missing(self, delivery: _Delivery, bitmap: bytes, now_s: float) -> list[Action]:
        """Queue what a NACK asks for.

        A broker can replay NACKs, and answering each would let it drain the battery: one that tells of no progress is
        answered with back-off, and progress is finite.
        """
        if self._chunk_bytes is None or delivery.is_throttled:
            return []
        missing = missing_indices(bitmap, -(-len(delivery.pending.envelope) // self._chunk_bytes))
        is_progress = len(missing) < delivery.least_missing
        pause_s = FIRST_RETRY_S if is_progress else _longest_back_off_s(delivery.answers)
        if abs(now_s - delivery.answered_s) < pause_s:  # either way: the clock may have been set back
            return []
        delivery.least_missing = min(delivery.least_missing, len(missing))
        delivery.answered_s, delivery.answers = now_s, 1 if is_progress else delivery.answers + 1
        delivery.queue = deque(missing)
        delivery.silence = 0  # it answers, so it is worth asking again
        delivery.wait_s = self._back_off_s(delivery.attempts)
        delivery.next_send_s = now_s + delivery.wait_s
        pending = delivery.pending
        about = {"update": update_label(pending.update_id), "round": pending.round, "missing": len(missing)}
        return [Note("update_incomplete", about)]

    def _is_held(self, delivery: _Delivery) -> bool:
        """Whether an update waits for better conditions."""
        return self._holds_large and _is_large(delivery)

    def _close(self, update_id: bytes, outcome: str, **fields: object) -> list[Action]:
        """Take an update out of the outbox and say why."""
        number = self._open.pop(update_id).pending.round
        told = {"update": update_label(update_id), **fields}
        return [Discard(update_id, number, outcome), Note(f"update_{outcome}", told)]

    def _begin_attempt(self, delivery: _Delivery, now_s: float) -> Note:
        """Queue what this attempt sends: all chunks, or one that asks where a large update stands."""
        pending, chunks = delivery.pending, self._chunks(delivery.pending)
        delivery.is_throttled = False
        delivery.attempts += 1
        delivery.silence += 1
        is_worth_asking = len(chunks) > (ASK_FIRST_CHUNKS if delivery.silence <= SILENT_AFTER else 1)
        # An aggregator that is there says what it misses. If nothing ever answers, the whole is sent ever more rarely
        # (the 2nd, 4th, 8th, 16th time...): a silent broker must not have a device upload all day.
        asks = is_worth_asking and delivery.silence not in _WHOLE
        delivery.queue = deque([len(chunks) - 1] if asks else range(len(chunks)))
        delivery.wait_s = max(ANSWER_WITHIN_S if asks else 0.0, self._back_off_s(delivery.attempts))
        delivery.next_send_s = now_s + delivery.wait_s
        label = update_label(pending.update_id)
        fields = {"update": label, "round": pending.round, "attempt": delivery.attempts, "bytes": len(pending.envelope)}
        return Note("update_asked_about" if asks else "update_sent", fields)

    def _hand_over(self, delivery: _Delivery, now_s: float, *, room: int) -> list[Action]:
        """Publish the next queued chunks, as many as the transport has room for."""
        actions: list[Action] = []
        pending = delivery.pending
        while delivery.queue and len(actions) < room:
            chunk = self._chunks(pending)[delivery.queue.popleft()]
            topic = upload_topic(self._tenant, pending.device, pending.update_id, chunk.index)
            expires_s = min(max(1, int(delivery.deadline_s - now_s)), LONGEST_EXPIRY_S)
            actions.append(Publish(topic, encode(chunk), expires_s=expires_s))
        return actions

    def _chunks(self, pending: PendingUpdate) -> list[ChunkMsg]:
        """An update's chunks; those of one update are held, so that memory stays bounded."""
        if pending.update_id != self._cut[0]:
            chunks = split(pending.update_id, pending.envelope, data_bytes=self._chunk_bytes or 0)
            self._cut = (pending.update_id, list(chunks))
        return self._cut[1]

    def _back_off_s(self, attempts: int) -> float:
        """Exponential, with the upper half jittered so that a fleet does not resend in step."""
        return _longest_back_off_s(attempts) * (0.5 + 0.5 * uniform(self._entropy))


def _is_large(delivery: _Delivery) -> bool:
    """Whether sending it is felt on a metered network or a low battery."""
    return len(delivery.pending.envelope) > LARGE_BYTES


def _longest_back_off_s(attempts: int) -> float:
    """Without jitter, after this many attempts."""
    return min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(max(attempts, 1) - 1, 10))


def uniform(entropy: Entropy) -> float:
    """A number in [0, 1) with 53 random bits."""
    return float(int.from_bytes(entropy(8), "little") >> 11) / float(2**53)
