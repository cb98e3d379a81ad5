"""A secure round as benchmarks time it: the keys of all parties, what one device does, and bare primitives beside it.

Imports nothing but the protocol, so that it runs in a peer's environment too (`benchmarks.peers.flower_secagg`).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from benchmarks.timing import Step
from device_client.adapters.system_entropy import system_entropy
from fl_protocol.messages import RecipientKeyMsg, UpdateEnvelopeMsg, UpdateHeaderMsg, encode
from fl_protocol.sealing import RoundKey, open_sealed, round_key_bytes, seal_to
from fl_protocol.secagg.fixed_point import FixedPoint
from fl_protocol.secagg.masks import Words
from fl_protocol.secagg.messages import SecureBodyMsg, UnmaskEntryMsg
from fl_protocol.secagg.parties import SecureRound, Sender, contribute, protect
from fl_protocol.signing import contribution_signature_is_valid, sign_header

HELPERS = ("helper-a", "helper-b", "helper-c")
STEP = 2.0**-8
"""Of the grid, for a clip of 1."""
_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Case:
    """A round of n devices with updates of d numbers, and all keys."""

    terms: SecureRound
    helper_keys: dict[str, RoundKey]
    aggregator: RecipientKeyMsg
    device_key: Ed25519PrivateKey

    @property
    def length(self) -> int:
        """D."""
        return self.terms.fixed_point.length

    def body(self, device: str, integers: NDArray[np.int64]) -> SecureBodyMsg:
        """What a device sends, from integers that have their noise."""
        return protect(self.terms, integers, sender=self.sender(device), entropy=system_entropy)

    def sender(self, device: str) -> Sender:
        """A device; all have one key, which changes no time."""
        return Sender(device, update_id(device), self.device_key)


def case_of(count: int, length: int, *, step: float = STEP) -> Case:
    """A round with fresh keys; with `STEP` it takes 16 bits for 100 devices."""
    keys = {name: _fresh_key() for name in HELPERS}
    terms = SecureRound(
        tenant="clinic",
        task="watch",
        number=1,
        manifest_digest=os.urandom(32),
        fixed_point=FixedPoint(length, l2_norm_clip=1.0, step=step, most_updates=count),
        prg="aes128-gcm-zeros",
        rotation_seed=bytes(32),
        minimum_cohort=2,
        helpers={name: key.recipient() for name, key in keys.items()},
    )
    return Case(terms, keys, _fresh_key().recipient(), Ed25519PrivateKey.generate())


def _fresh_key() -> RoundKey:
    return RoundKey("mlkem768-x25519", os.urandom(round_key_bytes("mlkem768-x25519")))


def update_id(device: str) -> bytes:
    """That of a device's update."""
    return hashlib.sha256(device.encode()).digest()[:16]


def update_of(length: int) -> NDArray[np.float32]:
    """Float32 [d] of norm 1.1: it is clipped."""
    values = np.random.default_rng(0).normal(size=length)
    return (values * (1.1 / np.linalg.norm(values))).astype(np.float32)


def device_steps(case: Case) -> dict[str, Step]:
    """What one device does, by how much of it.

    ``device_ms`` masks and seals seeds; ``device_whole_ms`` clips and rounds before; ``device_upload_ms`` also seals
    everything to the aggregator and signs, as every update is.
    """
    update, noise = update_of(case.length), np.zeros(case.length, np.int64)
    integers = case.terms.fixed_point.encode(update, rotation_seed=bytes(32), entropy=system_entropy)
    sender = case.sender("watch-0")
    return {
        "device_ms": lambda: case.body("watch-0", integers),
        "device_whole_ms": lambda: contribute(case.terms, update, noise, sender=sender, entropy=system_entropy),
        "device_upload_ms": lambda: whole_upload(case, update, noise),
    }


def whole_upload(case: Case, update: NDArray[np.float32], noise: NDArray[np.int64]) -> bytes:
    """An update from float32 to the bytes that go up."""
    sender = case.sender("watch-0")
    body = contribute(case.terms, update, noise, sender=sender, entropy=system_entropy)
    sealed = seal_to(case.aggregator, encode(body), info=case.terms.manifest_digest)
    header = encode(
        UpdateHeaderMsg(
            tenant=case.terms.tenant,
            task=case.terms.task,
            round=case.terms.number,
            model_digest=case.terms.manifest_digest,
            device=sender.device,
            update_id=sender.update_id,
            kem="mlkem768-x25519",
            sealed_digest=hashlib.sha256(sealed).digest(),
        )
    )
    return encode(UpdateEnvelopeMsg(header=header, signature=sign_header(header, sender.signing_key), sealed=sealed))


def bare_masks(case: Case, count: int) -> None:
    """So many keystreams, added up, and nothing else."""
    words = case.terms.masks.zeros()
    zeros, buffer = memoryview(bytes(_AT_ONCE)), memoryview(bytearray(_AT_ONCE + 16))
    each = _AT_ONCE // words.itemsize
    for index in range(count):
        gcm = AESGCM(index.to_bytes(16, "big"))
        for block, start in enumerate(range(0, case.length, each)):
            part = words[start : start + each]
            gcm.encrypt_into(block.to_bytes(12, "big"), zeros[: part.nbytes], None, buffer[: part.nbytes + 16])
            part += np.frombuffer(buffer, words.dtype, count=len(part))


def bare_openings(case: Case, entry: UnmaskEntryMsg, device: str, count: int) -> None:
    """So many seeds opened, and nothing else."""
    info = case.terms.seed_info(HELPERS[0], device=device, update_id=update_id(device))
    for _ in range(count):
        open_sealed(entry.seed, case.helper_keys[HELPERS[0]], info=info)


def bare_verifications(case: Case, entry: UnmaskEntryMsg, count: int) -> None:
    """So many signatures verified, and nothing else."""
    key, signed = case.device_key.public_key(), entry.contribution
    for _ in range(count):
        contribution_signature_is_valid(signed.contribution, signed.signature, key)


def bare_sums(body: SecureBodyMsg, words: Words, total: Words) -> None:
    """A masked vector's SHA-256 and its addition, and nothing else."""
    hashlib.sha256(body.masked).digest()
    total += words
