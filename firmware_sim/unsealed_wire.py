"""``wire = "off"``: the same messages with nothing sealed and nothing signed, to see what the rest costs.

Nothing is serialised either: an update's values go from hand to hand beside its envelope, which names them by its
update id. Everything else stays: headers, digests, chunks, receipts, the order of checks, the ledger. What takes the
place of cryptography is passed in through ports by the simulator, and by nobody else; a real device does not accept
what is signed like this, and an aggregator that runs does not open it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec.structs import replace
from numpy.typing import NDArray

from aggregator.ingest import Opener
from fl_protocol.errors import ProtocolError
from fl_protocol.message_base import Msg, ParameterCount, UpdateId
from fl_protocol.messages import (
    EncodingName,
    RoundManifestMsg,
    UpdateBodyMsg,
    UpdateBodyView,
    UpdateEnvelopeMsg,
    UpdateHeaderMsg,
    decode,
    encode,
)
from fl_protocol.sealing import RoundKey, header_for

Values = NDArray[np.uint8]
"""An update's values as they would stand in its body, uint8 [bytes]."""
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


class HandedBodyMsg(Msg, frozen=True):
    """In the place of a sealed `fl_protocol.messages.UpdateBodyMsg`, whose values are handed over beside it."""

    update_id: UpdateId
    num_parameters: ParameterCount
    encoding: EncodingName


def unsealed_update(
    body: UpdateBodyMsg, *, manifest: RoundManifestMsg, device: str, update_id: bytes
) -> tuple[bytes, Values]:
    """An envelope with nothing sealed in it, and the values that go beside it. Raises ProtocolError.

    Args:
        body: the update; its values are not copied.
        manifest: of the round that it is for.
        device: name on the wire.
        update_id: of the update.
    """
    named = HandedBodyMsg(update_id=update_id, num_parameters=body.num_parameters, encoding=body.encoding)
    plain = encode(named)
    header, _recipient = header_for(manifest, device=device, update_id=update_id)
    digested = replace(header, sealed_digest=hashlib.sha256(plain).digest())
    envelope = encode(UpdateEnvelopeMsg(header=encode(digested), signature=UNSIGNED, sealed=plain))
    return envelope, np.frombuffer(body.values, np.uint8)


def _is_unsigned(header: bytes, signature: bytes, key: Ed25519PublicKey) -> bool:
    """Whether a header has the mark of this wire."""
    del header, key
    return signature == UNSIGNED


def unsealed(handed: Mapping[bytes, Values]) -> Opener:
    """The aggregator's side.

    Args:
        handed: by update id, the values that were handed over and are not decided about.
    """

    def open_body(header: UpdateHeaderMsg, plain: bytes | memoryview, key: RoundKey) -> UpdateBodyMsg:
        """What was never sealed. Raises ProtocolError."""
        if header.kem != key.kem:
            raise ProtocolError(f"made for {header.kem}, but this round's key is {key.kem}")
        named = decode(plain, HandedBodyMsg)
        if named.update_id != header.update_id or named.update_id not in handed:
            raise ProtocolError("no values came with it")
        try:
            return UpdateBodyView(
                num_parameters=named.num_parameters,
                values=handed[named.update_id].data,
                encoding=named.encoding,
            )
        except ValueError as error:
            raise ProtocolError(str(error)) from error

    return Opener(is_signed=_is_unsigned, open_body=open_body)
