"""Where the TLS keys of a device's names come from: software keys, which the encrypted store holds. Pure."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from device_client.errors import KeyStoreError
from fl_protocol.integer_noise import Entropy


class TlsKey(NamedTuple):
    """A P-256 key.

    Args:
        stored: PEM, as ``ssl`` takes it.
        key: signs, and tells its public half.
    """

    stored: bytes
    key: ec.EllipticCurvePrivateKey


class TlsKeys(Protocol):
    """Makes TLS keys."""

    def make(self, entropy: Entropy) -> TlsKey:
        """A new key.

        Args:
            entropy: cryptographic source, for those that make keys in software.

        Raises:
            KeyStoreError: whatever holds the keys cannot be used.
        """

    def load(self, stored: bytes) -> ec.EllipticCurvePrivateKey:
        """A key that was made before, to sign with. Raises KeyStoreError: it cannot be used."""

    def check(self) -> None:
        """Raise KeyStoreError unless a key could be made now."""


class SoftwareTlsKeys:
    """Keys that anybody can use who can read them; the store encrypts them."""

    def check(self) -> None:
        """Nothing is needed."""

    def make(self, entropy: Entropy) -> TlsKey:
        """From random bits, 64 more than the group order has (FIPS 186-5, A.2.1)."""
        order = ec.SECP256R1().group_order
        drawn = int.from_bytes(entropy((order.bit_length() + 64) // 8), "big")
        key = ec.derive_private_key(drawn % (order - 1) + 1, ec.SECP256R1())
        return TlsKey(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), key)

    def load(self, stored: bytes) -> ec.EllipticCurvePrivateKey:
        """From PEM without a password. Raises KeyStoreError."""
        try:
            key = load_pem_private_key(stored, None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise KeyStoreError(
                f"a TLS key: expected one that the store holds whole ({error}); if it is a TPM's, set "
                'tls_keys = "tpm2" in [device]'
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise KeyStoreError("a TLS key: expected one on P-256")
        return key
