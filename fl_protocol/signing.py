"""Ed25519 signatures over messages, each bound to what it is for (a signature for one purpose fits no other).

Devices sign update headers and contributions; the aggregator signs round manifests, receipts, NACKs, requests to
helpers, and the chunks of models, so that a device drops each forged chunk by itself. Helpers sign their keys and
answers. Chunks of updates, requests and answers are not signed: what they add up to is.
"""

from __future__ import annotations

from typing import TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fl_protocol.ed25519_keys import public_key_from_bytes
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.log_messages import CosignatureMsg, CosignRefusalMsg, CosignRequestMsg
from fl_protocol.messages import (
    ChunkMsg,
    NackMsg,
    ReceiptMsg,
    RoundManifestMsg,
    SignedMsg,
    UpdateHeaderMsg,
    decode,
    encode,
)
from fl_protocol.revocation_messages import RevocationsKeptMsg, RevokedDevicesMsg
from fl_protocol.secagg.messages import (
    ContributionMsg,
    HelperKeyMsg,
    MaskSumMsg,
    UnmaskRefusalMsg,
    UnmaskRequestMsg,
)

Signable = (
    RoundManifestMsg
    | ReceiptMsg
    | NackMsg
    | ChunkMsg
    | UnmaskRequestMsg
    | HelperKeyMsg
    | MaskSumMsg
    | UnmaskRefusalMsg
    | CosignRequestMsg
    | CosignatureMsg
    | CosignRefusalMsg
    | RevokedDevicesMsg
    | RevocationsKeptMsg
)
S = TypeVar(
    "S",
    RoundManifestMsg,
    ReceiptMsg,
    NackMsg,
    ChunkMsg,
    UnmaskRequestMsg,
    HelperKeyMsg,
    MaskSumMsg,
    UnmaskRefusalMsg,
    CosignRequestMsg,
    CosignatureMsg,
    CosignRefusalMsg,
    RevokedDevicesMsg,
    RevocationsKeptMsg,
)

_KEY_BYTES = 32
_CONTEXTS: dict[type, bytes] = {
    RoundManifestMsg: b"covey v1 round manifest\0",
    ReceiptMsg: b"covey v1 receipt\0",
    NackMsg: b"covey v1 nack\0",
    ChunkMsg: b"covey v1 model chunk\0",
    UpdateHeaderMsg: b"covey v1 update header\0",
    ContributionMsg: b"covey v1 contribution\0",
    UnmaskRequestMsg: b"covey v1 unmask request\0",
    HelperKeyMsg: b"covey v1 helper key\0",
    MaskSumMsg: b"covey v1 mask sum\0",
    UnmaskRefusalMsg: b"covey v1 unmask refusal\0",
    CosignRequestMsg: b"covey v1 cosign request\0",
    CosignatureMsg: b"covey v1 cosignature\0",
    CosignRefusalMsg: b"covey v1 cosign refusal\0",
    RevokedDevicesMsg: b"covey v1 revoked devices\0",
    RevocationsKeptMsg: b"covey v1 revocations kept\0",
}


def sign(message: Signable, key: Ed25519PrivateKey) -> bytes:
    """Encoded `SignedMsg` around `message`; runs at the aggregator, and for its own messages at a helper."""
    payload = encode(message)
    return encode(SignedMsg(payload=payload, signature=key.sign(_CONTEXTS[type(message)] + payload)))


def verify(data: bytes, kind: type[S], key: Ed25519PublicKey) -> S:
    """Decode and verify a signed message; runs at who pins the signer's key.

    Raises:
        ProtocolError: malformed, or not signed by `key` for this purpose. The payload is not parsed before that.
    """
    signed = decode(data, SignedMsg)
    try:
        key.verify(signed.signature, _CONTEXTS[kind] + signed.payload)
    except InvalidSignature:
        raise ProtocolError(f"{kind.__name__} is not signed by the pinned key") from None
    return decode(signed.payload, kind)


def sign_header(header: bytes, key: Ed25519PrivateKey) -> bytes:
    """Signature (64 bytes) over an encoded `UpdateHeaderMsg`; runs at a device."""
    return key.sign(_CONTEXTS[UpdateHeaderMsg] + header)


def header_signature_is_valid(header: bytes, signature: bytes, key: Ed25519PublicKey) -> bool:
    """Whether `signature` is the device's over these exact header bytes; runs at the aggregator."""
    return _is_valid(UpdateHeaderMsg, header, signature, key)


def sign_contribution(contribution: bytes, key: Ed25519PrivateKey) -> bytes:
    """Signature (64 bytes) over an encoded `ContributionMsg`; runs at a device."""
    return key.sign(_CONTEXTS[ContributionMsg] + contribution)


def contribution_signature_is_valid(contribution: bytes, signature: bytes, key: Ed25519PublicKey) -> bool:
    """Whether `signature` is the device's over these exact bytes; runs at aggregator and helpers."""
    return _is_valid(ContributionMsg, contribution, signature, key)


def _is_valid(kind: type, payload: bytes, signature: bytes, key: Ed25519PublicKey) -> bool:
    """Whether a payload of this kind was signed by a key."""
    try:
        key.verify(signature, _CONTEXTS[kind] + payload)
    except InvalidSignature:
        return False
    return True


def public_key_from_hex(text: str) -> Ed25519PublicKey:
    """A public key from the 64 hex digits that files and configurations hold.

    Raises:
        LocalMisuseError: not 64 hex digits, or a key that anybody can sign for.
    """
    try:
        raw = bytes.fromhex(text.strip())
    except ValueError:
        raw = b""
    if len(raw) != _KEY_BYTES:
        # Its beginning only: somebody may have named the file of a private key.
        raise LocalMisuseError(
            f"expected an Ed25519 public key as 64 hex digits, got {len(text.strip())} characters that begin with "
            f"{text.strip()[:8]!r}"
        )
    try:
        return public_key_from_bytes(raw)
    except ValueError as error:
        raise LocalMisuseError(
            f"expected an Ed25519 public key that only its owner can sign for, got {error}"
        ) from None


def public_key_hex(key: Ed25519PublicKey) -> str:
    """The 64 hex digits of a public key."""
    return key.public_bytes_raw().hex()
