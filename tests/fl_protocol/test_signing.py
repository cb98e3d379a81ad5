"""Signatures: only the pinned key, only the exact bytes, only the one purpose."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.log_messages import CosignatureMsg, CosignRefusalMsg, CosignRequestMsg
from fl_protocol.messages import ChunkMsg, NackMsg, ReceiptMsg, RoundManifestMsg, SignedMsg, decode, encode
from fl_protocol.revocation_messages import RevocationsKeptMsg, RevokedDevicesMsg
from fl_protocol.secagg.messages import HelperKeyMsg, MaskSumMsg, UnmaskRefusalMsg, UnmaskRequestMsg
from fl_protocol.signing import (
    Signable,
    header_signature_is_valid,
    public_key_from_hex,
    public_key_hex,
    sign,
    sign_header,
    verify,
)
from tests.fl_protocol.examples import (
    AGGREGATOR_KEY,
    CHUNK,
    COSIGN_REFUSAL,
    COSIGN_REQUEST,
    COSIGNATURE,
    DEVICE_KEY,
    HEADER,
    MASK_SUM,
    NACK,
    RECEIPT,
    REVOCATIONS_KEPT,
    REVOKED_DEVICES,
    UNMASK_REFUSAL,
    UNMASK_REQUEST,
    helper_key,
    manifest,
)

PUBLIC = AGGREGATOR_KEY.public_key()
SIGNED: dict[type, Signable] = {
    RoundManifestMsg: manifest(),
    ReceiptMsg: RECEIPT,
    NackMsg: NACK,
    ChunkMsg: CHUNK,
    UnmaskRequestMsg: UNMASK_REQUEST,
    HelperKeyMsg: helper_key("helper-a"),
    MaskSumMsg: MASK_SUM,
    UnmaskRefusalMsg: UNMASK_REFUSAL,
    CosignRequestMsg: COSIGN_REQUEST,
    CosignatureMsg: COSIGNATURE,
    CosignRefusalMsg: COSIGN_REFUSAL,
    RevokedDevicesMsg: REVOKED_DEVICES,
    RevocationsKeptMsg: REVOCATIONS_KEPT,
}
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493
"""L of RFC 8032, section 5.1."""
any_kind = pytest.mark.parametrize("kind", SIGNED, ids=lambda kind: kind.__name__)


@any_kind
def test_what_the_aggregator_signed_verifies(kind: type) -> None:
    assert verify(sign(SIGNED[kind], AGGREGATOR_KEY), kind, PUBLIC) == SIGNED[kind]


@any_kind
def test_a_signature_for_one_kind_fits_no_other(kind: type) -> None:
    signed = sign(SIGNED[kind], AGGREGATOR_KEY)
    for other in SIGNED:
        if other is not kind:
            with pytest.raises(ProtocolError, match="is not signed by the pinned key"):
                verify(signed, other, PUBLIC)


@any_kind
def test_a_message_signature_is_no_header_signature_even_with_the_same_key(kind: type) -> None:
    signed = decode(sign(SIGNED[kind], AGGREGATOR_KEY), SignedMsg)
    assert not header_signature_is_valid(signed.payload, signed.signature, PUBLIC)


def test_a_header_signature_is_no_message_signature_even_with_the_same_key() -> None:
    for kind, message in SIGNED.items():
        payload = encode(message)
        forged = encode(SignedMsg(payload=payload, signature=sign_header(payload, AGGREGATOR_KEY)))
        with pytest.raises(ProtocolError, match="not signed"):
            verify(forged, kind, PUBLIC)


@any_kind
def test_another_keys_signature_is_refused(kind: type) -> None:
    with pytest.raises(ProtocolError, match="not signed"):
        verify(sign(SIGNED[kind], DEVICE_KEY), kind, PUBLIC)


@any_kind
def test_every_flipped_bit_is_refused(kind: type) -> None:
    good = sign(SIGNED[kind], AGGREGATOR_KEY)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            verify(bytes(bad), kind, PUBLIC)


def test_a_signature_with_the_group_order_added_is_refused() -> None:
    signed = decode(sign(RECEIPT, AGGREGATOR_KEY), SignedMsg)
    scalar = int.from_bytes(signed.signature[32:], "little") + ED25519_ORDER
    twin = signed.signature[:32] + scalar.to_bytes(32, "little")
    with pytest.raises(ProtocolError, match="not signed"):
        verify(encode(SignedMsg(payload=signed.payload, signature=twin)), ReceiptMsg, PUBLIC)


def test_a_correctly_signed_but_malformed_payload_is_refused() -> None:
    payload = b"\x81\xa1v\x01"
    signature = AGGREGATOR_KEY.sign(b"covey v1 receipt\0" + payload)
    with pytest.raises(ProtocolError, match="not a valid ReceiptMsg"):
        verify(encode(SignedMsg(payload=payload, signature=signature)), ReceiptMsg, PUBLIC)


def test_a_header_signature_holds_for_its_exact_bytes_and_key_only() -> None:
    header = encode(HEADER)
    signature = sign_header(header, DEVICE_KEY)
    assert header_signature_is_valid(header, signature, DEVICE_KEY.public_key())
    assert not header_signature_is_valid(header, signature, PUBLIC)
    assert not header_signature_is_valid(header + b"\0", signature, DEVICE_KEY.public_key())
    for bit in range(8 * len(signature)):
        bad = bytearray(signature)
        bad[bit // 8] ^= 1 << bit % 8
        assert not header_signature_is_valid(header, bytes(bad), DEVICE_KEY.public_key())


def test_a_public_key_survives_its_hex_form() -> None:
    text = public_key_hex(PUBLIC)
    assert len(text) == 64
    assert public_key_from_hex(f" {text.upper()}\n") == PUBLIC


@pytest.mark.parametrize("text", ["", "00", "zz" * 32, "00" * 33, "é" * 64])
def test_text_that_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(LocalMisuseError, match="64 hex digits"):
        public_key_from_hex(text)


def test_the_signing_key_of_the_examples_is_not_a_devices() -> None:
    assert Ed25519PrivateKey.from_private_bytes(bytes(range(32))).public_key() == PUBLIC != DEVICE_KEY.public_key()
