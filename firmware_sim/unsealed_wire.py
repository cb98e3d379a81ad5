"""``wire = "off"``: the same messages with nothing sealed and nothing signed, to see what the rest costs.

Everything else stays: headers, digests, chunks, receipts, the order of checks, the ledger. What takes the place of
cryptography is passed in through ports by the simulator, and by nobody else; a real device does not accept what is
signed like this, and an aggregator that runs does not open it.
"""

from __future__ import annotations

import hashlib
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec.structs import replace

from aggregator.ingest import Opener
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import (
    RoundManifestMsg,
    UpdateBodyMsg,
    UpdateBodyView,
    UpdateEnvelopeMsg,
    UpdateHeaderMsg,
    decode,
    encode,
)
from fl_protocol.sealing import RoundKey, header_for
from fl_protocol.secagg.messages import SecureBodyMsg

UNSIGNED = bytes(64)
"""In the place of every signature."""
_NO_KEY = bytes(32)


class NoSigner(Ed25519PrivateKey):
    """Signs nothing."""

    def sign(self, data: Any) -> bytes:
        """`UNSIGNED`, whatever the data are."""
        return UNSIGNED

    def public_key(self) -> Ed25519PublicKey:
        """What accepts that."""
        return NoVerifier()

    def private_bytes_raw(self) -> bytes:
        """Zeros."""
        return _NO_KEY

    def private_bytes(self, encoding: Any, format: Any, encryption_algorithm: Any) -> bytes:
        """Zeros."""
        return _NO_KEY

    def __copy__(self) -> NoSigner:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> NoSigner:
        return self


class NoVerifier(Ed25519PublicKey):
    """Accepts what `NoSigner` made, and nothing that is really signed."""

    def verify(self, signature: Any, data: Any) -> None:
        """Raises InvalidSignature."""
        if signature != UNSIGNED:
            raise InvalidSignature

    def public_bytes(self, encoding: Encoding, format: PublicFormat) -> bytes:
        """Zeros."""
        return _NO_KEY

    def public_bytes_raw(self) -> bytes:
        """Zeros."""
        return _NO_KEY

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoVerifier)

    def __hash__(self) -> int:
        return hash(_NO_KEY)

    def __copy__(self) -> NoVerifier:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> NoVerifier:
        return self


def unsealed_update(
    body: UpdateBodyMsg | SecureBodyMsg,
    *,
    manifest: RoundManifestMsg,
    device: str,
    update_id: bytes,
    signing_key: Ed25519PrivateKey,
) -> bytes:
    """`device_client.sealer.Sealer` that leaves the body as it is. Raises ProtocolError.

    Args:
        body: the update.
        manifest: of the round that it is for.
        device: name on the wire.
        update_id: of the update.
        signing_key: not used.
    """
    del signing_key
    plain = encode(body)
    header, _recipient = header_for(manifest, device=device, update_id=update_id)
    digested = replace(header, sealed_digest=hashlib.sha256(plain).digest())
    return encode(UpdateEnvelopeMsg(header=encode(digested), signature=UNSIGNED, sealed=plain))


def _is_unsigned(header: bytes, signature: bytes, key: Ed25519PublicKey) -> bool:
    """Whether a header has the mark of this wire."""
    del header, key
    return signature == UNSIGNED


def _open(header: UpdateHeaderMsg, plain: bytes | memoryview, key: RoundKey) -> UpdateBodyMsg:
    """What was never sealed. Raises ProtocolError."""
    if header.kem != key.kem:
        raise ProtocolError(f"made for {header.kem}, but this round's key is {key.kem}")
    return decode(plain, UpdateBodyView)


UNSEALED = Opener(is_signed=_is_unsigned, open_body=_open)
"""The aggregator's side."""
