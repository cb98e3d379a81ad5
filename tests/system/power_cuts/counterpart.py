"""The aggregator's side, which never loses power: rounds by a timetable, the real intake, answers that come late, twice
or never.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from aggregator.answers import Answers as SignedAnswers
from aggregator.batches import CommitsHere
from aggregator.committer import Accepted, PendingUpdate, Verdict
from aggregator.ingest import RoundInForce, TaskInForce, open_sealed, place, verify_header
from aggregator.intake import Intake, IntakeLimits
from aggregator.store.devices import RegisteredKey
from aggregator.store.updates import AcceptedUpdate
from device_client.ports import Float32
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from fl_protocol.chunking import split
from fl_protocol.errors import RefusalReason, RefusedError
from fl_protocol.limits import chunk_data_bytes
from fl_protocol.messages import RoundManifestMsg, TrainingPlanMsg, UpdateHeaderMsg
from fl_protocol.sealing import RoundKey
from fl_protocol.signing import sign
from fl_protocol.topics import model_topic, round_topic, upload_filter
from fl_protocol.transport import Received
from tests.virtual_fleet import AGGREGATOR_KEY, TASK, TENANT, MemoryJournal, SeededEntropy


@dataclass(frozen=True)
class OpenedRound:
    """A round as it was announced.

    Args:
        control: the server's control variate, float32 [shared parameters], in a plan that has such.
    """

    manifest: RoundManifestMsg
    key: RoundKey
    params: Float32
    control: Float32 | None

    @property
    def digests(self) -> list[bytes]:
        """Of what devices download."""
        control = self.manifest.control_digest
        return [self.manifest.model_digest, *([control] if control is not None else [])]


@dataclass(frozen=True)
class Answers:
    """How answers, and chunks on the way in, fare on the network: probabilities, and the longest delay."""

    lost: float = 0.2
    repeated: float = 0.15
    late: float = 0.1
    chunk_lost: float = 0.08


@dataclass
class Counterpart:
    """See the module docstring; what the real `Intake` has of a store, a committer and a transport is this object.

    Args:
        plan: of every round.
        graph_digest, num_parameters: of the model, personal layers left out.
        names: the device's, on the wire.
        now_s: true time.
        answered: told of every answer, when it is made, whether or not it will arrive.
        took: told of every update that is committed.
    """

    broker: VirtualBroker
    plan: TrainingPlanMsg
    graph_digest: bytes
    num_parameters: int
    names: dict[str, RegisteredKey]
    now_s: Callable[[], float]
    answered: Callable[[str, bytes], None]
    took: Callable[[UpdateHeaderMsg, Float32], None]
    seed: str
    probability: float = 1.0
    network: Answers = field(default_factory=Answers)
    key: Ed25519PrivateKey = AGGREGATOR_KEY
    rounds: dict[int, OpenedRound] = field(default_factory=dict)
    current: TaskInForce | None = None

    def __post_init__(self) -> None:
        self._chance = Random(f"network of {self.seed}")  # noqa: S311 - a simulation's
        self._entropy = SeededEntropy(f"aggregator of {self.seed}")
        self._later: list[tuple[float, int, str, bytes]] = []
        self._committed: dict[bytes, AcceptedUpdate] = {}
        self._radio = VirtualTransport(self.broker)
        self._radio.open()
        self._radio.subscribe(upload_filter(TENANT))
        ports: Any = self
        self._intake = Intake(
            tenant=TENANT,
            store=ports,
            committer=ports,
            answers=SignedAnswers(TENANT, self.key, ports),
            transport=ports,
            journal=MemoryJournal(),
            now_s=self.now_s,
            limits=IntakeLimits(),
            commits=CommitsHere(self._decide),
        )

    def open_round(self, *, duration_s: float) -> None:
        """Announce the next round; the one before is closed, and its model gone."""
        number, now_s = len(self.rounds) + 1, self.now_s()
        generator = np.random.default_rng(int.from_bytes(self._entropy(8), "little"))
        params = generator.normal(0, 0.1, self.num_parameters).astype(np.float32)
        control = None
        if self.plan.control_variates:
            control = generator.normal(0, 0.01, self.num_parameters).astype(np.float32)
        key = RoundKey("x25519", self._entropy(32))
        manifest = RoundManifestMsg(
            tenant=TENANT,
            task=TASK,
            round=number,
            status="open",
            engine="open",
            model_digest=_digest(params),
            graph_digest=self.graph_digest,
            num_parameters=self.num_parameters,
            recipient=key.recipient(),
            plan=self.plan,
            opened_s=now_s,
            deadline_s=now_s + duration_s,
            goal=10,
            minimum_cohort=2,
            participation_probability=self.probability,
            minimum_separation_s=0.0,
            control_digest=None if control is None else _digest(control),
        )
        for topic in [topic for topic in self.broker.retained if "/model/" in topic]:
            self.broker.publish(topic, b"", retain=True)
        for vector in (params, control):
            if vector is not None:
                self._offer(vector)
        self.rounds[number] = OpenedRound(manifest, key, params, control)
        in_force = RoundInForce(number, manifest.model_digest, key)
        self.current = TaskInForce(TASK, self.num_parameters, open_round=number, rounds={number: in_force})
        self.broker.publish(round_topic(TENANT, TASK), sign(manifest, self.key), retain=True)

    def close_round(self) -> None:
        """Accept nothing more."""
        self.current = None

    def next_s(self) -> float:
        """When it next has something to do by itself."""
        return min((due_s for due_s, *_ in self._later), default=np.inf)

    @property
    def is_busy(self) -> bool:
        """Whether an answer is on its way or a transfer is open."""
        return bool(self._later) or self._intake._transfers.held_bytes > 0

    def step(self) -> None:
        """Take what came, ask for what is missing, deliver what is due."""
        while (event := self._radio.poll(0.0)) is not None:
            if isinstance(event, Received) and self._chance.random() >= self.network.chunk_lost:
                self._intake.take([event])
                self._intake.batches.hand_over()
                self._intake.collect()
                self._intake.answer()
        self._intake.look_after_transfers()
        now_s = self.now_s()
        due, self._later = (
            [one for one in self._later if one[0] <= now_s],
            [one for one in self._later if one[0] > now_s],
        )
        for _, _, topic, payload in sorted(due):
            self.broker.publish(topic, payload, retain=False)

    def publish(self, topic: str, payload: bytes) -> None:
        """The intake's answer: a receipt or a NACK."""
        self.answered(topic, payload)
        happens, network = self._chance.random, self.network
        if happens() < network.lost:
            return
        delay_s = self._chance.uniform(0, 6 * 3600.0 if happens() < network.late else 20.0)
        for copy in range(2 if happens() < network.repeated else 1):
            self._later.append((self.now_s() + delay_s * (1 + copy), len(self._later), topic, payload))

    def acknowledge(self, message: Received) -> None:
        """Nothing: this broker keeps no session."""

    @property
    def devices(self) -> Counterpart:
        """The register."""
        return self

    @property
    def updates(self) -> Counterpart:
        """The updates that are committed."""
        return self

    def find(self, names: Iterable[str]) -> dict[str, RegisteredKey]:
        """Those of these names that are registered."""
        return {name: self.names[name] for name in names if name in self.names}

    def accepted(self, ids: Iterable[bytes]) -> dict[tuple[str, bytes], AcceptedUpdate]:
        """Those of these updates that are committed."""
        return {(TASK, one): self._committed[one] for one in ids if one in self._committed}

    def _decide(self, pending: Iterable[PendingUpdate]) -> list[Verdict]:
        """What the real committer decides, one update at a time."""
        found: list[Verdict] = []
        task = self.current if self.current is not None else TaskInForce(TASK, 0)
        for update in pending:
            try:
                found.append(self._commit(update, {task.name: task}))
            except RefusedError as refusal:
                found.append(refusal)
        return found

    def _commit(self, update: PendingUpdate, tasks: dict[str, TaskInForce]) -> Verdict:
        """Decide about one. Raises RefusedError."""
        name = self.names.get(update.device)
        if name is None or not name.holds_at(self.now_s()):
            raise RefusedError(RefusalReason.UNKNOWN_DEVICE, "not registered, or not its time")
        key = Ed25519PublicKey.from_public_bytes(name.public_key)
        whole = verify_header(
            update.envelope, tenant=TENANT, device=update.device, device_key=key, update_id=update.update_id
        )
        header = whole.header
        before = self._committed.get(header.update_id)
        if before is not None:
            if before.sealed_digest != header.sealed_digest:
                raise RefusedError(RefusalReason.REPLAYED, "this update id was accepted with other content")
            return Accepted(before, is_new=False)
        placed = place(header, tasks)
        if any((one.device, one.round) == (header.device, header.round) for one in self._committed.values()):
            raise RefusedError(RefusalReason.SECOND_UPDATE, "a second update in one round")
        values = open_sealed(whole, placed)
        accepted = AcceptedUpdate(
            TASK, header.update_id, header.device, header.round, header.sealed_digest, self.now_s()
        )
        self._committed[header.update_id] = accepted
        self.took(header, values)
        return Accepted(accepted, is_new=True, bytes_up=whole.bytes_up)

    def count_refusal(self, task: str, reason: object) -> None:
        """Nothing: refusals are in what was answered."""

    def _offer(self, vector: Float32) -> None:
        """Retain a vector's signed chunks."""
        digest = _digest(vector)
        data_bytes = chunk_data_bytes(self.broker.maximum_packet_bytes)
        for chunk in split(digest[:16], vector.astype("<f4").tobytes(), data_bytes=data_bytes):
            self.broker.publish(model_topic(TENANT, digest, chunk.index), sign(chunk, self.key), retain=True)


def _digest(vector: Float32) -> bytes:
    return hashlib.sha256(vector.astype("<f4").tobytes()).digest()
