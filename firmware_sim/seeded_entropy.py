"""Random bytes that follow from a seed, for simulations only: whoever knows the seed knows every key and all noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes


class SeededEntropy:
    """`fl_protocol.integer_noise.Entropy`: the keystream of AES-256-CTR under the SHA-256 of a seed.

    One stream: what a call gives follows from the seed and from how many bytes were drawn before it.

    Args:
        seed: another one gives other bytes.

    Attributes:
        told: of everything that is drawn.
    """

    def __init__(self, seed: str) -> None:
        self._seed = seed.encode()
        self.told: Callable[[bytes], None] | None = None

    def __call__(self, count: int) -> bytes:
        """The next `count` bytes."""
        drawn = self._keystream.update(bytes(count))
        if self.told is not None:
            self.told(drawn)
        return drawn

    @cached_property
    def _keystream(self) -> CipherContext:
        """Made when the first byte is drawn: of a device's several sources most are never asked."""
        # A training step draws tens of kilobytes; SHAKE-256 took twenty times as long over them.
        return Cipher(algorithms.AES(hashlib.sha256(self._seed).digest()), modes.CTR(bytes(16))).encryptor()
