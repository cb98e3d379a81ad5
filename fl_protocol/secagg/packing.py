"""Residues modulo 2^b as bytes: b bits each, least significant first, the last byte filled up with zeros. Pure.

Eight residues take b bytes. They are put together in words of 64 bits, many groups of eight at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_protocol.errors import ProtocolError

_GROUP = 8
_WORD_BITS = 64
_GROUPS_AT_ONCE = 4096  # 256 KiB of words, which stay in the processor's cache


def packed_bytes(length: int, bits: int) -> int:
    """Bytes that so many residues take."""
    return -(-length * bits // 8)


def pack(residues: NDArray[np.unsignedinteger[Any]], bits: int) -> bytes:
    """Residues below 2^bits, unsigned [d], as bytes."""
    if bits in (16, 32):
        return residues.astype(f"<u{bits // 8}", copy=False).tobytes()
    packed = np.empty((-(-len(residues) // _GROUP), bits), np.uint8)
    for start in range(0, len(packed), _GROUPS_AT_ONCE):
        part = packed[start : start + _GROUPS_AT_ONCE]
        values = np.zeros((_GROUP, len(part)), np.uint64)
        taken = residues[start * _GROUP : (start + len(part)) * _GROUP]
        whole = len(taken) // _GROUP
        values[:, :whole] = taken[: whole * _GROUP].reshape(whole, _GROUP).T
        values[: len(taken) - whole * _GROUP, whole:] = taken[whole * _GROUP :, np.newaxis]  # the last group
        words = np.zeros((len(part), -(-bits // _GROUP)), "<u8")
        for index, word, shift in _places(bits):
            words[:, word] |= values[index] << shift
            if int(shift) + bits > _WORD_BITS:
                words[:, word + 1] |= values[index] >> (np.uint64(_WORD_BITS) - shift)
        part[:] = words.view(np.uint8)[:, :bits]
    return packed.tobytes()[: packed_bytes(len(residues), bits)]


def unpack(raw: bytes | memoryview, length: int, bits: int) -> NDArray[np.unsignedinteger[Any]]:
    """Residues, unsigned [length], from untrusted bytes; they may be borrowed from these.

    Raises:
        ProtocolError: wrong length, or the bits that fill up the last byte are not zero.
    """
    if len(raw) != packed_bytes(length, bits):
        raise ProtocolError(
            f"expected {packed_bytes(length, bits)} bytes for {length} residues of {bits} bits, got {len(raw)}"
        )
    if bits in (16, 32):
        return np.frombuffer(raw, f"<u{bits // 8}")
    groups = -(-length // _GROUP)
    padded = np.zeros(groups * bits, np.uint8)
    padded[: len(raw)] = np.frombuffer(raw, np.uint8)
    packed, residues = padded.reshape(groups, bits), np.empty((groups, _GROUP), np.uint32)
    for start in range(0, groups, _GROUPS_AT_ONCE):
        part = packed[start : start + _GROUPS_AT_ONCE]
        words = np.zeros((len(part), -(-bits // _GROUP)), "<u8")
        words.view(np.uint8)[:, :bits] = part
        for index, word, shift in _places(bits):
            value = words[:, word] >> shift
            if int(shift) + bits > _WORD_BITS:
                value |= words[:, word + 1] << (np.uint64(_WORD_BITS) - shift)
            residues[start : start + len(part), index] = value & np.uint64((1 << bits) - 1)
    if residues.reshape(-1)[length:].any() or raw[-1] >> (length * bits % 8 or 8):
        raise ProtocolError(f"the bits after {length} residues of {bits} bits are not zero")
    return residues.reshape(-1)[:length]


def _places(bits: int) -> list[tuple[int, int, np.uint64]]:
    """For each residue of a group: its index, the word that it begins in, and after how many bits."""
    starts = [index * bits for index in range(_GROUP)]
    return [(index, start // _WORD_BITS, np.uint64(start % _WORD_BITS)) for index, start in enumerate(starts)]
