"""What an aggregator has that breaks its promises: the keys of the real one, its database, the wire, and patience.

It may sign what it likes under the real keys, and keeps the rounds' private keys that it should erase. What it cannot
have is a helper's or a device's key, unless a test gives it one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.announcer import Announcer
from device_client import participation
from device_client.ports import Float32
from firmware_sim.virtual_broker import VirtualTransport
from fl_protocol.chunking import Reassembler, split
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import ChunkMsg, RoundManifestMsg, UpdateEnvelopeMsg, UpdateHeaderMsg, decode, encode
from fl_protocol.sealing import RoundKey, open_masked_update, open_sealed
from fl_protocol.secagg.messages import MaskSumMsg, SecureBodyMsg, UnmaskEntryMsg, UnmaskRefusalMsg, UnmaskRequestMsg
from fl_protocol.secagg.packing import unpack
from fl_protocol.secagg.parties import SecureRound, entry_for
from fl_protocol.secagg.terms import secure_round
from fl_protocol.signing import sign, verify
from fl_protocol.topics import helper_filters, helper_transfer_topic, parse_upload_topic
from fl_protocol.transport import Received
from tests.virtual_fleet import AGGREGATOR_KEY, TENANT, VirtualFleet, helper_identity

Residues = NDArray[np.int64]
"""Integers modulo 2^b, int64 [d]."""


class AttackFailedError(Exception):
    """A helper, a device or the mathematics withstood; the message says which, and why."""


class RogueAggregator:
    """See the module docstring.

    Args:
        fleet: in which it has taken the aggregator's place, or sits beside it.
    """

    def __init__(self, fleet: VirtualFleet) -> None:
        self.fleet = fleet
        self._keys: dict[int, RoundKey] = {}
        self.manifests: dict[int, RoundManifestMsg] = {}
        self._transport = VirtualTransport(fleet.broker)
        self._transport.open()
        for topic_filter in helper_filters(TENANT):
            self._transport.subscribe(topic_filter)
        self._answers = Reassembler()

    def run(self, until: Callable[[], bool], *, most_s: float = 300.0) -> None:
        """As the fleet's `run`; keeps each round's key and manifest as soon as there are any."""
        ends_s = self.fleet.clock.time_s + most_s
        while not until():
            assert self.fleet.clock.time_s < ends_s, f"not done after {most_s} virtual seconds"
            for _ in self.fleet.steps(8):
                self._keep_keys()
            self.fleet.clock.time_s += 0.5

    def run_until_published(self, number: int = 1) -> RoundManifestMsg:
        """The manifest of a round, as soon as there is one."""
        self.run(lambda: number in self.manifests)
        return self.manifests[number]

    def announce(self, manifest: RoundManifestMsg, params: Float32 | None = None) -> None:
        """Publish a manifest of its own, with a model unless that is out already."""
        wholes = [] if params is None else [params.astype("<f4").tobytes()]
        Announcer(TENANT, AGGREGATOR_KEY, self._transport).publish(manifest, wholes, kept=(), stale=())

    def sent(self, number: int = 1) -> set[str]:
        """Devices whose update for a round was on the wire."""
        return set(self.uploads(number))

    def uploads(self, number: int = 1) -> dict[str, tuple[UpdateHeaderMsg, SecureBodyMsg]]:
        """Header, and what is inside the seal, of all that was ever sent for a round, by device."""
        parts: dict[bytes, dict[int, bytes]] = {}
        for topic, payload in self.fleet.broker.published:
            if "/up/" in topic:
                chunk = decode(payload, ChunkMsg)
                parts.setdefault(parse_upload_topic(topic).update_id, {})[chunk.index] = chunk.data
        found = {}
        for chunks in parts.values():
            envelope = decode(b"".join(chunks[index] for index in sorted(chunks)), UpdateEnvelopeMsg)
            header = decode(envelope.header, UpdateHeaderMsg)
            if header.round == number:
                found[header.device] = header, open_masked_update(header, envelope.sealed, self._keys[number])
        return found

    def entries(self, helper: str, devices: Iterable[str], *, number: int = 1) -> list[UnmaskEntryMsg]:
        """A list for a helper."""
        terms, uploads = self.terms(number), self.uploads(number)
        return [entry_for(terms, uploads[device][1], helper) for device in devices]

    def terms(self, number: int = 1) -> SecureRound:
        """Of a round that it has the manifest of."""
        return secure_round(self.manifests[number])

    def ask(
        self, helper: str, entries: Sequence[UnmaskEntryMsg], *, manifest: RoundManifestMsg | None = None
    ) -> Residues:
        """A helper's sum of masks over a list. Raises AttackFailedError: it refuses, or says nothing."""
        named = manifest if manifest is not None else self.manifests[1]
        request = UnmaskRequestMsg(manifest=sign(named, AGGREGATOR_KEY), helper=helper, entries=tuple(entries))
        data = sign(request, AGGREGATOR_KEY)
        transfer_id = hashlib.sha256(data).digest()[:16]
        self._hear()
        for chunk in split(transfer_id, data, data_bytes=60_000):
            topic = helper_transfer_topic(TENANT, helper, "request", transfer_id, chunk.index)
            self._transport.publish(topic, encode(chunk))
        for _ in range(3):
            self.fleet.helpers[helper].step()
        return self._residues(helper, self._hear())

    def masked(self, devices: Iterable[str], *, number: int = 1) -> Residues:
        """The sum of devices' masked vectors."""
        uploads, point = self.uploads(number), self.terms(number).fixed_point
        vectors = [unpack(uploads[device][1].masked, point.length, point.bits).astype(np.int64) for device in devices]
        return np.sum(vectors, axis=0, dtype=np.int64)

    def mask_of(self, device: str, helper: str, key: RoundKey, *, terms: SecureRound | None = None) -> Residues:
        """A device's mask in round 1, by the private key of a helper.

        Raises:
            ProtocolError: the key does not open its seed.
        """
        terms = terms if terms is not None else self.terms()
        header, body = self.uploads()[device]
        info = terms.seed_info(helper, device=device, update_id=header.update_id)
        seed = open_sealed(body.seeds[list(terms.helpers).index(helper)], key, info=info)
        words = terms.masks.zeros()
        terms.masks.add(seed, info, words)
        return words.astype(np.int64)

    def read(self, residues: Residues, *, number: int = 1) -> NDArray[np.float64]:
        """Residues as an update, float64 [d]."""
        point = self.terms(number).fixed_point
        half = 1 << (point.bits - 1)
        return ((residues + half) % (2 * half) - half) * point.step

    def _keep_keys(self) -> None:
        """What should be erased when a round closes."""
        for live in self.fleet.store.rounds.live():
            self._keys[live.number] = live.key
            if live.manifest is not None:
                self.manifests.setdefault(live.number, decode(live.manifest, RoundManifestMsg))

    def _hear(self) -> list[bytes]:
        """Signed answers and refusals that have come."""
        found = []
        while (event := self._transport.poll(0.0)) is not None:
            if not isinstance(event, Received):
                continue
            if event.topic.endswith("/refusal"):
                found.append(event.payload)
            elif "/answer/" in event.topic:
                whole = self._answers.accept(decode(event.payload, ChunkMsg), self.fleet.clock.time_s)
                found += [whole] if whole is not None else []
        return found

    def _residues(self, helper: str, replies: list[bytes]) -> Residues:
        """What a helper has answered. Raises AttackFailedError."""
        if not replies:
            raise AttackFailedError(f"{helper} says nothing")
        key = helper_identity(helper).public_key()
        try:
            answer = verify(replies[-1], MaskSumMsg, key)
        except ProtocolError:
            refusal = verify(replies[-1], UnmaskRefusalMsg, key)
            raise AttackFailedError(f"{helper} refuses: {refusal.reason.value}") from None
        point = self.terms(answer.round).fixed_point
        return unpack(answer.total, point.length, point.bits).astype(np.int64)


def listen_to_updates(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], Float32]:
    """What each device really protects, float32 [d], by device and round: what an attack has to find to succeed."""
    found: dict[tuple[str, int], Float32] = {}
    really = participation.protected_update

    def protect(terms: Any, manifest: RoundManifestMsg, change: Float32, **how: Any) -> SecureBodyMsg:
        found[how["sender"].device, manifest.round] = change.copy()
        return really(terms, manifest, change, **how)

    monkeypatch.setattr(participation, "protected_update", protect)
    return found
