"""Vectors of secure aggregation: integers, masks, packing, and what a seed and a list are bound to."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from fl_protocol.secagg.fixed_point import FixedPoint
from fl_protocol.secagg.masks import Masks, PrgName
from fl_protocol.secagg.packing import pack
from fl_protocol.secagg.parties import included_digest
from tests.fl_protocol.secagg.rounds import ROTATION_SEED, residues, secure_round, update_id

_PRGS: tuple[PrgName, ...] = ("aes128-gcm-zeros", "chacha20")


def secagg() -> dict[str, Any]:
    """Everything that does not depend on fresh randomness."""
    info = secure_round().seed_info("helper-a", device="watch-1", update_id=update_id("watch-1"))
    ids = [update_id(f"watch-{index}") for index in range(3)]
    return {
        "fixed_point": [_fixed_point(**settings) for settings in _POINTS],
        "masks": [_mask(prg, bits, info) for prg in _PRGS for bits in (12, 16, 17, 32)],
        "packing": [_packed(bits) for bits in (12, 13, 16, 20, 31, 32)],
        "must_fail": [
            {"why": "a byte too few", "bits": 13, "length": 5, "packed": bytes(8).hex(), "error": "ProtocolError"},
            {"why": "a byte too many", "bits": 16, "length": 5, "packed": bytes(11).hex(), "error": "ProtocolError"},
            {
                "why": "bits left over",
                "bits": 13,
                "length": 5,
                "packed": (bytes(8) + b"\x02").hex(),
                "error": "ProtocolError",
            },
        ],
        "seed_info": {
            "tenant": "clinic",
            "task": "watch",
            "round": 7,
            "manifest_digest": secure_round().manifest_digest.hex(),
            "device": "watch-1",
            "update_id": update_id("watch-1").hex(),
            "helper": "helper-a",
            "info": info.hex(),
        },
        "included": {"update_ids": [one.hex() for one in ids], "digest": included_digest(ids).hex()},
    }


_POINTS: list[dict[str, Any]] = [
    {"length": 6, "l2_norm_clip": 1.0, "step": 0.0625, "most_updates": 100, "noise_bound": 0, "rotates": False},
    {
        "length": 6,
        "l2_norm_clip": 1.0,
        "step": 0.0009765625,
        "most_updates": 1000,
        "noise_bound": 5000,
        "rotates": False,
    },
    {"length": 6, "l2_norm_clip": 0.25, "step": 0.0078125, "most_updates": 20, "noise_bound": 300, "rotates": True},
]
_VALUES = np.float32([0.3, -0.2, 0.05, 0.0, -0.7, 0.1])


def _fixed_point(**settings: Any) -> dict[str, Any]:
    """An update, the random bytes of its first rounding, and what comes of them."""
    point, draws = FixedPoint(**settings), hashlib.shake_128(repr(settings).encode()).digest(12)
    integers = point.encode(_VALUES, rotation_seed=ROTATION_SEED, entropy=lambda _count: draws)
    return {
        **settings,
        "bits": point.bits,
        "coordinate_bound": point.coordinate_bound,
        "norm_bound": point.norm_bound,
        "rotation_seed": ROTATION_SEED.hex(),
        "values": _VALUES.tobytes().hex(),
        "draws": draws.hex(),
        "integers": integers.tolist(),
        "residues": residues(point, integers).tolist(),
    }


def _mask(prg: PrgName, bits: int, info: bytes) -> dict[str, Any]:
    """A mask of ten numbers."""
    masks, seed = Masks(length=10, bits=bits, prg=prg), hashlib.shake_128(prg.encode()).digest(16)
    words = masks.zeros()
    masks.add(seed, info, words)
    return {"prg": prg, "bits": bits, "seed": seed.hex(), "info": info.hex(), "mask": masks.reduced(words).tolist()}


def _packed(bits: int) -> dict[str, Any]:
    """Eleven residues as bytes."""
    residues = np.random.default_rng(bits).integers(0, 1 << bits, 11, dtype=np.uint32)
    return {"bits": bits, "residues": residues.tolist(), "packed": pack(residues, bits).hex()}
