"""Chance without a stream: a number that follows from a key and labels alone, whatever was drawn before. Pure.

A device that slept, or that another shard simulates, draws the same numbers. BLAKE2b (RFC 7693) makes them independent;
they are for the simulator only, never for noise or keys.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

_PACKED = [struct.Struct(f"<Q{count}q") for count in range(8)]


def key_of(seed: int | str, *names: str) -> int:
    """A key of 64 bits for somebody, such as one device's radio.

    Args:
        seed: of the whole run.
        names: whose and what for.
    """
    told = "\0".join((str(seed), *names)).encode()
    return int.from_bytes(blake2b(told, digest_size=8).digest(), "little")


def uniform(key: int, *labels: int) -> float:
    """A number in [0, 1) for a key and labels, such as a message's number; every label counts, in its place.

    Args:
        key: `key_of` somebody.
        labels: at most seven, each of 64 bits with a sign.
    """
    return (bits(key, *labels) >> 11) * 2.0**-53


def bits(key: int, *labels: int) -> int:
    """64 bits for a key and labels; see `uniform`."""
    packed = _PACKED[len(labels)].pack(key, *labels)
    return int.from_bytes(blake2b(packed, digest_size=8, person=b"chance").digest(), "little")
