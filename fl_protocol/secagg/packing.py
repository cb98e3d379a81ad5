"""Residues modulo 2^b as bytes: b bits each, least significant first, the last byte filled up with zeros. Pure.

Eight residues are a group of b bytes. In words of 64 bits neighbours are moved together until a word holds two residues
(b above 16) or four; a group's words are then written where they belong, many groups at a time. The last word of a
group ends with it, so it says some bytes a second time; none of another group's.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_protocol.errors import ProtocolError

_GROUP = 8
_WORD_BITS, _WORD_BYTES = 64, 8
_AT_ONCE = 1 << 16  # residues, in whole groups, which with what is made of them stay in the processor's cache


def packed_bytes(length: int, bits: int) -> int:
    """Bytes that so many residues take."""
    return -(-length * bits // 8)


def pack(residues: NDArray[np.unsignedinteger[Any]], bits: int) -> bytes:
    """Residues below 2^bits, bits being 12 to 32, unsigned [d], as bytes."""
    if bits in (16, 32):
        return residues.astype(f"<u{bits // 8}", copy=False).tobytes()
    pieces, packed = _piece_bits(bits), []
    for start in range(0, len(residues), _AT_ONCE):
        taken = residues[start : start + _AT_ONCE]
        groups = np.zeros((-(-len(taken) // _GROUP), _GROUP), _residue(bits))
        groups.reshape(-1)[: len(taken)] = taken
        folded = groups.view("<u8")
        _fold(folded, bits)
        words = {index * pieces: column.copy() for index, column in enumerate(folded.T)}
        part = np.empty(len(groups) * bits, np.uint8)
        for offset, column in _columns(part, bits):
            column[:] = _put_together(words, 8 * offset)
        packed.append(part[: packed_bytes(len(taken), bits)].data)
    return b"".join(packed)


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
    pieces, residues = _piece_bits(bits), np.empty((-(-length // _GROUP), _GROUP), _residue(bits))
    for start in range(0, len(residues), _AT_ONCE // _GROUP):
        groups = residues[start : start + _AT_ONCE // _GROUP]
        part = np.zeros(len(groups) * bits, np.uint8)
        received = np.frombuffer(raw, np.uint8)[start * bits :][: len(part)]
        part[: len(received)] = received
        words = {8 * offset: column.copy() for offset, column in _columns(part, bits)}
        folded = groups.view("<u8")
        for index, column in enumerate(folded.T):
            column[:] = _put_together(words, index * pieces)
        folded &= np.uint64((1 << pieces) - 1)
        _unfold(folded, bits)
    if residues.reshape(-1)[length:].any() or raw[-1] >> (length * bits % 8 or 8):
        raise ProtocolError(f"the bits after {length} residues of {bits} bits are not zero")
    return residues.reshape(-1)[:length]


def _residue(bits: int) -> str:
    """The dtype of one."""
    return "<u2" if bits <= 16 else "<u4"


def _piece_bits(bits: int) -> int:
    """Of the residues that are moved together in one word."""
    return bits * (_WORD_BITS // (16 if bits <= 16 else 32))


def _steps(bits: int) -> Iterator[tuple[np.uint64, np.uint64, np.uint64]]:
    """For each doubling: the lower of two neighbours, where the upper one comes to, and how far it moves."""
    lane, width = (16 if bits <= 16 else 32), bits
    while lane < _WORD_BITS:
        lower = sum(((1 << width) - 1) << start for start in range(0, _WORD_BITS, 2 * lane))
        yield np.uint64(lower), np.uint64(lower << width), np.uint64(lane - width)
        lane, width = 2 * lane, 2 * width


def _fold(words: NDArray[np.uint64], bits: int) -> None:
    """Move the residues in each word together."""
    upper_ones = np.empty_like(words)
    for lower, upper, distance in _steps(bits):
        np.right_shift(words, distance, out=upper_ones)
        upper_ones &= upper
        words &= lower
        words |= upper_ones


def _unfold(words: NDArray[np.uint64], bits: int) -> None:
    """Undo `_fold`."""
    upper_ones = np.empty_like(words)
    for lower, upper, distance in reversed(list(_steps(bits))):
        np.bitwise_and(words, upper, out=upper_ones)
        upper_ones <<= distance
        words &= lower
        words |= upper_ones


def _columns(packed: NDArray[np.uint8], bits: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """The words of all groups, one of each at a time, with the byte of the group that it begins at."""
    for start in range(0, bits, _WORD_BYTES):
        offset = min(start, bits - _WORD_BYTES)
        yield offset, np.ndarray((len(packed) // bits,), "<u8", packed.data, offset, (bits,))


def _put_together(words: dict[int, NDArray[np.uint64]], start: int) -> NDArray[np.uint64]:
    """What 64 bits from a bit on hold of words, by the bit that each begins at; they agree where they overlap."""
    shifted = [
        word << np.uint64(at - start) if at >= start else word >> np.uint64(start - at)
        for at, word in words.items()
        if abs(at - start) < _WORD_BITS
    ]
    return functools.reduce(operator.ior, shifted)
