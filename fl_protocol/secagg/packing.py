"""Residues modulo 2^b as bytes: b bits each, least significant first, the last byte filled up with zeros. Pure.

Eight residues take b bytes, so whole groups of eight are packed at once; 16 and 32 bits are arrays as they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fl_protocol.errors import ProtocolError

_GROUP = 8


def packed_bytes(length: int, bits: int) -> int:
    """Bytes that so many residues take."""
    return -(-length * bits // 8)


def pack(residues: NDArray[np.uint32], bits: int) -> bytes:
    """Residues below 2^bits, uint32 [d], as bytes."""
    if bits in (16, 32):
        return residues.astype(f"<u{bits // 8}").tobytes()
    groups = -(-len(residues) // _GROUP)
    padded = np.zeros((groups, _GROUP), np.uint64)
    padded.reshape(-1)[: len(residues)] = residues
    packed = np.zeros((groups, bits), np.uint8)
    for index, first, shift, count in _layout(bits):
        moved = padded[:, index] << np.uint64(shift)
        for byte in range(count):
            packed[:, first + byte] |= (moved >> np.uint64(8 * byte)).astype(np.uint8)
    return packed.tobytes()[: packed_bytes(len(residues), bits)]


def unpack(raw: bytes | memoryview, length: int, bits: int) -> NDArray[np.uint32]:
    """Residues, uint32 [length], from untrusted bytes.

    Raises:
        ProtocolError: wrong length, or the bits that fill up the last byte are not zero.
    """
    if len(raw) != packed_bytes(length, bits):
        raise ProtocolError(
            f"expected {packed_bytes(length, bits)} bytes for {length} residues of {bits} bits, got {len(raw)}"
        )
    if bits in (16, 32):
        return np.frombuffer(raw, f"<u{bits // 8}").astype(np.uint32)
    groups = -(-length // _GROUP)
    padded = np.zeros(groups * bits, np.uint8)
    padded[: len(raw)] = np.frombuffer(raw, np.uint8)
    packed, residues = padded.reshape(groups, bits), np.zeros((groups, _GROUP), np.uint64)
    for index, first, shift, count in _layout(bits):
        for byte in range(count):
            residues[:, index] |= packed[:, first + byte].astype(np.uint64) << np.uint64(8 * byte)
        residues[:, index] >>= np.uint64(shift)
    residues &= np.uint64((1 << bits) - 1)
    flat = residues.reshape(-1).astype(np.uint32)
    if (flat[length:] != 0).any() or _last_bits(raw, length, bits):
        raise ProtocolError(f"the bits after {length} residues of {bits} bits are not zero")
    return flat[:length]


def _layout(bits: int) -> list[tuple[int, int, int, int]]:
    """For each residue of a group: its index, its first byte, where in that it begins, and how many bytes it is in."""
    starts = [index * bits for index in range(_GROUP)]
    return [(index, start // 8, start % 8, -(-(start % 8 + bits) // 8)) for index, start in enumerate(starts)]


def _last_bits(raw: bytes | memoryview, length: int, bits: int) -> int:
    """What the last byte holds beyond the last residue."""
    used = length * bits % 8
    return raw[-1] >> used if used else 0
