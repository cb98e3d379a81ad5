"""A helper on a virtual broker, and the study that asks it: devices, manifests, lists, requests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.helper.answering import Study
from aggregator.helper.helper_store import HelperDatabase, HelperStore
from aggregator.helper.key_ring import Helper, KeyTerms
from aggregator.helper.service import HelperLimits, HelperService
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from fl_protocol.chunking import Reassembler, split
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import ChunkMsg, RecipientKeyMsg, RoundManifestMsg, SignedMsg, decode, encode
from fl_protocol.secagg.messages import (
    HelperKeyMsg,
    MaskSumMsg,
    SecureBodyMsg,
    UnmaskEntryMsg,
    UnmaskRefusalMsg,
    UnmaskRequestMsg,
)
from fl_protocol.secagg.parties import SecureRound, entry_for
from fl_protocol.secagg.terms import secure_round
from fl_protocol.signing import sign, verify
from fl_protocol.topics import helper_filters, helper_topic, helper_transfer_topic, parse_helper_topic
from fl_protocol.transport import Received
from tests.fl_protocol.examples import AGGREGATOR_KEY, HELPERS, helper_key, secure_manifest, secure_terms
from tests.fl_protocol.secagg.rounds import body_of, device_key

TENANT, TASK, HELPER, OTHER = "clinic", "watch", "helper-a", "helper-b"
NOW_S = 1_000_030.0
LENGTH, COHORT = 40, 3
DEVICES = [f"watch-{index}" for index in range(8)]
STUDY = Study(TENANT, AGGREGATOR_KEY.public_key())
IDENTITY = HELPERS[HELPER]


def own_key(recipient: RecipientKeyMsg, identity: Ed25519PrivateKey = IDENTITY, **changes: Any) -> bytes:
    """What a helper publishes."""
    fields = {"helper": HELPER, "operator": "operator-a", "recipient": recipient, "not_after_s": NOW_S + 1e5}
    return sign(HelperKeyMsg(**{**fields, **changes}), identity)


def manifest_of(signed_key: bytes, *, terms: dict[str, Any] | None = None, **changes: Any) -> RoundManifestMsg:
    """A round of this helper and another one."""
    helpers = (signed_key, sign(helper_key(OTHER), HELPERS[OTHER]))
    secure = secure_terms(**{"helpers": helpers, "helper_noise_sigma": 0.0, **(terms or {})})
    return secure_manifest(
        **{"num_parameters": LENGTH, "minimum_cohort": COHORT, "secure": secure, "round": 5, **changes}
    )


def bodies_of(terms: SecureRound, devices: Sequence[str] = DEVICES) -> dict[str, SecureBodyMsg]:
    """What honest devices sent."""
    return {device: body_of(terms, device) for device in devices}


def entries_of(terms: SecureRound, devices: Sequence[str], helper: str = HELPER) -> list[UnmaskEntryMsg]:
    """What a helper is told of devices' updates."""
    return [entry_for(terms, body, helper) for body in bodies_of(terms, devices).values()]


def request_of(
    manifest: RoundManifestMsg,
    entries: Sequence[UnmaskEntryMsg],
    *,
    key: Ed25519PrivateKey = AGGREGATOR_KEY,
    manifest_key: Ed25519PrivateKey = AGGREGATOR_KEY,
    **changes: Any,
) -> bytes:
    """A signed request."""
    fields = {"manifest": sign(manifest, manifest_key), "helper": HELPER, "entries": tuple(entries)}
    return sign(UnmaskRequestMsg(**{**fields, **changes}), key)


def request_for(manifest: RoundManifestMsg, devices: Sequence[str], **changes: Any) -> bytes:
    """An honest request about these devices."""
    return request_of(manifest, entries_of(secure_round(manifest), devices), **changes)


