"""Drives a `DeviceSession` by hand: signed messages in, actions out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_client.events import Action, Note, Participate, PendingUpdate, Remember, SessionState
from device_client.session import DeviceSession, Floors, Role, SessionConfig
from fl_protocol.chunking import split
from fl_protocol.messages import ChunkMsg, RoundManifestMsg, encode
from fl_protocol.signing import sign
from fl_protocol.topics import model_topic, round_topic
from fl_protocol.transport import Connected, Received
from tests.device_client.ports import DEVICE, GRAPH_DIGEST, TASK, TENANT, make_manifest
from tests.virtual_fleet import SeededEntropy

AGGREGATOR = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
STRANGER = Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)
NUM_PARAMETERS = 400
PARAMS = np.linspace(-1, 1, NUM_PARAMETERS).astype("<f4")
DIGEST = hashlib.sha256(PARAMS.tobytes()).digest()


def manifest(**changes: object) -> RoundManifestMsg:
    return make_manifest(**{"model_digest": DIGEST, "num_parameters": NUM_PARAMETERS, **changes})  # type: ignore[arg-type]


def manifest_message(message: RoundManifestMsg, key: Ed25519PrivateKey = AGGREGATOR) -> Received:
    return Received(round_topic(TENANT, TASK), sign(message, key))


def model_chunks(params: bytes = PARAMS.tobytes(), *, data_bytes: int = 512) -> list[ChunkMsg]:
    return list(split(hashlib.sha256(params).digest()[:16], params, data_bytes=data_bytes))


def chunk_message(chunk: ChunkMsg, digest: bytes = DIGEST) -> Received:
    return Received(model_topic(TENANT, digest, chunk.index), encode(chunk))


@dataclass
class Driver:
    """A connected session, and what it said."""

    role: Role = "train"
    floors: Floors = field(default_factory=Floors)
    state: SessionState | None = None
    entropy: Callable[[int], bytes] = field(default_factory=lambda: SeededEntropy("session"))
    outbox: tuple[PendingUpdate, ...] = ()
    now_s: float = 1100.0

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
        )
        self.session = DeviceSession(config, entropy=self.entropy, state=self.state, outbox=self.outbox)
        self.actions: list[Action] = []
        self.tell(Connected())

    def tell(self, event: object) -> list[Action]:
        actions = self.session.handle(event, self.now_s)  # type: ignore[arg-type]
        for action in actions:
            if isinstance(action, Remember):
                self.state = action.state
        self.actions += actions
        return actions

    def open_round(self, **changes: object) -> list[Action]:
        return self.tell(manifest_message(manifest(**changes)))

    def send_model(self) -> list[Action]:
        return [action for chunk in model_chunks() for action in self.tell(chunk_message(chunk))]


def notes(actions: list[Action]) -> list[str]:
    return [action.event for action in actions if isinstance(action, Note)]


def reasons(actions: list[Action]) -> str:
    return " ".join(str(action.fields.get("reason", "")) for action in actions if isinstance(action, Note))


def participations(actions: list[Action]) -> list[int]:
    return [action.manifest.round for action in actions if isinstance(action, Participate)]
