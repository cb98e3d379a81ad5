"""Masks: residues that follow from a seed, uniform for everybody who does not have it. Pure.

A device adds one mask for each helper, and gives each its seed. The keystream is that of AES-128 in counter mode (NIST
SP 800-38A) or of ChaCha20 (RFC 8439) for machines without AES instructions; the manifest says which. Its key follows
from the seed by HKDF-SHA256 (RFC 5869), bound to what the seed is for, so that a seed that was used twice by mistake
would still not give the same mask twice. A word of the stream is a residue: 2 bytes up to 16 bits, else 4, with the
excess bits cut off.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES, ChaCha20
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

Words = NDArray[np.unsignedinteger[Any]]
"""Residues in words of 2 bytes up to 16 bits, else of 4; sums wrap at the word."""
PrgName = Literal["aes128-ctr", "chacha20"]
SEED_BYTES = 16
_KEY_BYTES: dict[PrgName, int] = {"aes128-ctr": 16, "chacha20": 32}
_LABEL = b"covey v1 mask\0"
_AT_ONCE = 1 << 16  # words of a mask that are made and added while they are in the processor's cache


class Masks:
    """Adds masks of one length to residues, or takes them away.

    Args:
        length: of a mask, d.
        bits: b, of the modulus 2^b.
        prg: which keystream.
    """

    def __init__(self, *, length: int, bits: int, prg: PrgName) -> None:
        self._length, self._bits, self._prg = length, bits, prg
        self._word: np.dtype = np.dtype("<u2" if bits <= 16 else "<u4")  # type: ignore[type-arg]
        self._zeros = bytes(_AT_ONCE * self._word.itemsize)

    def zeros(self) -> Words:
        """What masks can be added to, [d]."""
        return np.zeros(self._length, self._word)

    def words_of(self, integers: NDArray[np.int64]) -> Words:
        """Integers, int64 [d], as what masks can be added to: modulo the word."""
        return integers.astype(self._word)

    def add(self, seed: bytes, context: bytes, residues: Words) -> None:
        """Add a seed's mask in place; take `reduced` of it in the end.

        Args:
            seed: `SEED_BYTES` random bytes.
            context: what the seed is for, the same for all who have it.
            residues: [d], as `zeros` gives them.
        """
        keystream = _cipher(seed, context, self._prg).encryptor()
        for start in range(0, self._length, _AT_ONCE):
            part = residues[start : start + _AT_ONCE]
            part += np.frombuffer(keystream.update(self._zeros[: part.nbytes]), self._word)

    def reduced(self, residues: Words) -> Words:
        """Residues modulo 2^b, [d]."""
        kept: Words = residues & self._word.type((1 << self._bits) - 1)
        return kept


def _cipher(seed: bytes, context: bytes, prg: PrgName) -> Cipher:  # type: ignore[type-arg]
    """The keystream of a seed in its context."""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"seed: expected {SEED_BYTES} bytes, got {len(seed)}")
    length = _KEY_BYTES[prg]
    key = HKDF(algorithm=SHA256(), length=length, salt=None, info=_LABEL + prg.encode() + b"\0" + context).derive(seed)
    # Each key makes one keystream, so its nonce may be the same.
    if prg == "chacha20":
        return Cipher(ChaCha20(key, bytes(16)), mode=None)
    return Cipher(AES(key), CTR(bytes(16)))
