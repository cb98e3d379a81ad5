"""A public key that remembers what it has verified: all devices of a fleet get the same manifests and models."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

_MOST = 256


class RememberingKey(Ed25519PublicKey):
    """Verifies each signed message once, and then knows it: the same bytes only, and only what was valid.

    Args:
        key: what verifies.
    """

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key
        self._known: dict[bytes, bytes] = {}

    def verify(self, signature: Any, data: Any) -> None:
        """Raises InvalidSignature."""
        if self._known.get(signature) != data:
            self._key.verify(signature, data)
            if len(self._known) == _MOST:
                self._known.clear()
            self._known[bytes(signature)] = bytes(data)

    def public_bytes(self, encoding: Encoding, format: PublicFormat) -> bytes:
        """As the key itself."""
        return self._key.public_bytes(encoding, format)

    def public_bytes_raw(self) -> bytes:
        """As the key itself."""
        return self._key.public_bytes_raw()

    def __eq__(self, other: object) -> bool:
        return self._key == other

    def __hash__(self) -> int:
        return hash(self._key)

    def __copy__(self) -> RememberingKey:
        return RememberingKey(self._key)

    def __deepcopy__(self, memo: dict[int, Any]) -> RememberingKey:
        return RememberingKey(self._key)
