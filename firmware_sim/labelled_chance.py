"""Chance without a stream: a number that follows from a key and labels alone, whatever was drawn before. Pure.

A device that slept, or that another shard simulates, draws the same numbers. SplitMix64's finaliser (G. Steele, D. Lea,
C. Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) mixes in each label; for the simulator only,
never for noise or keys.
"""

from __future__ import annotations

import hashlib

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def key_of(seed: int | str, *names: str) -> int:
    """A key of 64 bits for somebody, such as one device's radio.

    Args:
        seed: of the whole run.
        names: whose and what for.
    """
    told = "\0".join((str(seed), *names)).encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")


def uniform(key: int, *labels: int) -> float:
    """A number in [0, 1) for a key and labels, such as a message's number; every label counts, in its place."""
    return (bits(key, *labels) >> 11) * 2.0**-53


def bits(key: int, *labels: int) -> int:
    """64 bits for a key and labels."""
    state = key
    for label in (*labels, len(labels)):
        state = (state + _GOLDEN * (2 * label + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state
