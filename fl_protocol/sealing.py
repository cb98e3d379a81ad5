"""Sealing updates to a round key with HPKE base mode (RFC 9180), as `cryptography` implements it.

Suites: KEM ML-KEM-768 + X25519 (hybrid, the default) or DHKEM(X25519), KDF HKDF-SHA256, AEAD AES-128-GCM for X25519
and AES-256-GCM for the hybrid. ``info`` binds the header's fields, so a sealed update opens only for the tenant, task,
round, model, device and update id it was made for.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from functools import cached_property

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import mlkem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from msgspec.structs import replace

from fl_protocol import PROTOCOL_VERSION
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import (
    KemName,
    RecipientKeyMsg,
    RoundManifestMsg,
    UpdateBodyMsg,
    UpdateBodyView,
    UpdateEnvelopeMsg,
    UpdateHeaderMsg,
    decode,
    encode,
)
from fl_protocol.secagg.messages import SecureBodyMsg
from fl_protocol.signing import sign_header

PrivateKey = X25519PrivateKey | hpke.MLKEM768X25519PrivateKey
PublicKey = X25519PublicKey | hpke.MLKEM768X25519PublicKey

_SUITES: dict[KemName, hpke.Suite] = {
    "mlkem768-x25519": hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM),
    "x25519": hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_128_GCM),
}
_MLKEM_SEED_BYTES, _MLKEM_PUBLIC_BYTES, _X25519_BYTES = 64, 1184, 32
_MLKEM_CIPHERTEXT_BYTES, _TAG_BYTES = 1088, 16


@dataclass(frozen=True)
class RoundKey:
    """The recipient's private key of one round; `secret` is what a store keeps until the round is closed.

    Args:
        kem: name of the KEM.
        secret: X25519 private key (32 bytes), or ML-KEM-768 seed (64) followed by it.
    """

    kem: KemName
    secret: bytes

    @cached_property
    def private_key(self) -> PrivateKey:
        """The key object, made once: expanding an ML-KEM key takes longer than opening an update."""
        x25519 = X25519PrivateKey.from_private_bytes(self.secret[-_X25519_BYTES:])
        if self.kem == "x25519":
            return x25519
        seed = self.secret[:_MLKEM_SEED_BYTES]
        return hpke.MLKEM768X25519PrivateKey(mlkem.MLKEM768PrivateKey.from_seed_bytes(seed), x25519)

    def recipient(self) -> RecipientKeyMsg:
        """The public half, as a manifest carries it."""
        x25519 = X25519PrivateKey.from_private_bytes(self.secret[-_X25519_BYTES:]).public_key().public_bytes_raw()
        if self.kem == "x25519":
            return RecipientKeyMsg(kem=self.kem, public_key=x25519)
        seed = self.secret[:_MLKEM_SEED_BYTES]
        public = mlkem.MLKEM768PrivateKey.from_seed_bytes(seed).public_key().public_bytes_raw()
        return RecipientKeyMsg(kem=self.kem, public_key=public + x25519)


def round_key_bytes(kem: KemName) -> int:
    """How many random bytes `RoundKey` needs."""
    return _X25519_BYTES if kem == "x25519" else _MLKEM_SEED_BYTES + _X25519_BYTES


def _public_key(recipient: RecipientKeyMsg) -> PublicKey:
    """The key object of a manifest's recipient."""
    raw = recipient.public_key
    expected = _X25519_BYTES if recipient.kem == "x25519" else _MLKEM_PUBLIC_BYTES + _X25519_BYTES
    if len(raw) != expected:
        raise ProtocolError(f"recipient key: expected {expected} bytes for {recipient.kem}, got {len(raw)}")
    x25519 = X25519PublicKey.from_public_bytes(raw[-_X25519_BYTES:])
    if recipient.kem == "x25519":
        return x25519
    try:
        return hpke.MLKEM768X25519PublicKey(
            mlkem.MLKEM768PublicKey.from_public_bytes(raw[:_MLKEM_PUBLIC_BYTES]), x25519
        )
    except ValueError as error:
        raise ProtocolError(f"recipient key: not an ML-KEM-768 public key ({error})") from error


@functools.lru_cache(maxsize=4)  # a device looks at a round's key more than once, and sealing is slow
def check_recipient(recipient: RecipientKeyMsg) -> None:
    """Whether anything can be sealed to a manifest's recipient; runs at the device, before it charges for a round.

    Args:
        recipient: of a verified manifest.

    Raises:
        ProtocolError: it is no key of its KEM, or one of small order.
    """
    seal_to(recipient, b"", info=b"")


