"""An aggregator's intake on its own: a database, registered devices, and updates made by hand, good and bad.

Nothing here imports the device: what an aggregator takes from the wire is made from the protocol alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.ingest import OpenRoundKeys
from aggregator.intake import Intake
from aggregator.rounds import Phase, RoundState
from aggregator.store import AggregatorStore
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from fl_protocol.chunking import split
from fl_protocol.messages import (
    NackMsg,
    ReceiptMsg,
    UpdateBodyMsg,
    UpdateEnvelopeMsg,
    UpdateHeaderMsg,
    decode,
    encode,
)
from fl_protocol.sealing import RoundKey, seal_update
from fl_protocol.signing import sign_header, verify
from fl_protocol.topics import down_filter, upload_topic
from fl_protocol.transport import Received
from tests.fl_protocol.examples import AGGREGATOR_KEY, TASK, TENANT, manifest, round_key

ROUND_KEY = round_key("x25519")
D = 300
PARAMS = np.zeros(D, np.float32)
DIGEST = hashlib.sha256(PARAMS.tobytes()).digest()
GRAPH_DIGEST = b"\x07" * 32
DEVICES = [f"watch-{index}" for index in range(5)]


class PowerCutError(BaseException):
    """The process ends here: nothing of ours may catch it."""


@dataclass
class VirtualClock:
    """Time that moves only when it is told to."""

    time_s: float = 1_000_000.0

    def now_s(self) -> float:
        return self.time_s


@dataclass
class MemoryJournal:
    """A journal that keeps what it is told."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def write(self, event: str, /, *, at_s: float, **fields: Any) -> None:
        self.events.append((event, {"at_s": at_s, **fields}))

    def named(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]


def device_key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def values(number: float) -> bytes:
    return np.full(D, number, "<f4").tobytes()


def make_update(
    device: str = "watch-0",
    *,
    update_id: bytes = b"\x10" * 16,
    body: bytes | None = None,
    num_parameters: int = D,
    key: Ed25519PrivateKey | None = None,
    **changes: object,
) -> bytes:
    """An encoded envelope; keyword arguments change the manifest that the device believes in."""
    given = {"model_digest": DIGEST, "num_parameters": D, "graph_digest": GRAPH_DIGEST, **changes}
    return seal_update(
        UpdateBodyMsg(num_parameters=num_parameters, values=body if body is not None else values(1.0)),
        manifest=manifest(**given),
        device=device,
        update_id=update_id,
        signing_key=key if key is not None else device_key(device),
    )


def with_header(envelope: bytes, key: Ed25519PrivateKey, **changes: object) -> bytes:
    """The same sealed bytes under a changed and newly signed header."""
    outer = decode(envelope, UpdateEnvelopeMsg)
    header = decode(outer.header, UpdateHeaderMsg)
    fields = {name: getattr(header, name) for name in header.__struct_fields__}
    changed = encode(UpdateHeaderMsg(**{**fields, **changes}))
    return encode(UpdateEnvelopeMsg(header=changed, signature=sign_header(changed, key), sealed=outer.sealed))


def messages(
    envelope: bytes, device: str = "watch-0", *, update_id: bytes = b"\x10" * 16, data_bytes: int = 700
) -> list[Received]:
    return [
        Received(upload_topic(TENANT, device, update_id, chunk.index), encode(chunk))
        for chunk in split(update_id, envelope, data_bytes=data_bytes)
    ]


@dataclass
class Desk:
    """One intake with round 3 open."""

    folder: Path
    intake_type: Callable[..., Intake] = Intake
    key: RoundKey = ROUND_KEY
    clock: VirtualClock = field(default_factory=VirtualClock)
    journal: MemoryJournal = field(default_factory=MemoryJournal)

    def __post_init__(self) -> None:
        self.store = AggregatorStore(f"sqlite:///{self.folder / 'aggregator.db'}", TASK)
        self.store.create_task(GRAPH_DIGEST, PARAMS)
        for name in DEVICES:
            self.store.add_device(name, device_key(name).public_key().public_bytes_raw(), 0.0)
        with self.store.transaction() as connection:
            self.store.open_round(connection, number=3, opened_s=0.0, deadline_s=1e9, key=self.key)
            self.store.save_state(connection, RoundState(Phase.OPEN, number=3, committed=0))
        broker = VirtualBroker()
        transport = VirtualTransport(broker)
        transport.open()
        self.answers = VirtualTransport(broker)
        self.answers.open()
        for name in [*DEVICES, "stranger"]:
            self.answers.subscribe(down_filter(TENANT, name))
        self.intake = self.intake_type(
            tenant=TENANT,
            task=TASK,
            signing_key=AGGREGATOR_KEY,
            store=self.store,
            transport=transport,
            journal=self.journal,
            now_s=self.clock.now_s,
        )
        self.current: OpenRoundKeys | None = OpenRoundKeys(3, DIGEST, D, self.key)
        self.said()

    def take(self, received: list[Received]) -> int:
        """Hand messages in; how many updates they completed."""
        return sum(self.intake.take(message, self.current) for message in received)

    def said(self) -> list[ReceiptMsg | NackMsg]:
        """Signed answers since the last time, verified."""
        found: list[ReceiptMsg | NackMsg] = []
        while (event := self.answers.poll(0.0)) is not None:
            if isinstance(event, Received):
                kind: type[ReceiptMsg] | type[NackMsg] = ReceiptMsg if event.topic.endswith("/receipt") else NackMsg
                found.append(verify(event.payload, kind, AGGREGATOR_KEY.public_key()))
        return found

    def stored(self) -> list[np.ndarray]:
        with self.store.transaction() as connection:
            return list(self.store.updates(connection, 3))

    def send_good(self, device: str = "watch-1", *, number: float = 1.0) -> int:
        update_id = hashlib.sha256(device.encode()).digest()[:16]
        recipient = self.key.recipient()
        envelope = make_update(device, update_id=update_id, round=3, body=values(number), recipient=recipient)
        return self.take(messages(envelope, device, update_id=update_id))
