"""The daemon: a loop that takes uploads from the broker and runs the task's rounds.

Everything that is promised to a device is committed first: a receipt follows its update's transaction, a manifest
follows the transaction that opened its round. After a crash the next start publishes again whatever the database says.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from sqlalchemy import Connection

from aggregator.combine import ServerOptimiser, apply, average_models, mean_update
from aggregator.config import TaskConfig
from aggregator.errors import CombineError, DatabaseError
from aggregator.ingest import OpenRoundKeys
from aggregator.intake import Intake
from aggregator.publisher import RetainedMessage, SignedChunks, forget_messages, manifest_message
from aggregator.rounds import (
    AbortRound,
    CombineFailed,
    CommitRound,
    ExtendRound,
    FinishTask,
    OpenRound,
    Phase,
    Reachable,
    RoundAction,
    RoundEvent,
    RoundPolicy,
    RoundState,
    Ticked,
    UpdateAccepted,
    transition,
)
from aggregator.scaffold import PlainSteps, next_control
from aggregator.store import AggregatorStore, StoredModel, little_endian
from fl_protocol.adapters.journal import Journal
from fl_protocol.errors import LocalMisuseError
from fl_protocol.limits import chunk_data_bytes
from fl_protocol.sealing import RoundKey, round_key_bytes
from fl_protocol.topics import upload_filter
from fl_protocol.transport import Connected, Disconnected, Received, Transport

LONGEST_WAIT_S = 0.2
"""How long one poll may take, so that deadlines and stop requests are noticed soon."""


@dataclass
class AggregatorDaemon:
    """One task's aggregator; entropy and time are arguments so that a simulation can repeat itself.

    Args:
        tenant: name on the wire.
        task: its configuration.
        graph_digest: SHA-256 of the bundle's trainable graph.
        signing_key: signs manifests, model chunks, receipts and NACKs.
        store: the task's database.
        transport: the broker connection.
        journal: where events are told.
        entropy: cryptographic source of bytes, for round keys.
        now_s: Unix seconds.
    """

    tenant: str
    task: TaskConfig
    graph_digest: bytes
    signing_key: Ed25519PrivateKey
    store: AggregatorStore
    transport: Transport
    journal: Journal
    entropy: Callable[[int], bytes]
    now_s: Callable[[], float]

    def __post_init__(self) -> None:
        task = self.task
        self._policy = RoundPolicy(task.rounds, task.goal, task.minimum_cohort, task.round_duration_s)
        self._optimiser = ServerOptimiser(task.server.learning_rate, task.server.momentum)
        self._intake = Intake(
            tenant=self.tenant,
            task=task.name,
            signing_key=self.signing_key,
            store=self.store,
            transport=self.transport,
            journal=self.journal,
            now_s=self.now_s,
        )
        self._chunks = SignedChunks(self.tenant, self.signing_key)
        self._state = RoundState()
        self._keys: OpenRoundKeys | None = None
        self._maximum_packet_bytes: int | None = None
        self._connected = False
        self._stale = False  # memory may lag behind the database, which could not be read or written
        self._asked_s = -math.inf  # when missing chunks were last looked for
        self._unerased = True  # SQLite's log may still hold what a closed round erased

    @property
    def state(self) -> RoundState:
        """Where the task stands."""
        return self._state

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Serve until `should_stop`; an open round stays in the database and goes on at the next start."""
        self.start()
        while not should_stop():
            self.step()
        self.transport.close()
        self.store.close()
        self._note("stopped")

    def start(self) -> None:
        """Pick up where the database stands, and connect."""
        self._state = self.store.round_state()
        self._load_keys()
        self._note("started", round=self._state.number, phase=self._state.phase.value, committed=self._state.committed)
        self.transport.open()

    def step(self) -> None:
        """Wait for one event, at most `LONGEST_WAIT_S`, and act on it."""
        event = self.transport.poll(LONGEST_WAIT_S)
        match event:
            case Connected():
                self._on_connected(event)
            case Disconnected():
                self._connected = False
                self._note("disconnected", reason=event.reason)
            # While stale, uploads are dropped without an answer: their senders come again.
            case Received() if not self._stale:
                if self._intake.take(event, self._keys):
                    self._advance(UpdateAccepted())
        # Rounds run only while connected: one that nobody can reach would abort for nothing.
        if self._connected:
            if self._stale:
                self._refresh()
            else:
                self._advance(Ticked())
            self._ask_for_missing_chunks()
        if self._unerased:
            self._erase()

    def _ask_for_missing_chunks(self) -> None:
        """Look for transfers that went quiet; not at every message, since each look goes through all of them."""
        now_s = self.now_s()
        if not 0 <= now_s - self._asked_s < LONGEST_WAIT_S:
            self._asked_s = now_s
            self._intake.ask_for_missing_chunks()

    def _on_connected(self, event: Connected) -> None:
        """Subscribe, and publish again what should be retained (a broker may have lost it)."""
        try:
            chunk_data_bytes(event.maximum_packet_bytes)
        except LocalMisuseError as error:
            self._note("broker_unusable", reason=str(error))
            return
        self._connected, self._maximum_packet_bytes = True, event.maximum_packet_bytes
        self.transport.subscribe(upload_filter(self.tenant))
        self._note("connected")
        self._advance(Reachable())
        if self._state.phase is not Phase.IDLE:
            self._refresh()

    def _refresh(self) -> None:
        """Take over what the database says and publish it; when it cannot be read, again at the next step."""
        self._stale = True
        try:
            self._state = self.store.round_state()
            self._load_keys()
            if self._state.phase is not Phase.IDLE:
                self._publish_current()
        except DatabaseError as error:
            self._note("store_failed", reason=str(error))
        else:
            self._stale = False

    def _erase(self) -> None:
        """Empty the database's log; when somebody reads it just now, again at the next step."""
        try:
            self._unerased = not self.store.empty_log()
        except DatabaseError as error:
            self._note("store_failed", reason=str(error))

    def _advance(self, event: RoundEvent) -> None:
        """Let the round table decide, carry out what it says in one transaction, then publish."""
        now_s = self.now_s()
        state, actions = transition(self._state, event, now_s, policy=self._policy)
        if not actions:
            self._state = state
            return
        try:
            notes = self._carry_out(state, actions, now_s)
        except DatabaseError as error:
            # Nearly always the state is as before, but a commit that failed may still have become durable.
            self._stale = True
            self._note("store_failed", reason=str(error))
            return
        except CombineError as error:
            self._advance(CombineFailed(str(error)))
            return
        self._unerased = True
        self._refresh()
        for name, fields in notes:
            self._note(name, **fields)

    def _carry_out(
        self, state: RoundState, actions: Iterable[RoundAction], now_s: float
    ) -> list[tuple[str, dict[str, object]]]:
        """One transaction for all actions of a transition: a crash leaves the state before or after, never between."""
        with self.store.transaction() as connection:
            notes = [self._do(connection, action, state, now_s) for action in actions]
            self.store.save_state(connection, state)
        return notes

    def _do(
        self, connection: Connection, action: RoundAction, state: RoundState, now_s: float
    ) -> tuple[str, dict[str, object]]:
        """Carry out one action on the way to `state`; what to tell the journal once it is durable."""
        match action:
            case CommitRound():
                return "round_committed", self._commit(connection, action.number, now_s)
            case AbortRound():
                self.store.close_round(
                    connection, number=action.number, outcome="aborted", reason=action.reason, now_s=now_s
                )
                return "round_aborted", {"round": action.number, "reason": action.reason}
            case OpenRound():
                key = RoundKey(self.task.kem, self.entropy(round_key_bytes(self.task.kem)))
                self.store.open_round(
                    connection, number=action.number, opened_s=action.opened_s, deadline_s=action.deadline_s, key=key
                )
                return "round_opened", {
                    "round": action.number,
                    "goal": self.task.goal,
                    "deadline_s": action.deadline_s,
                    "version": state.committed,
                    "model_digest": self.store.digest(connection, state.committed).hex(),
                }
            case ExtendRound():
                self.store.extend_round(connection, action.number, action.deadline_s)
                return "round_extended", {"round": action.number, "deadline_s": action.deadline_s}
            case FinishTask():
                return "task_finished", self._finish(connection, state.committed)

    def _commit(self, connection: Connection, number: int, now_s: float) -> dict[str, object]:
        """Combine a round's updates into the next model version and close the round."""
        before = self.store.model(self._state.committed)
        mean, count = mean_update(self.store.updates(connection, number), len(before.model.params))
        model = apply(before.model, mean, self._optimiser)
        version = before.version + 1
        digest = self.store.add_model(connection, version, model)
        if self.task.plan.control_variates:
            self._commit_control(connection, before, mean, count)
        bytes_up = self.store.bytes_up(connection, number)
        self.store.close_round(connection, number=number, outcome="committed", reason="", now_s=now_s)
        return {
            "round": number,
            "version": version,
            "model_digest": digest.hex(),
            "arrived": count,
            "bytes_up": bytes_up,
            "seconds": round(now_s - self._state.opened_s, 3),
            "mean_update_norm": float(np.linalg.norm(mean)),
        }

    def _commit_control(
        self, connection: Connection, before: StoredModel, mean: NDArray[np.float64], count: int
    ) -> None:
        """The control variate that goes with the next version, in the transaction that adds that version."""
        plan = self.task.plan
        control = next_control(
            self.store.control(before.version, len(before.model.params)),
            mean,
            count=count,
            population=self.task.population or count,
            steps=PlainSteps(plan.steps, plan.learning_rate),
        )
        self.store.add_control(connection, before.version + 1, control)

    def _finish(self, connection: Connection, last: int) -> dict[str, object]:
        """Add the finished model: the mean of the versions up to the last."""
        first = max(0, last - self.task.server.average_last + 1)
        model = average_models(self.store.models(connection, first, last))
        digest = self.store.add_model(connection, last + 1, model)
        return {"version": last + 1, "model_digest": digest.hex(), "averaged": last - first + 1}

    def _load_keys(self) -> None:
        """What intake needs of the open round."""
        key = self.store.round_key(self._state.number) if self._state.phase is Phase.OPEN else None
        if key is None:
            self._keys = None
            return
        model = self.store.model(self._state.committed)
        self._keys = OpenRoundKeys(self._state.number, model.digest, len(model.model.params), key)

    def _publish_current(self) -> None:
        """Publish the current model, control variate and manifest, retained, and forget what is too old."""
        model = self.store.model(self._state.model_version)
        wholes = [little_endian(model.model.params)]
        if self.task.plan.control_variates and self._state.phase is Phase.OPEN:
            wholes.append(little_endian(self.store.control(model.version, len(model.model.params)).values))
        digests = [hashlib.sha256(whole).digest() for whole in wholes]
        self._chunks.keep_only(digests)
        for whole in wholes:
            self._publish(self._chunks.of(whole, maximum_packet_bytes=self._maximum_packet_bytes))
        manifest = manifest_message(
            self.tenant,
            self.task,
            state=self._state,
            model=model,
            control_digest=digests[1] if len(digests) > 1 else None,
            graph_digest=self.graph_digest,
            recipient=self._keys.key.recipient() if self._keys is not None else None,
            signing_key=self.signing_key,
        )
        self._publish([manifest])
        self._forget_all_but(digests, model.version, num_parameters=len(model.model.params))

    def _forget_all_but(self, current: list[bytes], version: int, *, num_parameters: int) -> None:
        """Have the broker drop what no device can still want."""
        kept, stale = [*current, *self._digests_of(version - 1)], self._digests_of(version - 2)
        if self._state.phase is Phase.FINISHED:
            # The version before the finished model was never published, and nobody can take part any more.
            kept, stale = current, self._digests_of(version - 3) + stale
        # While a round is open, the last version stays: a device may be in the middle of downloading it. Versions and
        # control variates may be equal (a first c and a first model of zeros), and then share their chunks.
        for digest in dict.fromkeys(digest for digest in stale if digest not in kept):
            self._publish(
                forget_messages(
                    self.tenant,
                    digest,
                    num_parameters=num_parameters,
                    maximum_packet_bytes=self._maximum_packet_bytes,
                )
            )

    def _digests_of(self, version: int) -> list[bytes]:
        """What was published with a version: its model's digest, then its control variate's; none before version 0."""
        if version < 0:
            return []
        model = self.store.model(version)
        if not self.task.plan.control_variates:
            return [model.digest]
        control = self.store.control(version, len(model.model.params))
        return [model.digest, hashlib.sha256(little_endian(control.values)).digest()]

    def _publish(self, messages: Iterable[RetainedMessage]) -> None:
        """Publish retained messages."""
        for message in messages:
            self.transport.publish(message.topic, message.payload, retain=True)

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self.journal.write(event, at_s=self.now_s(), **fields)