class Events:
    """A journal that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def write(self, event: str, /, *, at_s: float, **fields: Any) -> None:
        self.told.append({"event": event, "at_s": at_s, **fields})

    def named(self, event: str) -> list[dict[str, Any]]:
        return [one for one in self.told if one["event"] == event]


class Desk:
    """One helper with its store in a folder, on a virtual broker; and an aggregator's ears.

    Args:
        folder: for the store.
        kind: the service, or a broken copy of it.
        transport: what it talks through.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kind: Callable[..., HelperService] = HelperService,
        transport: Callable[[VirtualBroker], VirtualTransport] = VirtualTransport,
        minimum_cohort: int = COHORT,
        maximum_packet_bytes: int | None = None,
        broker: VirtualBroker | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
        now_s: float = NOW_S,
        key_terms: KeyTerms = KeyTerms("x25519"),  # noqa: B008 - frozen
        limits: dict[str, Any] | None = None,
        studies: Sequence[Study] = (STUDY,),
        transports: dict[str, VirtualTransport] | None = None,
    ) -> None:
        self.now_s, self.journal = now_s, Events()
        self.broker = broker or VirtualBroker(maximum_packet_bytes=maximum_packet_bytes)
        self.store = HelperStore(HelperDatabase(folder / "helper.db"), most_refusals=20)
        self.transport = transport(self.broker) if transports is None else transports[TENANT]
        self.service = kind(
            Helper(HELPER, "operator-a", IDENTITY),
            studies=studies,
            transports=transports or {TENANT: self.transport},
            store=self.store,
            journal=self.journal,
            entropy=entropy,
            now_s=lambda: self.now_s,
            limits=HelperLimits(**{"minimum_cohort": minimum_cohort, **(limits or {})}),
            key_terms=key_terms,
            wait=lambda _longest_s: None,
        )
        self.know(DEVICES)
        self.ears = VirtualTransport(self.broker)
        self.ears.open()
        for topic_filter in helper_filters(TENANT):
            self.ears.subscribe(topic_filter)
        self.heard: list[Received] = []
        self._parts = Reassembler()
        self.service.start()
        self.settle()

    def know(self, devices: Sequence[str]) -> None:
        keys = [(device, device_key(device).public_key().public_bytes_raw()) for device in devices]
        self.store.devices.add_all(TENANT, keys)

    def settle(self) -> None:
        for _ in range(3):
            self.service.step()

    def close(self) -> None:
        self.service.stop()
        self.ears.close()

    def key(self) -> bytes:
        """The retained, signed key."""
        return self.broker.retained[helper_topic(TENANT, HELPER, "key")]

    def manifest(self, **changes: Any) -> RoundManifestMsg:
        """A round with this helper's key of now."""
        return manifest_of(self.key(), **changes)

    def post(self, data: bytes, *, data_bytes: int = 600, order: Callable[[list[ChunkMsg]], Any] = list) -> None:
        """Publish a request in chunks."""
        transfer_id = hashlib.sha256(data).digest()[:16]
        for chunk in order(list(split(transfer_id, data, data_bytes=data_bytes))):
            topic = helper_transfer_topic(TENANT, HELPER, "request", transfer_id, chunk.index)
            self.broker.publish(topic, encode(chunk), retain=False)

    def ask(self, data: bytes, **how: Any) -> list[bytes]:
        """What comes back after a request: signed answers and refusals."""
        self.post(data, **how)
        self.settle()
        return self.hear()

    def hear(self) -> list[bytes]:
        """Answers and refusals that came since, whole."""
        found = []
        while (event := self.ears.poll(0.0)) is not None:
            if not isinstance(event, Received):
                continue
            self.heard.append(event)
            kind = parse_helper_topic(event.topic).kind
            if kind == "refusal":
                found.append(event.payload)
            elif kind == "answer":
                whole = self._parts.accept(decode(event.payload, ChunkMsg), self.now_s)
                if whole is not None:
                    found.append(whole)
        return found


def read_reply(data: bytes) -> MaskSumMsg | UnmaskRefusalMsg:
    """A signed reply, its signature verified."""
    try:
        return verify(data, MaskSumMsg, IDENTITY.public_key())
    except ProtocolError:
        return verify(data, UnmaskRefusalMsg, IDENTITY.public_key())


def recipient_in(signed_key: bytes) -> RecipientKeyMsg:
    """The public key that a helper published."""
    return decode(decode(signed_key, SignedMsg).payload, HelperKeyMsg).recipient


def rounds_reply(found: list[bytes]) -> MaskSumMsg | UnmaskRefusalMsg:
    """The only reply."""
    (one,) = found
    return read_reply(one)
