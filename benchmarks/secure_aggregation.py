"""Secure aggregation: whether sums are exact, and what it costs a device, a helper and the aggregator.

For each number of devices n and length d every device sends its update, masked for three helpers with hybrid keys; some
never arrive. ``exact``: whether the unmasked sum equals the sum of the same integers in every case. All noise is zero
here: it is part of the integers and changes no time.

    device_ms          masks and sealing of one update: three keystreams, three hybrid HPKE seals, packing, digests,
    signature device_whole_ms    the same with clipping and rounding before
    helper_over_primitives      a helper's time for a round over the bare keystreams and additions of the same masks
    aggregator_over_primitives  the aggregator's, for checking, adding up and unmasking, over the bare additions

Medians of interleaved repeats. Flower's SecAgg+ beside it is still to be added.

    python -m benchmarks.secure_aggregation
    python -m benchmarks.secure_aggregation --json
    python -m benchmarks.secure_aggregation --devices 20 --lengths 9000
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from benchmarks.command import parser
from benchmarks.timing import Lengths, alternate, cpu_name, milliseconds, timed
from fl_protocol.sealing import RoundKey, round_key_bytes
from fl_protocol.secagg.fixed_point import FixedPoint
from fl_protocol.secagg.messages import MaskSumMsg, SecureBodyMsg, UnmaskEntryMsg
from fl_protocol.secagg.parties import (
    SecureRound,
    Sender,
    contribute,
    entry_for,
    masked_vector,
    protect,
    sum_of_masks,
    unmask,
)

HELPERS = ("helper-a", "helper-b", "helper-c")
DEVICES, LENGTHS = (20, 50, 100, 1000), (9_000, 100_000, 1_000_000)
DROPOUTS = (0.0, 0.25, 0.5)
_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Case:
    """A round of n devices with updates of d numbers, and all keys."""

    terms: SecureRound
    helper_keys: dict[str, RoundKey]
    device_key: Ed25519PrivateKey

    @property
    def length(self) -> int:
        """D."""
        return self.terms.fixed_point.length

    def body(self, device: str, integers: NDArray[np.int64]) -> SecureBodyMsg:
        """What a device sends."""
        return protect(self.terms, integers, sender=self.sender(device), entropy=os.urandom)

    def sender(self, device: str) -> Sender:
        """A device; all have one key, which changes no time."""
        return Sender(device, update_id(device), self.device_key)


def main() -> None:
    """Measure, and print."""
    command = parser("secure_aggregation", __doc__)
    command.add_argument("--devices", type=int, nargs="+", default=list(DEVICES), help="numbers of devices")
    command.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="numbers in an update")
    command.add_argument("--repeats", type=int, default=5, help="of what is timed for one device (default 5)")
    arguments = command.parse_args()
    result = measure(arguments.devices, arguments.lengths, repeats=arguments.repeats)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for row in result["rounds"]:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    for key, value in result.items():
        if key != "rounds":
            print(f"{key:<28}{value}")


def measure(devices: list[int], lengths: list[int], *, repeats: int) -> dict[str, Any]:
    """All figures."""
    rounds = [whole_round(case_of(count, length), count) for count in devices for length in lengths]
    alone = {length: one_device(case_of(max(devices), length), repeats=repeats) for length in lengths}
    return {
        "exact": all(one["exact"] for one in rounds),
        "device_ms_100k": alone[100_000]["device_ms"] if 100_000 in alone else None,
        "device_ms_1m": alone[1_000_000]["device_ms"] if 1_000_000 in alone else None,
        "helper_over_primitives": {str(one["d"]): one["helper_over_primitives"] for one in rounds},
        "device": {str(length): figures for length, figures in alone.items()},
        "rounds": rounds,
        "repeats": repeats,
        "cpu": cpu_name(),
    }


def case_of(count: int, length: int) -> Case:
    """A round with fresh keys: 16 bits up to a hundred devices, as many as it takes beyond."""
    keys = {name: RoundKey("mlkem768-x25519", os.urandom(round_key_bytes("mlkem768-x25519"))) for name in HELPERS}
    point = FixedPoint(length, l2_norm_clip=1.0, step=2.0**-8, most_updates=count)
    terms = SecureRound(
        tenant="clinic",
        task="watch",
        number=1,
        manifest_digest=os.urandom(32),
        fixed_point=point,
        prg="aes128-gcm-zeros",
        rotation_seed=bytes(32),
        minimum_cohort=2,
        helpers={name: key.recipient() for name, key in keys.items()},
    )
    return Case(terms, keys, Ed25519PrivateKey.generate())


def whole_round(case: Case, count: int) -> dict[str, Any]:
    """A round for each share of devices that never arrive; what parties took beside their primitives."""
    names = [f"watch-{index}" for index in range(count)]
    integers = np.zeros(case.length, np.int64)
    # Few of them, so that they are no longer than a clipped update is.
    integers[:1000] = np.random.default_rng(count).integers(-6, 7, min(1000, case.length))
    total, expected, entries = case.terms.masks.zeros(), np.zeros(case.length, np.int64), []
    exact, adding_ms, bytes_up = True, 0.0, 0
    # Whoever arrives when half drop out arrives when fewer do, too; so one pass serves all.
    ends = {max(2, round(count * (1 - share))): share for share in DROPOUTS}
    for index, name in enumerate(names, start=1):
        mine = np.roll(integers, index)
        body = case.body(name, mine)
        bytes_up = max(bytes_up, _bytes(body))
        adding_ms += milliseconds(lambda body=body, name=name: _count(case, body, name, total))
        expected += mine
        entries.append({helper: entry_for(case.terms, body, helper) for helper in HELPERS})
        if index in ends:
            exact = exact and _is_exact(case, names[:index], entries, total, expected)
    sums, helper_ms = _answers(case, names, entries)
    ids = [update_id(name) for name in names]
    adding_ms += milliseconds(lambda: unmask(case.terms, total, sums, update_ids=ids))
    bare_masks_ms = statistics.median(milliseconds(lambda: bare_masks(case, count)) for _ in range(3))
    bare_adding_ms = statistics.median(milliseconds(lambda: bare_additions(case, count)) for _ in range(3))
    return {
        "n": count,
        "d": case.length,
        "bits": case.terms.fixed_point.bits,
        "exact": exact,
        "bytes_up": bytes_up,
        "helper_ms": round(helper_ms, 1),
        "helper_over_primitives": round(helper_ms / bare_masks_ms, 2),
        "aggregator_ms": round(adding_ms, 1),
        "aggregator_over_primitives": round(adding_ms / bare_adding_ms, 2),
    }


def _count(case: Case, body: SecureBodyMsg, name: str, total: Any) -> None:
    """What the aggregator does with an update."""
    key = case.device_key.public_key()
    masked = masked_vector(case.terms, body, device=name, update_id=update_id(name), device_key=key)
    total += masked.astype(total.dtype, copy=False)


def _is_exact(
    case: Case, names: list[str], entries: list[dict[str, UnmaskEntryMsg]], total: Any, expected: NDArray[np.int64]
) -> bool:
    """Whether the sum of those that have arrived so far is the sum of their integers."""
    sums, _ = _answers(case, names, entries)
    found = unmask(case.terms, total, sums, update_ids=[update_id(name) for name in names])
    return bool(np.array_equal(found, expected * case.terms.fixed_point.step))


def _answers(case: Case, names: list[str], entries: list[dict[str, UnmaskEntryMsg]]) -> tuple[list[MaskSumMsg], float]:
    """Every helper's sum of masks, and the median milliseconds of one."""
    keys = dict.fromkeys(names, case.device_key.public_key())
    sums: list[MaskSumMsg] = []

    def answer(helper: str) -> None:
        listed = [one[helper] for one in entries]
        key = case.helper_keys[helper]
        sums.append(sum_of_masks(case.terms, listed, helper=helper, key=key, device_keys=keys))

    taken = [milliseconds(lambda helper=helper: answer(helper)) for helper in HELPERS]
    return sums, statistics.median(taken)


