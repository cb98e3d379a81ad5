"""Masks: residues that follow from a seed, uniform for everybody who does not have it. Pure.

A device adds one mask for each helper, and gives each its seed. The keystream is that of AES-128 in counter mode (NIST
SP 800-38A), started anew for every 256 KiB at a counter that no other block reaches, or of ChaCha20 (RFC 8439) for
machines without AES instructions; the manifest says which. Its key follows from the seed by HKDF-SHA256 (RFC 5869),
bound to what the seed is for, so that a seed that was used twice by mistake would still not give the same mask twice. A
word of the stream is a residue: 2 bytes up to 16 bits, else 4, with the excess bits cut off.

AES in counter mode is taken from AES-GCM, which `cryptography` computes in one call and twice as fast: zeros, encrypted
under a nonce of 12 bytes, are the keystream from the counter block nonce || 2 on (NIST SP 800-38D, section 7.1). The
tag at the end is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

Words = NDArray[np.unsignedinteger[Any]]
"""Residues in words of 2 bytes up to 16 bits, else of 4; sums wrap at the word."""
PrgName = Literal["aes128-gcm-zeros", "chacha20"]
SEED_BYTES = 16
BLOCK_BYTES = 1 << 18  # of keystream, made and added while it is in the processor's cache; part of the protocol
_KEY_BYTES: dict[PrgName, int] = {"aes128-gcm-zeros": 16, "chacha20": 32}
_LABEL = b"covey v1 mask\0"
_NONCE_BYTES, _TAG_BYTES = 12, 16
_Keystream = Callable[[int, memoryview], None]
"""Writes a block, by its number, into all but the last `_TAG_BYTES` of a buffer; called with 0, 1, 2, and so on."""


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
        self._zeros = bytes(min(BLOCK_BYTES, length * self._word.itemsize))

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
        keystream = self._keystream(seed, context)
        at_once = BLOCK_BYTES // self._word.itemsize
        buffer = np.empty(len(self._zeros) + _TAG_BYTES, np.uint8).data
        for block, start in enumerate(range(0, self._length, at_once)):
            part = residues[start : start + at_once]
            keystream(block, buffer[: part.nbytes + _TAG_BYTES])
            part += np.frombuffer(buffer, self._word, count=len(part))

    def reduced(self, residues: Words) -> Words:
        """Residues modulo 2^b, [d]."""
        kept: Words = residues & self._word.type((1 << self._bits) - 1)
        return kept

    def _keystream(self, seed: bytes, context: bytes) -> _Keystream:
        """Of a seed in its context."""
        key, zeros = _key(seed, context, self._prg), memoryview(self._zeros)
        if self._prg == "chacha20":
            # Each key makes one keystream, so its nonce may be the same; it goes on from block to block.
            encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

            def go_on(_block: int, out: memoryview) -> None:
                encryptor.update_into(zeros[: len(out) - _TAG_BYTES], out)

            return go_on
        gcm = AESGCM(key)

        def fill(block: int, out: memoryview) -> None:
            # Security: a nonce twice would be the same keystream twice.
            gcm.encrypt_into(block.to_bytes(_NONCE_BYTES, "big"), zeros[: len(out) - _TAG_BYTES], None, out)

        return fill


def _key(seed: bytes, context: bytes, prg: PrgName) -> bytes:
    """The keystream's key."""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"seed: expected {SEED_BYTES} bytes, got {len(seed)}")
    info = _LABEL + prg.encode() + b"\0" + context
    return HKDF(algorithm=SHA256(), length=_KEY_BYTES[prg], salt=None, info=info).derive(seed)
