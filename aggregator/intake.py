"""Uploads: chunks come in, whole updates are committed in batches, and only then receipts go out.

A device that lost its connection asks where it stands with a single chunk. If its update is committed, the receipt
comes at once; else, when the transfer stays quiet, a NACK with the missing chunks, whether or not that chunk was
news. The chunk proves nothing, and need not: the receipt is true whoever asked, and goes to the update's own device.

The broker is told to forget a message when what it carried is committed or refused, or when it was held for long
(`aggregator.transfers.HeldMessages`). When the database fails, whole updates wait here; once too many do, further ones
are dropped, and their devices send them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from aggregator.answers import Answers
from aggregator.batches import Batches, Commits
from aggregator.committer import Accepted, Committer, PendingUpdate, Verdict
from aggregator.register_cache import RegisterCache
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.updates import AcceptedUpdate
from aggregator.throttle import Repetitions, Throttle
from aggregator.transfers import HeldMessages, Key, Transfers
from fl_protocol.adapters.journal import Journal
from fl_protocol.errors import ProtocolError, RefusalReason, RefusedError
from fl_protocol.messages import ChunkView, decode
from fl_protocol.recency import happened_within
from fl_protocol.topics import UploadTopic, parse_upload_topic, update_label
from fl_protocol.transport import Received, Transport

STALLED_AFTER_S = 10.0
"""A transfer this long without a chunk, and incomplete, gets a NACK that names its missing chunks."""
FORGET_AFTER_S = 120.0
"""A transfer this long without a chunk is dropped; its sender starts over with its own back-off."""
ANSWER_EVERY_S = 1.0
"""Chunks of an update that is committed get its receipt at most this often."""
REFUSE_EVERY_S = 1.0
"""Refused chunks of one update get a NACK at most this often."""
TELL_REFUSALS_EVERY_S = 10.0
"""The journal is told of a device's refusals for one reason at most this often, and of all strangers' too."""
NAME_EVERY_S = 60.0
"""A device that is throttled is named, and told, at most this often."""
MOST_ANSWERS = 64
"""Answers that are sent before the next messages are looked at."""
MOST_HELD_MESSAGES = 200
"""Unacknowledged messages of updates that are not whole, of the thousand that the broker sends before it waits."""
MOST_MESSAGES_BEHIND = 400
"""Messages that may have come after the first of an update that is not whole; acknowledgements go out in order, and a
slow device's would keep all others' back until the broker sends no more."""
MOST_HELD_MESSAGES_OF_WHOLE = 500
"""And of whole updates that are not decided yet."""
MOST_MESSAGES_OF_ONE = 8
"""Of a whole update that came in more none is held: a few such would take all of them, and the broker's time."""


class IntakeLimits(NamedTuple):
    """What half-received updates and single devices may take; see `aggregator.config.AggregatorSection`."""

    reassembly_bytes: int = 256 * 2**20
    device_bytes_a_minute: int = 48 * 2**20
    device_transfers_a_minute: int = 60


class _Arrival(NamedTuple):
    """A chunk of a registered device, or why it is none."""

    key: Key
    chunk: ChunkView | RefusedError


