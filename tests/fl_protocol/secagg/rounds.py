"""A secure round with everybody in it, from seeds."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fl_protocol.sealing import RoundKey
from fl_protocol.secagg.fixed_point import FixedPoint
from fl_protocol.secagg.messages import SecureBodyMsg, UnmaskEntryMsg
from fl_protocol.secagg.parties import SecureRound, Sender, contribute, entry_for
from tests.fl_protocol.examples import round_key

HELPERS = ("helper-a", "helper-b", "helper-c")
ROTATION_SEED = b"a round's rotation"


def seeded(seed: str) -> Any:
    """A source of bytes that repeats itself; for tests only."""
    calls = iter(range(10**9))
    return lambda count: hashlib.shake_128(f"{seed} {next(calls)}".encode()).digest(count)


def device_key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def helper_keys(helpers: tuple[str, ...] = HELPERS) -> dict[str, RoundKey]:
    return {name: round_key("x25519", seed=30 + index) for index, name in enumerate(helpers)}


def fixed_point(length: int = 40, **changes: Any) -> FixedPoint:
    settings = {"l2_norm_clip": 1.0, "step": 2.0**-8, "most_updates": 50, "noise_bound": 0, "rotates": False}
    return FixedPoint(length=length, **{**settings, **changes})


def secure_round(length: int = 40, *, helpers: tuple[str, ...] = HELPERS, **changes: Any) -> SecureRound:
    settings: dict[str, Any] = {
        "tenant": "clinic",
        "task": "watch",
        "number": 7,
        "manifest_digest": hashlib.sha256(b"a manifest").digest(),
        "fixed_point": fixed_point(length),
        "prg": "aes128-gcm-zeros",
        "rotation_seed": ROTATION_SEED,
        "minimum_cohort": 3,
        "helpers": {name: key.recipient() for name, key in helper_keys(helpers).items()},
    }
    return SecureRound(**{**settings, **changes})


def residues(point: FixedPoint, integers: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Integers modulo 2^b."""
    return (integers & ((1 << point.bits) - 1)).astype(np.uint32)


def updates_of(devices: list[str], length: int = 40, norm: float = 0.9) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(len(devices) + length)
    made = {}
    for device in devices:
        values = generator.normal(size=length)
        made[device] = (values * (norm / np.linalg.norm(values))).astype(np.float32)
    return made


def update_id(device: str) -> bytes:
    return hashlib.sha256(f"update of {device}".encode()).digest()[:16]


def sender_of(device: str, own_id: bytes | None = None) -> Sender:
    return Sender(device, own_id or update_id(device), device_key(device))


def body_of(
    terms: SecureRound, device: str, update: NDArray[np.float32] | None = None, **changes: Any
) -> SecureBodyMsg:
    """A device's honest message."""
    values = update if update is not None else updates_of([device], terms.fixed_point.length)[device]
    settings: dict[str, Any] = {"sender": sender_of(device), "entropy": seeded(device)}
    return contribute(terms, values, np.zeros(len(values), np.int64), **{**settings, **changes})


def entries_of(terms: SecureRound, devices: list[str], helper: str = HELPERS[0]) -> list[UnmaskEntryMsg]:
    return [entry_for(terms, body_of(terms, device), helper) for device in devices]
