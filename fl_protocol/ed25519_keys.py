"""Ed25519 public keys from bytes that somebody else chose: encodings for which anybody can sign are none.

A key of small order (8 points of the curve, in 14 encodings) has signatures that fit nearly any message, and nobody
needs a private key for them (Chalkias, Garillot and Nikolaenko 2020, "Taming the many EdDSAs", section 2). RFC 8032
lets them be, and so does OpenSSL. Nor is a y of p or more decoded here, as RFC 8032, section 5.1.3 demands.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_P = 2**255 - 19
_Y_OF_ORDER_8 = int.from_bytes(
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), byteorder="little"
)
_SMALL_ORDER = frozenset({0, 1, _P - 1, _Y_OF_ORDER_8, _P - _Y_OF_ORDER_8})
"""The y of all points whose order divides 8; x does not matter, since with a point its negative is among them."""


def public_key_from_bytes(raw: bytes) -> Ed25519PublicKey:
    """A public key, 32 untrusted bytes.

    Raises:
        ValueError: there are not 32 of them, or they are no key that only its owner can sign for.
    """
    key = Ed25519PublicKey.from_public_bytes(raw)
    y = int.from_bytes(raw, byteorder="little") & (2**255 - 1)
    if y >= _P or y in _SMALL_ORDER:
        raise ValueError("a key that anybody can sign for (of small order, or not in its only encoding)")
    return key