class Intake:
    """See the module docstring.

    Args:
        tenant: name on the wire.
        store: the database.
        committer: counts refusals.
        answers: tells devices.
        transport: acknowledges messages.
        journal: where events are told.
        now_s: Unix seconds.
        limits: what is taken at most.
        commits: whole updates.
    """

    def __init__(
        self,
        *,
        tenant: str,
        store: AggregatorStore,
        committer: Committer,
        answers: Answers,
        transport: Transport,
        journal: Journal,
        now_s: Callable[[], float],
        limits: IntakeLimits,
        commits: Commits,
    ) -> None:
        self._tenant, self._store, self._committer, self._answers = tenant, store, committer, answers
        self._transport, self._journal, self._now_s = transport, journal, now_s
        self.batches = Batches(commits, now_s)
        self._register = RegisterCache(store.devices)
        self._transfers = Transfers(limits.reassembly_bytes)
        self._held = HeldMessages(MOST_HELD_MESSAGES, most_behind=MOST_MESSAGES_BEHIND)
        self._held_whole = HeldMessages(MOST_HELD_MESSAGES_OF_WHOLE)
        self._throttle = Throttle(
            bytes_a_minute=limits.device_bytes_a_minute, transfers_a_minute=limits.device_transfers_a_minute
        )
        self._unanswered: list[tuple[Key, Verdict]] = []
        # By device too: nobody's transfers may keep another device from its answers.
        self._nacked_s: dict[Key, float] = {}
        self._receipted_s: dict[Key, float] = {}
        self._refused_s: dict[Key, float] = {}
        self._named_s: dict[str, float] = {}
        self._repetitions = Repetitions(TELL_REFUSALS_EVERY_S)

    @property
    def has_answers(self) -> bool:
        """Whether somebody has not been told what was decided."""
        return bool(self._unanswered)

    def take(self, messages: Sequence[Received]) -> None:
        """Take chunks; refuse with a typed reason, or drop what nobody known sent.

        Raises:
            DatabaseError: what was not taken yet is dropped, as at any error; its devices send it again.
        """
        taken = 0
        try:
            topics = [self._topic(message) for message in messages]
            self._register.look_up({topic.device for topic in topics if topic is not None}, self._now_s())
            arrivals = [self._arrival(*pair) for pair in zip(messages, topics, strict=True)]
            committed = self._committed(arrivals)
            for message, arrival in zip(messages, arrivals, strict=True):
                self._take(message, arrival, committed)
                taken += 1
        finally:
            self.drop(messages[taken:])
            self._acknowledge(self._held.passed_by(len(messages)))

    def drop(self, messages: Iterable[Received]) -> None:
        """Take nothing: their devices send them again."""
        self._acknowledge(messages)

    def _arrival(self, message: Received, topic: UploadTopic | None) -> _Arrival | None:
        """A chunk and who sent it; None for what nobody known sent, which gets no answer, and nothing of it is kept."""
        if topic is None:
            return None
        if not self._register.is_registered(topic.device, self._now_s()):
            refusal = RefusedError(RefusalReason.UNKNOWN_DEVICE, "not registered, or not its time")
            self._count(refusal, device=topic.device, update_id=topic.update_id)
            return None
        key = (topic.device, topic.update_id)
        try:
            chunk = decode(message.payload, ChunkView)
        except ProtocolError as error:
            return _Arrival(key, RefusedError(RefusalReason.MALFORMED, str(error)[:200]))
        if chunk.transfer_id != topic.update_id or chunk.index != topic.chunk_index:
            return _Arrival(key, RefusedError(RefusalReason.MALFORMED, "the chunk does not belong to its topic"))
        return _Arrival(key, chunk)

    def _committed(self, arrivals: Iterable[_Arrival | None]) -> dict[Key, AcceptedUpdate]:
        """Those of the updates that seem to begin which are committed; a single chunk is looked up with its batch."""
        now_s = self._now_s()
        begun = {
            one.key
            for one in arrivals
            if one is not None
            and isinstance(one.chunk, ChunkView)
            and one.chunk.count > 1
            and one.key not in self._transfers
            and not happened_within(ANSWER_EVERY_S, self._receipted_s.get(one.key), now_s)
        }
        if not begun:
            return {}
        found = self._store.updates.accepted({update_id for _, update_id in begun}).values()
        return {(one.device, one.update_id): one for one in found if (one.device, one.update_id) in begun}

    def _take(self, message: Received, arrival: _Arrival | None, committed: Mapping[Key, AcceptedUpdate]) -> None:
        """Take one chunk."""
        if arrival is None:
            self._transport.acknowledge(message)
            return
        try:
            self._on_chunk(message, arrival, committed)
        except RefusedError as refusal:
            self._refuse_chunk(arrival.key, refusal)
            self._done_with(arrival.key, message)

    def collect(self, wait_s: float = 0.0) -> None:
        """Take over what was decided since the last look; `answer` tells everybody.

        Args:
            wait_s: for the first, if nothing was.

        Raises:
            DatabaseError: what is whole is kept for the next time.
        """
        while (decided := self.batches.decided(wait_s)) is not None:
            for index, why in decided.unusable.items():
                device, update_id = decided.keys[index]
                self._note("update_unusable", device=device, update=update_label(update_id), reason=why)
            self._unanswered += zip(decided.keys, decided.verdicts, strict=True)
            wait_s = 0.0

    def answer(self) -> int:
        """Tell some what came of their update, and the broker that it is done with; how many updates are new."""
        answers, self._unanswered = self._unanswered[:MOST_ANSWERS], self._unanswered[MOST_ANSWERS:]
        for key, verdict in answers:
            self._answer(key, verdict)
        return sum(isinstance(verdict, Accepted) and verdict.is_new for _, verdict in answers)

    def look_after_transfers(self) -> None:
        """NACK transfers that went quiet, once per `STALLED_AFTER_S`; drop them when they are hopeless."""
        now_s = self._now_s()
        self._transfers.forget_before(now_s - FORGET_AFTER_S)
        for key, missing in list(self._transfers.quiet_since(now_s - STALLED_AFTER_S)):
            if not happened_within(STALLED_AFTER_S, self._nacked_s.get(key), now_s):
                self._nacked_s[key] = now_s
                self._tell("update_incomplete", key, now_s, missing=sum(byte.bit_count() for byte in missing))
                self._answers.nack(*key, RefusalReason.TRUNCATED, missing=missing)
        self._nacked_s = _younger(self._nacked_s, FORGET_AFTER_S, now_s)
        self._receipted_s = _younger(self._receipted_s, ANSWER_EVERY_S, now_s)
        self._refused_s = _younger(self._refused_s, REFUSE_EVERY_S, now_s)
        for told in self._repetitions.overdue(now_s):
            self._note_told(told)
        self._named_s = _younger(self._named_s, NAME_EVERY_S, now_s)
        self._throttle.forget(now_s)
        self._register.forget(now_s)

    def release_held(self) -> None:
        """The broker has gone quiet and may be waiting: let it forget what updates that are not whole came in."""
        self._acknowledge(self._held.release_all())

    def _topic(self, message: Received) -> UploadTopic | None:
        """The parts of an upload's topic; None for what is not one of this tenant's."""
        try:
            topic = parse_upload_topic(message.topic)
            if topic.tenant != self._tenant:
                raise ProtocolError(f"expected tenant {self._tenant}")
        except ProtocolError as error:
            self._count(RefusedError(RefusalReason.MALFORMED, str(error)), device="")
            return None
        return topic

    def _on_chunk(self, message: Received, arrival: _Arrival, committed: Mapping[Key, AcceptedUpdate]) -> None:
        """Reassemble; put aside for the next commit when whole. Raises RefusedError."""
        key, now_s = arrival.key, self._now_s()
        was_answered = happened_within(ANSWER_EVERY_S, self._receipted_s.get(key), now_s)
        begins = key not in self._transfers and not was_answered
        slowed = self._throttle.why_not(key[0], len(message.payload), begins=begins, now_s=now_s)
        if slowed:
            self._slow_down(key, slowed, now_s)
        # A whole that is sent again is many chunks, and its device has had its receipt.
        if slowed or was_answered:
            self._done_with(key, message)
            return
        if isinstance(arrival.chunk, RefusedError):
            raise arrival.chunk
        if key in committed:
            self._receipt_again(committed[key])
            self._done_with(key, message)
            return
        parts = self._transfers.accept(key[0], arrival.chunk, now_s)
        # Without its payload, of which the transfer has what is needed, and frees it sooner.
        kept = Received(message.topic, b"", message.delivery)
        if parts is None:
            self._acknowledge(self._held.hold(key, kept))
        else:
            self._put_aside(PendingUpdate(*key, parts), [*self._held.release(key), kept])

    def _put_aside(self, update: PendingUpdate, messages: Sequence[Received]) -> None:
        """Keep a whole update for the next commit, unless there is no room: its device sends it again."""
        if not self.batches.add(update):
            self._acknowledge(messages)
            label = update_label(update.update_id)
            self._note(
                "update_dropped", device=update.device, update=label, reason="too many updates wait for the database"
            )
            return
        if len(messages) > MOST_MESSAGES_OF_ONE:
            self._acknowledge(messages)
            return
        for message in messages:
            self._acknowledge(self._held_whole.hold((update.device, update.update_id), message))

    def _answer(self, key: Key, verdict: Verdict) -> None:
        """Tell a device what came of its update, and the broker that it is done with."""
        device, update_id = key
        if isinstance(verdict, Accepted):
            if verdict.is_new:
                self._note(
                    "update_accepted",
                    task=verdict.update.task,
                    round=verdict.update.round,
                    device=device,
                    update=update_label(update_id),
                    bytes=verdict.bytes_up,
                )
                self._receipt(verdict.update)
            else:
                self._receipt_again(verdict.update)
        elif verdict is None:
            self._note("update_deferred", device=device, update=update_label(update_id))
        elif verdict.reason is RefusalReason.UNKNOWN_DEVICE:
            self._count(verdict, device=device, update_id=update_id)  # thrown out a moment ago; nobody to answer
        else:
            self._refuse(device, update_id, verdict)
        self._acknowledge(self._held_whole.release(key))

    def _receipt(self, update: AcceptedUpdate) -> None:
        """Tell a device that its update is committed."""
        self._receipted_s[update.device, update.update_id] = self._now_s()
        self._answers.receipt(update)

    def _receipt_again(self, update: AcceptedUpdate) -> None:
        """Tell a device once more; the first receipt was lost, or crossed what it sent again."""
        about = {"task": update.task, "round": update.round}
        self._tell("receipt_repeated", (update.device, update.update_id), self._now_s(), **about)
        self._receipt(update)

    def _tell(self, event: str, key: Key, now_s: float, **fields: object) -> None:
        """Tell the journal of what a device can have happen as often as it likes: of each device now and then."""
        device, update_id = key
        self._tell_once((device, event), now_s, event=event, device=device, update=update_label(update_id), **fields)

    def _refuse(self, device: str, update_id: bytes, refusal: RefusedError) -> None:
        """Tell a device why its update was not taken."""
        self._count(refusal, device=device, update_id=update_id)
        self._answers.nack(device, update_id, refusal.reason, detail=refusal.detail)

    def _refuse_chunk(self, key: Key, refusal: RefusedError) -> None:
        """Tell a device why a chunk was not taken; not at every chunk."""
        now_s = self._now_s()
        if happened_within(REFUSE_EVERY_S, self._refused_s.get(key), now_s):
            self._count(refusal, device=key[0], update_id=key[1])
            return
        self._refused_s[key] = now_s
        self._refuse(*key, refusal)

    def _slow_down(self, key: Key, why: str, now_s: float) -> None:
        """Name a device that sends too much, and tell it; not at every chunk."""
        device, update_id = key
        if not happened_within(NAME_EVERY_S, self._named_s.get(device), now_s):
            self._named_s[device] = now_s
            self._note("device_throttled", device=device, update=update_label(update_id), reason=why)
            self._committer.count_refusal("", RefusalReason.THROTTLED)
            self._answers.nack(device, update_id, RefusalReason.THROTTLED, detail=why)

    def _count(self, refusal: RefusedError, *, device: str, update_id: bytes = b"") -> None:
        """Count a refusal, and tell the journal, unless it was told of many like it."""
        self._committer.count_refusal("", refusal.reason)
        reason = refusal.reason.value
        # Strangers choose their names, and share one line.
        who = "" if refusal.reason is RefusalReason.UNKNOWN_DEVICE else device
        label = {"update": update_label(update_id)} if update_id else {}
        fields = {"reason": reason, "device": device, **label, "detail": refusal.detail[:200]}
        self._tell_once((who, reason), self._now_s(), event="update_refused", **fields)

    def _tell_once(self, kind: tuple[str, str], now_s: float, **fields: object) -> None:
        """Tell the journal, unless it was told of many like it."""
        if (told := self._repetitions.tell(kind, fields, now_s)) is not None:
            self._note_told(told)

    def _done_with(self, key: Key, message: Received) -> None:
        """Nothing more comes of this message, nor of what is held for its update."""
        self._acknowledge([*self._held.release(key), message])

    def _acknowledge(self, messages: Iterable[Received]) -> None:
        """Let the broker forget messages."""
        for message in messages:
            self._transport.acknowledge(message)

    def _note_told(self, told: Mapping[str, object]) -> None:
        """Write what `Repetitions` lets through to the journal."""
        self._note(str(told["event"]), **{name: value for name, value in told.items() if name != "event"})

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self._journal.write(event, at_s=self._now_s(), **fields)


def _younger(times: dict, duration_s: float, now_s: float) -> dict:  # type: ignore[type-arg]
    """Those that happened less than a duration ago."""
    return {key: at_s for key, at_s in times.items() if happened_within(duration_s, at_s, now_s)}
