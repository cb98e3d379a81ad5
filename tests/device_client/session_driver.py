"""Drives a `DeviceSession` by hand: signed messages in, actions out; what it keeps is kept as a disk would."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from device_client.events import (
    Action,
    ConditionsRead,
    Discard,
    DropChunks,
    KeepChunk,
    KeepModel,
    ModelRead,
    Note,
    Participate,
    PendingUpdate,
    Publish,
    ReadModel,
    Remember,
    SessionState,
    Subscribe,
    UpdateReady,
)
from device_client.floors import Floors
from device_client.session import DeviceSession, Role, SessionConfig
from fl_protocol.chunking import split
from fl_protocol.enrolment import Period
from fl_protocol.messages import ChunkMsg, ReceiptMsg, RoundManifestMsg
from fl_protocol.secagg.terms import HelperIdentity
from fl_protocol.signing import sign
from fl_protocol.topics import model_topic, round_topic
from fl_protocol.transport import Connected, Received
from tests.device_client.ports import DEVICE, GRAPH_DIGEST, TASK, TENANT, make_manifest

AGGREGATOR = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
STRANGER = Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)
STUDY = f"{TENANT}/{TASK}"
NUM_PARAMETERS = 400
PARAMS = np.linspace(-1, 1, NUM_PARAMETERS).astype("<f4")
DIGEST = hashlib.sha256(PARAMS.tobytes()).digest()
CONTROL = np.linspace(3, 4, NUM_PARAMETERS).astype("<f4")
CONTROL_DIGEST = hashlib.sha256(CONTROL.tobytes()).digest()


def seeded(seed: str) -> Callable[[int], bytes]:
    """Deterministic bytes."""
    return Random(seed).randbytes  # noqa: S311 - a test's variety


def manifest(**changes: object) -> RoundManifestMsg:
    return make_manifest(**{"model_digest": DIGEST, "num_parameters": NUM_PARAMETERS, **changes})  # type: ignore[arg-type]


def manifest_message(message: RoundManifestMsg, key: Ed25519PrivateKey = AGGREGATOR) -> Received:
    return Received(round_topic(TENANT, TASK), sign(message, key))


def model_chunks(params: bytes = PARAMS.tobytes(), *, data_bytes: int = 512) -> list[ChunkMsg]:
    return list(split(hashlib.sha256(params).digest()[:16], params, data_bytes=data_bytes))


def chunk_message(
    chunk: ChunkMsg, digest: bytes = DIGEST, *, index: int | None = None, key: Ed25519PrivateKey = AGGREGATOR
) -> Received:
    """A signed chunk under a topic: its own, unless another digest or index is given."""
    return Received(model_topic(TENANT, digest, chunk.index if index is None else index), sign(chunk, key))


def some_update(number: int = 8, size: int = 500, *, deadline_s: float = 2000.0) -> PendingUpdate:
    envelope = hashlib.shake_256(bytes([number])).digest(size)
    return PendingUpdate(
        update_id=bytes([number]) * 16,
        study=STUDY,
        device=DEVICE,
        round=number,
        envelope=envelope,
        sealed_digest=hashlib.sha256(envelope).digest(),
        deadline_s=deadline_s,
        recipient_key="ab" * 16,
    )


def receipt_for(update: PendingUpdate, **changes: object) -> ReceiptMsg:
    fields: dict[str, object] = {
        "tenant": TENANT,
        "task": TASK,
        "round": update.round,
        "device": update.device,
        "update_id": update.update_id,
        "sealed_digest": update.sealed_digest,
        "accepted_s": 1.0,
    }
    return ReceiptMsg(**{**fields, **changes})  # type: ignore[arg-type]


@dataclass
class Disk:
    """What a device has durably: it survives restarts."""

    state: SessionState | None = None
    chunks: dict[bytes, dict[int, bytes]] = field(default_factory=dict)
    updates: dict[bytes, PendingUpdate] = field(default_factory=dict)
    model: tuple[bytes, NDArray[np.float32] | None] = (b"", None)
    writes: int = 0

    def take(self, action: Action) -> None:
        """Execute what an action wants durable."""
        match action:
            case Remember():
                self.state = action.state
            case KeepChunk():
                self.chunks.setdefault(action.digest, {})[action.index] = action.payload
            case DropChunks():
                for digest in action.digests:
                    self.chunks.pop(digest, None)
            case Discard():
                self.updates.pop(action.update_id, None)
            case KeepModel():
                self.model = (action.digest, action.params)
            case _:
                return
        self.writes += 1

    def kept_chunks(self) -> Mapping[bytes, list[bytes]]:
        return {digest: list(parts.values()) for digest, parts in self.chunks.items()}


@dataclass
class Driver:
    """A session, and what it said. It is connected and may train, unless told otherwise.

    Args:
        blocked: why it may not train, read whenever that matters; None if it is not told at all.
        subject: the session under test, or a copy broken on purpose.
    """

    role: Role = "train"
    floors: Floors = field(default_factory=Floors)
    state: SessionState | None = None
    entropy: Callable[[int], bytes] = field(default_factory=lambda: seeded("session"))
    outbox: tuple[PendingUpdate, ...] = ()
    now_s: float = 1100.0
    blocked: tuple[str, ...] | None = ()
    counts_records: bool = False
    minimum_separation_s: float = 0.0
    tags: tuple[str, ...] = ()
    input_shape: tuple[int, ...] | None = None
    maximum_participations: int | None = None
    helpers: Mapping[str, HelperIdentity] = field(default_factory=dict)
    period: Period | None = None
    working_on: RoundManifestMsg | None = None
    disk: Disk = field(default_factory=Disk)
    connects: bool = True
    subject: type[DeviceSession] = DeviceSession

    def __post_init__(self) -> None:
        config = SessionConfig(
            tenant=TENANT,
            task=TASK,
            device=DEVICE,
            role=self.role,
            aggregator_key=AGGREGATOR.public_key(),
            graph_digest=GRAPH_DIGEST,
            num_parameters=NUM_PARAMETERS,
            floors=self.floors,
            software="covey test",
            minimum_separation_s=self.minimum_separation_s,
            counts_records=self.counts_records,
            tags=frozenset(self.tags),
            input_shape=self.input_shape,
            maximum_participations=self.maximum_participations,
            helpers=self.helpers,
            period=self.period,
        )
        self.disk.updates.update({update.update_id: update for update in self.outbox})
        self.disk.state = self.state if self.state is not None else self.disk.state
        self.session = self.subject(
            config,
            entropy=self.entropy,
            state=self.disk.state,
            outbox=self.disk.updates.values(),
            kept_chunks=self.disk.kept_chunks(),
            kept_model=self.disk.model[0],
            working_on=self.working_on,
        )
        self.actions: list[Action] = []
        if self.connects:
            self.tell(Connected())
        if self.blocked is not None:
            self.tell(ConditionsRead(self.blocked))

    def tell(self, event: object, *, backlog: int = 0) -> list[Action]:
        """One event; then, as the daemon does, the conditions if they matter."""
        if isinstance(event, ConditionsRead):
            self.blocked = event.blocked
        actions = self.handle(event, backlog=backlog)
        if self.blocked is not None and self.session.wants_to_train:
            actions += self.handle(ConditionsRead(self.blocked), backlog=backlog)
        return actions

    def handle(self, event: object, *, backlog: int = 0) -> list[Action]:
        """One event, and nothing else."""
        if isinstance(event, UpdateReady):
            self.disk.updates[event.pending.update_id] = event.pending
        actions = self.session.handle(event, self.now_s, backlog=backlog)  # type: ignore[arg-type]
        for action in actions:
            self.disk.take(action)
        self.state = self.disk.state
        self.actions += actions
        for action in [action for action in actions if isinstance(action, ReadModel)]:
            digest, params = self.disk.model
            actions = [*actions, *self.handle(ModelRead(action.digest, params if action.digest == digest else None))]
        return actions

    def open_round(self, **changes: object) -> list[Action]:
        return self.tell(manifest_message(manifest(**changes)))

    def send_model(self) -> list[Action]:
        return [action for chunk in model_chunks() for action in self.tell(chunk_message(chunk))]

    def send(self, *indices: int) -> list[Action]:
        """Some chunks of the model."""
        return [action for index in indices for action in self.tell(chunk_message(model_chunks()[index]))]

    def restarted(self, **changes: object) -> Driver:
        """The next process on the same disk."""
        kept = ("role", "floors", "now_s", "counts_records", "tags", "input_shape", "subject")
        settings = {name: getattr(self, name) for name in kept}
        return Driver(disk=self.disk, **{**settings, **changes})


def notes(actions: list[Action]) -> list[str]:
    return [action.event for action in actions if isinstance(action, Note)]


def reasons(actions: list[Action]) -> str:
    return " ".join(str(action.fields.get("reason", "")) for action in actions if isinstance(action, Note))


def participations(actions: list[Action]) -> list[int]:
    return [action.manifest.round for action in actions if isinstance(action, Participate)]


def asked_for(actions: list[Action], digest: bytes = DIGEST) -> list[int]:
    """Indices of the chunks that were subscribed to."""
    prefix = model_topic(TENANT, digest, 0)[:-1]
    filters = [action.topic_filter for action in actions if isinstance(action, Subscribe)]
    return [int(name.removeprefix(prefix)) for name in filters if name.startswith(prefix)]


def uploads(actions: list[Action]) -> list[Publish]:
    return [action for action in actions if isinstance(action, Publish) and "/up/" in action.topic]
