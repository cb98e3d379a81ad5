"""The aggregator's side, which never loses power: rounds by a timetable, the real intake, answers that come late, twice
or never.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.ingest import AcceptedUpdate, OpenRoundKeys
from aggregator.intake import Intake
from device_client.ports import Float32
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from fl_protocol.chunking import split
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
class RegisteredName:
    """A name on the wire: its public signing key, and when it may be used."""

    key: bytes
    not_before_s: float = -np.inf
    not_after_s: float = np.inf


@dataclass(frozen=True)
class Answers:
    """How answers, and chunks on the way in, fare on the network: probabilities, and the longest delay."""

    lost: float = 0.2
    repeated: float = 0.15
    late: float = 0.1
    chunk_lost: float = 0.08


@dataclass
class Counterpart:
    """See the module docstring; the store of the real `Intake` is this object.

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
    names: dict[str, RegisteredName]
    now_s: Callable[[], float]
    answered: Callable[[str, bytes], None]
    took: Callable[[UpdateHeaderMsg, Float32], None]
    seed: str
    probability: float = 1.0
    network: Answers = field(default_factory=Answers)
    key: Ed25519PrivateKey = AGGREGATOR_KEY
    rounds: dict[int, OpenedRound] = field(default_factory=dict)
    updates: dict[bytes, AcceptedUpdate] = field(default_factory=dict)
    current: OpenRoundKeys | None = None

    def __post_init__(self) -> None:
        self._chance = Random(f"network of {self.seed}")  # noqa: S311 - a simulation's
        self._entropy = SeededEntropy(f"aggregator of {self.seed}")
        self._later: list[tuple[float, int, str, bytes]] = []
        self._radio = VirtualTransport(self.broker)
        self._radio.open()
        self._radio.subscribe(upload_filter(TENANT))
        store: Any = self
        transport: Any = self
        self._intake = Intake(TENANT, TASK, self.key, store, transport, MemoryJournal(), self.now_s)

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
        self.current = OpenRoundKeys(number, manifest.model_digest, self.num_parameters, key)
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
        return bool(self._later) or bool(self._intake._transfers)

    def step(self) -> None:
        """Take what came, ask for what is missing, deliver what is due."""
        while (event := self._radio.poll(0.0)) is not None:
            if isinstance(event, Received) and self._chance.random() >= self.network.chunk_lost:
                self._intake.take(event, self.current)
        self._intake.ask_for_missing_chunks()
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

    def device_key(self, device: str, now_s: float) -> bytes | None:
        """Of a registered name whose time it is."""
        name = self.names.get(device)
        return name.key if name is not None and name.not_before_s <= now_s <= name.not_after_s else None

    def accepted(self, update_id: bytes) -> AcceptedUpdate | None:
        """A committed update."""
        return self.updates.get(update_id)

    def has_update_from(self, device: str, round_number: int) -> bool:
        """Whether a name has one in this round."""
        return any((one.device, one.round) == (device, round_number) for one in self.updates.values())

    def add_update(self, header: UpdateHeaderMsg, values: Float32, *, bytes_up: int, now_s: float) -> None:
        """Commit."""
        del bytes_up
        accepted = AcceptedUpdate(header.update_id, header.device, header.round, header.sealed_digest, now_s)
        self.updates[header.update_id] = accepted
        self.took(header, values)

    def count_refusal(self, reason: object) -> None:
        """Nothing: refusals are in what was answered."""

    def _offer(self, vector: Float32) -> None:
        """Retain a vector's signed chunks."""
        digest = _digest(vector)
        data_bytes = chunk_data_bytes(self.broker.maximum_packet_bytes)
        for chunk in split(digest[:16], vector.astype("<f4").tobytes(), data_bytes=data_bytes):
            self.broker.publish(model_topic(TENANT, digest, chunk.index), sign(chunk, self.key), retain=True)


def _digest(vector: Float32) -> bytes:
    return hashlib.sha256(vector.astype("<f4").tobytes()).digest()