def seal_info(
    *, tenant: str, task: str, round_number: int, model_digest: bytes, device: str, update_id: bytes
) -> bytes:
    """HPKE ``info``: a MessagePack array, so that no two field lists share an encoding."""
    return b"covey v1 update\0" + msgspec.msgpack.encode(
        [PROTOCOL_VERSION, tenant, task, round_number, model_digest, device, update_id]
    )


def _info_of(header: UpdateHeaderMsg) -> bytes:
    """`seal_info` of a header's fields."""
    return seal_info(
        tenant=header.tenant,
        task=header.task,
        round_number=header.round,
        model_digest=header.model_digest,
        device=header.device,
        update_id=header.update_id,
    )


def seal_to(recipient: RecipientKeyMsg, plain: bytes, *, info: bytes) -> bytes:
    """HPKE base mode, one shot (RFC 9180, section 6.1). Encapsulation draws from the operating system's CSPRNG.

    Args:
        recipient: whose key it is sealed to.
        plain: what is sealed.
        info: what it is bound to.

    Raises:
        ProtocolError: the key is not usable.
    """
    try:
        return _SUITES[recipient.kem].encrypt(plain, _public_key(recipient), info=info)
    except ValueError as error:  # X25519 refuses points of small order
        raise ProtocolError(f"recipient key: cannot be sealed to ({error})") from error


def sealed_bytes(kem: KemName, plain: int) -> int:
    """Length of what `seal_to` makes of so many bytes: encapsulated key, ciphertext, tag (RFC 9180, section 6.1)."""
    return (_X25519_BYTES if kem == "x25519" else _MLKEM_CIPHERTEXT_BYTES + _X25519_BYTES) + plain + _TAG_BYTES


def open_sealed(sealed: bytes | memoryview, key: RoundKey, *, info: bytes) -> bytes:
    """What `seal_to` sealed. Raises ProtocolError: not to this key, or bound to something else."""
    try:
        return _SUITES[key.kem].decrypt(sealed, key.private_key, info=info)
    except (InvalidTag, ValueError):
        raise ProtocolError("it does not open with this key for what it should be") from None


def seal_update(
    body: UpdateBodyMsg | SecureBodyMsg,
    *,
    manifest: RoundManifestMsg,
    device: str,
    update_id: bytes,
    signing_key: Ed25519PrivateKey,
) -> bytes:
    """Seal and sign one update; runs at the device. Encapsulation draws from the operating system's CSPRNG.

    Args:
        body: the update, in the clear or masked.
        manifest: the verified manifest of the round the update is for.
        device: this device's id on the wire.
        update_id: 16 random bytes, fresh for every update.
        signing_key: the device's Ed25519 key.

    Returns:
        Encoded `UpdateEnvelopeMsg`.

    Raises:
        ProtocolError: the manifest's recipient key is not usable.
    """
    header, recipient = header_for(manifest, device=device, update_id=update_id)
    sealed = seal_to(recipient, encode(body), info=_info_of(header))
    signed = encode(replace(header, sealed_digest=hashlib.sha256(sealed).digest()))
    return encode(UpdateEnvelopeMsg(header=signed, signature=sign_header(signed, signing_key), sealed=sealed))


def header_for(manifest: RoundManifestMsg, *, device: str, update_id: bytes) -> tuple[UpdateHeaderMsg, RecipientKeyMsg]:
    """An update's header but for `sealed_digest`, which is zeros until it is sealed, and whom it is sealed to.

    Raises:
        ProtocolError: the manifest names no recipient.
    """
    recipient = manifest.recipient
    if recipient is None:
        raise ProtocolError("the manifest names no recipient key: no round is open")
    header = UpdateHeaderMsg(
        tenant=manifest.tenant,
        task=manifest.task,
        round=manifest.round,
        model_digest=manifest.model_digest,
        device=device,
        update_id=update_id,
        kem=recipient.kem,
        sealed_digest=bytes(32),
    )
    return header, recipient


def open_update(header: UpdateHeaderMsg, sealed: bytes | memoryview, key: RoundKey) -> UpdateBodyMsg:
    """Open a sealed update; runs at the recipient, after the header's signature has been verified.

    Raises:
        ProtocolError: not sealed to this key for these header fields, or the content is malformed.
    """
    return decode(_opened(header, sealed, key), UpdateBodyView)


def open_masked_update(header: UpdateHeaderMsg, sealed: bytes | memoryview, key: RoundKey) -> SecureBodyMsg:
    """As `open_update`, for an update that is masked inside its seal."""
    return decode(_opened(header, sealed, key), SecureBodyMsg)


def _opened(header: UpdateHeaderMsg, sealed: bytes | memoryview, key: RoundKey) -> bytes:
    """What is inside a seal. Raises ProtocolError."""
    if header.kem != key.kem:
        raise ProtocolError(f"sealed with {header.kem}, but this round's key is {key.kem}")
    return open_sealed(sealed, key, info=_info_of(header))
