"""Numbers left to chance that depend on nothing but a name and a count: the same on every machine, in every order.

A keyed hash is a pseudorandom function (J. Aumasson et al., "BLAKE2", ACNS 2013, section 2.9: keyed mode), so a
device's day can be drawn without drawing the days before it, and nothing has to be kept between two draws.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

_WORDS = struct.Struct("<10I12H")
_LONG, _SHORT = 2.0**-32, 2.0**-16


def key_of(*names: object) -> bytes:
    """32 bytes that stand for what the chance is about.

    Args:
        names: such as a seed, a purpose and a device's number; each is taken by its `repr`.
    """
    return blake2b(repr(names).encode(), digest_size=32).digest()


def uniforms(key: bytes, count: int) -> list[float]:
    """22 independent uniform numbers, none of them 0 or 1.

    Args:
        key: of `key_of`.
        count: which draw; from -2^63 to 2^63 - 1.

    Returns:
        10 with 32 random bits, then 12 with 16.
    """
    words = _WORDS.unpack(blake2b(count.to_bytes(8, "little", signed=True), key=key).digest())
    return [(word + 0.5) * _LONG for word in words[:10]] + [(word + 0.5) * _SHORT for word in words[10:]]
