"""Partial sums as they are kept: encrypted under a key that follows from a secret of their round.

A sum of few updates tells about each, so it is not left in the clear, and it becomes unreadable when its round is
closed, which erases the secret. It is not the round's private key: an asynchronous task needs those for updates that
come late. AES-256-GCM (NIST SP 800-38D) with random nonces under a key from
HKDF-SHA256 (RFC 5869); a round sees far fewer than the 2^32 encryptions that random nonces allow. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from aggregator.errors import BlobError
from aggregator.exact_sum import ExactSum

SumKey = tuple[str, int, int]
"""Task, the round that is counted in, the round that updates were made for."""
SECRET_BYTES = 32
_NONCE_BYTES, _TAG_BYTES = 12, 16
_INFO = b"covey v1 partial sum\0"


def sum_place(key: SumKey, worker: str) -> str:
    """What a worker's stored sum is bound to."""
    task, counted_in, made_for = key
    return f"{task} {counted_in} {made_for} {worker}"


def seal_sum(partial: ExactSum, secret: bytes | None, *, place: str, entropy: Callable[[int], bytes]) -> bytes:
    """Encrypt a sum.

    Args:
        partial: the sum.
        secret: of the round that it is counted in, `SECRET_BYTES` long; None once it is closed.
        place: which sum it is: task, rounds and worker; it opens nowhere else.
        entropy: cryptographic source of the nonce.

    Raises:
        BlobError: the round is closed.
    """
    nonce = entropy(_NONCE_BYTES)
    plain = partial.total.astype("<i8", copy=False).data.cast("B")
    return nonce + _cipher(secret, place).encrypt(nonce, plain, _bound_to(place, partial.count))


def open_sum(sealed: bytes, secret: bytes | None, *, place: str, count: int) -> ExactSum:
    """Decrypt a sum of `count` updates. Raises BlobError when it is not this one."""
    nonce, encrypted = sealed[:_NONCE_BYTES], memoryview(sealed)[_NONCE_BYTES:]
    total = np.empty(max(0, len(encrypted) - _TAG_BYTES) // 8, "<i8")
    try:
        _cipher(secret, place).decrypt_into(nonce, encrypted, _bound_to(place, count), total.view(np.uint8).data)
    except (InvalidTag, ValueError):
        raise BlobError(f"the stored sum of {place} is damaged; abort the round, or restore a backup") from None
    return ExactSum(total.astype(np.int64, copy=False), count)


def _cipher(secret: bytes | None, place: str) -> AESGCM:
    if not secret:
        raise BlobError(f"the sum of {place} can no longer be opened: its round is closed")
    return AESGCM(HKDF(algorithm=SHA256(), length=32, salt=None, info=_INFO).derive(secret))


def _bound_to(place: str, count: int) -> bytes:
    return f"{place} {count}".encode()
