"""One study at work on a device: carries out what its session asks for, through ports only.

Training goes step by step between messages; what the daemon calls `advance` does one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from device_client.deliveries_log import record_outcome
from device_client.device_store import drop_chunks, keep_chunk, keep_model, read_model, save_session
from device_client.errors import StoreError
from device_client.events import (
    Abandon,
    Action,
    ConditionsRead,
    CountRecords,
    Discard,
    DropChunks,
    Evaluate,
    Event,
    KeepChunk,
    KeepModel,
    ModelRead,
    Note,
    Participate,
    ParticipationEnded,
    PendingUpdate,
    Publish,
    ReadModel,
    ReasonRead,
    RecordsCounted,
    Remember,
    Subscribe,
    Tick,
    Unsubscribe,
    UpdateReady,
)
from device_client.joining.joiner import Joiner
from device_client.joining.session import Offline
from device_client.new_records import NewRecords
from device_client.participation import LocalWork, Participant
from device_client.ports import Clock, Float32, Store, Transport
from device_client.session import DeviceSession
from device_client.session_config import Role
from device_client.training import Evaluation
from fl_protocol.adapters.journal import Journal
from fl_protocol.errors import CoveyError
from fl_protocol.messages import PresenceReason, RoundManifestMsg
from fl_protocol.transport import Received, TransportEvent

MOST_EVENTS = 64
"""Messages taken in one go, before training gets its turn."""
RETRY_SEALING_S = 60.0
"""A disk that did not take the sealed update, or did not delete what was given up, is tried again after this long."""


@dataclass
class StudyRunner:
    """See the module docstring.

    Args:
        role: what the device does in the study; it decides what the journal is told of measurements.
        new_records: the rule about new records; None without.
        work: what was interrupted and goes on.
        joiner: whose requests for further names go over this connection too; None where there are none.
        reason: reads why the device is not training, for its presence.
    """

    study: str
    session: DeviceSession
    participant: Participant
    store: Store
    transport: Transport
    clock: Clock
    journal: Journal
    role: Role = "train"
    new_records: NewRecords | None = None
    work: LocalWork | None = None
    joiner: Joiner | None = None
    reason: Callable[[], PresenceReason] = lambda: ""
    measured: dict[str, Evaluation] = field(default_factory=dict)
    measured_round: int = 0
    last_problem: str = ""
    _seal_again_s: float = 0.0
    _sweep_again_s: float = 0.0
    _worked: tuple[int, str] | None = None  # the round and update that were last worked on

    def __post_init__(self) -> None:
        if self.work is not None:
            self._worked = self.work.manifest.round, self.work.update
        self._handlers: dict[type, Callable[..., None]] = {
            Publish: lambda a: self.transport.publish(a.topic, a.payload, retain=a.retain, expires_s=a.expires_s),
            Subscribe: lambda a: self.transport.subscribe(a.topic_filter),
            Unsubscribe: lambda a: self.transport.unsubscribe(a.topic_filter),
            Remember: lambda a: save_session(self.store, a.state),
            KeepChunk: lambda a: keep_chunk(self.store, self.study, a.digest, index=a.index, payload=a.payload),
            DropChunks: lambda a: drop_chunks(self.store, self.study, a.digests),
            KeepModel: lambda a: keep_model(self.store, self.study, a.digest, a.params),
            ReadModel: self._read_model,
            Note: self._session_note,
            Discard: self._discard,
            CountRecords: self._count_records,
            Participate: self._participate,
            Abandon: self._abandon,
            Evaluate: lambda a: self._measure(a.manifest, a.params),
        }

    def take_events(self) -> int:
        """Hand what came from the broker to the session; how many messages that was."""
        for count in range(MOST_EVENTS):
            event = self.transport.poll(0.0)
            if event is None:
                return count
            if not self._is_the_desks(event):
                self.tell(event)
        return MOST_EVENTS

    def _is_the_desks(self, event: TransportEvent) -> bool:
        """Whether an event is an answer of the enrolment desk's, which is handed over; it is no business of rounds."""
        if self.joiner is None or self.joiner.client != self.participant.device:
            return False
        if isinstance(event, Received) and self.joiner.takes(event.topic):
            self.joiner.tell(event, self.transport)
            return True
        if not isinstance(event, Received):  # its subscription has to be made anew
            self.joiner.tell(Offline(), None)
        return False

    def tell(self, event: Event) -> None:
        """Hand one event to the session and do what it asks for."""
        self._execute(self.session.handle(event, self.clock.now_s(), backlog=self.transport.backlog()))

    def tick(self, conditions: ConditionsRead | None) -> None:
        """Let time pass; `conditions`, if they were read, say whether the device may train."""
        self.tell(conditions or Tick())
        if self.session.wants_reason(self.clock.now_s()):
            self.tell(ReasonRead(self.reason()))
        if self.clock.now_s() >= self._sweep_again_s:
            self._sweep()

    def advance(self) -> bool:
        """Do one step of the training, or seal it; whether there was anything to do."""
        work = self.work
        if work is None or self.clock.now_s() < self._seal_again_s:
            return False
        try:
            if not work.done:
                work.advance()
                return True
            pending = work.finish(self.clock.now_s())
        except StoreError as error:  # the change is still here: nothing is computed or charged again
            self._seal_again_s = self.clock.now_s() + RETRY_SEALING_S
            self._store_failed(error)
            return False
        except CoveyError as error:  # whatever a signed plan asks for, it must not stop the daemon
            self._give_up(work, str(error))
            return True
        self._finished(work, pending)
        return True

    def next_wake_s(self) -> float:
        """When there is something to do next that no message brings, Unix seconds, if the board reads the same."""
        sealing_s = self._seal_again_s if self.work is not None and self.work.done else math.inf
        sweeping_s = self._sweep_again_s if self._sweep_again_s > self.clock.now_s() else math.inf
        return min(self.session.next_wake_s(), sealing_s, sweeping_s)

    def put_aside(self) -> None:
        """Keep the training's progress, because it may not go on now or the process ends."""
        if self.work is not None and not self.work.done:
            try:
                self.work.put_aside()
            except CoveyError as error:
                self._store_failed(error)
            else:
                done, steps = self.work.steps
                number, update = self.work.manifest.round, self.work.update
                self.note("training_paused", round=number, update=update, step=done, steps=steps)

    def leave(self) -> None:
        """Say goodbye to the broker; what is pending stays in the outbox."""
        self._go(self.session.offline_presence())

    def retire(self) -> None:
        """Leave a name on the wire for good: its retained presence is forgotten too."""
        self._go(replace(self.session.offline_presence(), payload=b""))

    def _go(self, presence: Publish) -> None:
        """Put training aside and disconnect; `presence` is what stays at the broker."""
        self.put_aside()
        self.transport.publish(presence.topic, presence.payload, retain=presence.retain)
        self.transport.close()

    def note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self.journal.write(event, at_s=self.clock.now_s(), study=self.study, **fields)

    def _execute(self, actions: list[Action]) -> None:
        """Do a batch in order; when the disk fails, the rest is dropped, and the session retries what it sends."""
        try:
            for action in actions:
                self._handlers[type(action)](action)
        except StoreError as error:
            self._store_failed(error)

    def _session_note(self, note: Note) -> None:
        """Into the journal; what went wrong last is kept for `status`."""
        if note.event in {"broker_unusable", "message_refused", "model_refused", "update_refused", "disconnected"}:
            self.last_problem = f"{note.event.replace('_', ' ')}: {note.fields.get('reason', '')}"
        worked = self._worked if note.event == "participation_ended" else None
        about = {"update": worked[1]} if worked is not None and worked[0] == note.fields["round"] else {}
        self.note(note.event, **note.fields, **about)

    def _discard(self, action: Discard) -> None:
        """The log first: what became of an update is not lost, and a second line does no harm."""
        record_outcome(self.store, action.update_id, action.outcome, now_s=self.clock.now_s())
        if action.outcome == "delivered":
            self.participant.control.delivered(action.round)
        self.participant.outbox.discard(action.update_id)

    def _read_model(self, action: ReadModel) -> None:
        """The model that was kept; one that cannot be read is fetched instead."""
        try:
            params = read_model(self.store, self.study, action.digest)
        except StoreError as error:
            params = None
            self._store_failed(error)
        self.tell(ModelRead(action.digest, params))

    def _count_records(self, action: CountRecords) -> None:
        """Whether it is worth fetching the model: the budget admits the round, and there are enough new records."""
        manifest, now_s, reason = action.manifest, self.clock.now_s(), ""
        try:
            self.participant.check_budget(manifest, now_s=now_s)
            if self.new_records is not None:
                reason = self.new_records.problem(manifest, study=self.study, now_s=now_s)
        except CoveyError as error:
            reason = str(error)
        self.tell(RecordsCounted(manifest.round, reason))

    def _participate(self, action: Participate) -> None:
        """Begin to take part in a round."""
        manifest = action.manifest
        if action.params.size:  # statistics come without a model
            self._measure(manifest, action.params)
        try:
            self.work = self.participant.begin(manifest, action.params, action.control, now_s=self.clock.now_s())
        except CoveyError as error:
            self.tell(ParticipationEnded(manifest.round, str(error)))
            return
        self._worked = manifest.round, self.work.update
        self._note_spent("charged", round=manifest.round, update=self.work.update)

    def _finished(self, work: LocalWork, pending: PendingUpdate) -> None:
        """An update is ready to be sent."""
        self.work = None
        self._note_spent("trained", round=work.manifest.round, update=work.update, steps=work.steps[1])
        self.tell(UpdateReady(pending))
        if self.new_records is not None:
            try:
                self.new_records.took_part()
            except StoreError as error:
                self._store_failed(error)

    def _give_up(self, work: LocalWork, reason: str) -> None:
        """Training gave nothing: forget it, and never try it again from earlier progress."""
        self.work = None
        try:
            work.abandon()
        except StoreError as error:
            self._store_failed(error)
        self.tell(ParticipationEnded(work.manifest.round, reason))

    def _abandon(self, action: Abandon) -> None:
        """The session gave the round up."""
        work, self.work = self.work, None
        if work is not None:
            work.abandon()

    def _note_spent(self, event: str, **fields: object) -> None:
        """Write to the journal, with what was spent of the budget."""
        ledger = self.participant.ledger
        budget = ledger.budget
        self.note(event, **fields, epsilon=ledger.spent_epsilon, budget_epsilon=budget.epsilon, delta=budget.delta)

    def _measure(self, manifest: RoundManifestMsg, params: Float32) -> None:
        """Measure a global model on the device's own records; nothing of it is sent."""
        try:
            found = self.participant.measure(params)
        except CoveyError as error:
            self.note("evaluation_failed", round=manifest.round, reason=str(error))
            return
        if not found:
            return
        self.measured, self.measured_round = found, manifest.round
        # Security: the journal lies in the clear, and is often passed on. Numbers about the wearer's records are told
        # there only by a device whose purpose is to measure; `status` tells them to whoever may ask.
        told = _scores(found) if self.role == "evaluate" else {}
        digest = manifest.model_digest.hex()
        event = "evaluated" if told else "measured"
        self.note(event, round=manifest.round, status=manifest.status, model_digest=digest, **told)

    def _sweep(self) -> None:
        """Try again to delete what was given up; most of the time there is nothing."""
        try:
            self.participant.outbox.sweep()
        except StoreError as error:
            self._sweep_again_s = self.clock.now_s() + RETRY_SEALING_S
            self._store_failed(error)

    def _store_failed(self, error: CoveyError) -> None:
        """Say that the disk does not take what must be durable."""
        self.last_problem = str(error)
        self.note("store_failed", reason=str(error))


def _scores(found: dict[str, Evaluation]) -> dict[str, float]:
    """What a measurement gave, for the journal: of the personal model, where there is one."""
    best = found.get("personal", found["global"])
    scores: dict[str, float] = {"loss_sum": best.loss_sum, "correct": best.correct, "count": best.count}
    return {**scores, "global_correct": found["global"].correct} if "personal" in found else scores
