"""The daemon: a loop that hands events to the session and does what it asks, through ports only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from device_client.device_store import save_session
from device_client.errors import StoreError
from device_client.events import (
    Action,
    Discard,
    Evaluate,
    Note,
    Participate,
    ParticipationEnded,
    Publish,
    Remember,
    Subscribe,
    Tick,
    Unsubscribe,
    UpdateReady,
)
from device_client.participation import Participant
from device_client.ports import Clock, Store, Transport
from device_client.session import DeviceSession
from fl_protocol.adapters.journal import Journal
from fl_protocol.errors import CoveyError

LONGEST_WAIT_S = 0.5
"""How long one poll may take, so that a stop request is noticed soon."""


@dataclass
class DeviceDaemon:
    """One device at work; see the module docstring."""

    session: DeviceSession
    participant: Participant
    store: Store
    transport: Transport
    clock: Clock
    journal: Journal

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Work until `should_stop`; then say goodbye to the broker. What is pending stays in the outbox."""
        self.transport.open()
        while not should_stop():
            self.step()
        goodbye = self.session.offline_presence()
        self.transport.publish(goodbye.topic, goodbye.payload, retain=goodbye.retain)
        self.transport.close()
        self._note("stopped")

    def step(self) -> None:
        """Wait for one event, at most `LONGEST_WAIT_S`, and act on it."""
        wake_s = self.session.next_wake_s()
        timeout_s = LONGEST_WAIT_S if wake_s is None else min(LONGEST_WAIT_S, wake_s - self.clock.now_s())
        event = self.transport.poll(max(0.0, timeout_s))
        self._execute(self.session.handle(event if event is not None else Tick(), self.clock.now_s()))

    def _execute(self, actions: list[Action]) -> None:
        """Do a batch in order; when the disk fails, the rest is dropped, and the session retries what it sends."""
        try:
            for action in actions:
                self._do(action)
        except StoreError as error:
            self._note("store_failed", reason=str(error))

    def _do(self, action: Action) -> None:
        """Carry out one action."""
        match action:
            case Publish():
                self.transport.publish(action.topic, action.payload, retain=action.retain, expires_s=action.expires_s)
            case Subscribe():
                self.transport.subscribe(action.topic_filter)
            case Unsubscribe():
                self.transport.unsubscribe(action.topic_filter)
            case Remember():
                save_session(self.store, action.state)
            case Discard():
                self.participant.outbox.discard(action.update_id)
            case Note():
                self._note(action.event, **action.fields)
            case Participate():
                self._participate(action)
            case Evaluate():
                self._evaluate(action)

    def _participate(self, action: Participate) -> None:
        """Take part in a round and tell the session how it went."""
        manifest, started_s = action.manifest, self.clock.now_s()
        try:
            pending = self.participant.participate(manifest, action.params, now_s=started_s)
        except CoveyError as error:  # whatever a signed plan asks for, it must not stop the daemon
            ended = ParticipationEnded(manifest.round, str(error))
            self._execute(self.session.handle(ended, self.clock.now_s()))
            return
        ledger = self.participant.ledger
        self._note(
            "trained",
            round=manifest.round,
            seconds=round(self.clock.now_s() - started_s, 4),
            epsilon=ledger.spent_epsilon,
            budget_epsilon=ledger.budget.epsilon,
            delta=ledger.budget.delta,
        )
        self._execute(self.session.handle(UpdateReady(pending), self.clock.now_s()))

    def _evaluate(self, action: Evaluate) -> None:
        """Measure a global model on the device's own records; only this device's journal learns the result."""
        try:
            result = self.participant.measure(action.params)
        except CoveyError as error:
            self._note("evaluation_failed", round=action.manifest.round, reason=str(error))
            return
        self._note(
            "evaluated",
            round=action.manifest.round,
            status=action.manifest.status,
            model_digest=action.manifest.model_digest.hex(),
            loss_sum=result.loss_sum,
            correct=result.correct,
            count=result.count,
        )

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self.journal.write(event, at_s=self.clock.now_s(), **fields)
