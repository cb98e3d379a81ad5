"""Random bytes from the operating system, stretched by AES-256-CTR where many are wanted.

A training step draws five bytes per parameter for its noise; the system's own generator takes longer over them than the
rest of the noise does. Each large request is the keystream under a key and counter drawn for it alone from the system
(AES in counter mode as in NIST SP 800-90A, section 10.2.1), so nothing is kept that a fork or a copied virtual machine
could repeat, and what is drawn is as strong as AES-256.
"""

from __future__ import annotations

import os

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_KEY_BYTES, _COUNTER_BYTES = 32, 16
_DIRECT_BYTES = 1024
"""Requests up to this many bytes, all keys among them, come from the system itself."""


def system_entropy(count: int) -> bytes:
    """`count` unpredictable bytes; `fl_protocol.integer_noise.Entropy`."""
    if count <= _DIRECT_BYTES:
        return os.urandom(count)
    seed = os.urandom(_KEY_BYTES + _COUNTER_BYTES)
    cipher = Cipher(algorithms.AES(seed[:_KEY_BYTES]), modes.CTR(seed[_KEY_BYTES:]))
    return cipher.encryptor().update(bytes(count))