def one_device(case: Case, *, repeats: int) -> dict[str, float]:
    """What one device takes, in turns with the bare keystreams."""
    values = np.random.default_rng(0).normal(size=case.length)
    update = (values / np.linalg.norm(values)).astype(np.float32)
    integers, noise = np.arange(case.length) % 7 - 3, np.zeros(case.length, np.int64)

    def whole() -> None:
        contribute(case.terms, update, noise, sender=case.sender("watch-0"), entropy=os.urandom)

    steps = {
        "device_ms": timed(lambda: case.body("watch-0", integers)),
        "device_whole_ms": timed(whole),
        "bare_ms": timed(lambda: bare_masks(case, len(HELPERS))),
    }
    found = alternate(steps, Lengths(repeats, max(3, 2_000_000 // case.length)))
    return {name: round(statistics.median(times), 3) for name, times in found.items()}


def bare_masks(case: Case, count: int) -> None:
    """So many keystreams, added up, and nothing else."""
    words = case.terms.masks.zeros()
    zeros = bytes(_AT_ONCE)
    each = _AT_ONCE // words.itemsize
    for index in range(count):
        keystream = Cipher(AES(index.to_bytes(16, "big")), CTR(bytes(16))).encryptor()
        for start in range(0, case.length, each):
            part = words[start : start + each]
            part += np.frombuffer(keystream.update(zeros[: part.nbytes]), words.dtype)


def bare_additions(case: Case, count: int) -> None:
    """So many vectors, added up, and nothing else."""
    words, other = case.terms.masks.zeros(), case.terms.masks.zeros()
    for _ in range(count):
        words += other


def update_id(device: str) -> bytes:
    """That of a device's update."""
    return hashlib.sha256(device.encode()).digest()[:16]


def _bytes(body: SecureBodyMsg) -> int:
    """What an update takes inside its seal, but for names and lengths of fields."""
    signed = body.contribution
    return len(signed.contribution) + len(signed.signature) + sum(map(len, body.seeds)) + len(body.masked)


if __name__ == "__main__":
    main()
