"""TLS keys that a TPM 2.0 makes and uses, and nobody else can.

A key is a PEM file of some 400 bytes, encrypted to this TPM, which keeps nothing of it: a row of names takes no room
there. It is fixed to the TPM (TPM 2.0, part 1, attribute fixedTPM). Signing keys of updates are Ed25519, which TPMs do
not know; they stay in the encrypted store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from device_client.checks.identity import public_half
from device_client.errors import KeyStoreError
from device_client.tls_keys import SoftwareTlsKeys, TlsKey
from fl_protocol.adapters import tpm2_command
from fl_protocol.adapters.tpm2_command import PEM_BEGINS, TpmError
from fl_protocol.integer_noise import Entropy

Buffer = bytes | bytearray | memoryview
_ECDSA = ec.ECDSA(hashes.SHA256())


class Tpm2TlsKeys:
    """`TlsKeys` on the TPM that tpm2-openssl finds (``TPM2OPENSSL_TCTI``, else /dev/tpmrm0)."""

    def check(self) -> None:
        """Raise KeyStoreError unless the TPM answers."""
        with _told():
            tpm2_command.check()

    def make(self, entropy: Entropy) -> TlsKey:
        """A new key, made by the TPM from its own entropy. Raises KeyStoreError."""
        del entropy
        with _told():
            stored = tpm2_command.make()
        return TlsKey(stored, _loaded(stored))

    def load(self, stored: bytes) -> ec.EllipticCurvePrivateKey:
        """A key of this TPM, or one in software from before there was one. Raises KeyStoreError."""
        return _loaded(stored) if stored.startswith(PEM_BEGINS) else SoftwareTlsKeys().load(stored)


def tls_public_half(key: bytes) -> PublicKeyTypes:
    """Of a private key in PEM, a TPM's or not; a TPM's is tried first.

    Raises:
        KeyStoreError: the TPM cannot sign with it.
        ValueError, TypeError: it is no key without a password.
    """
    if not key.startswith(PEM_BEGINS):
        return public_half(key)
    found = _loaded(key)
    try:
        found.public_key().verify(found.sign(b"covey", _ECDSA), b"covey", _ECDSA)
    except InvalidSignature as error:
        raise KeyStoreError("the TPM: its signature does not fit its key") from error
    return found.public_key()


def _loaded(stored: bytes) -> Tpm2Key:
    """A key that this TPM has made. Raises KeyStoreError."""
    with _told():
        return Tpm2Key(stored, tpm2_command.public_half(stored))


@contextmanager
def _told() -> Iterator[None]:
    """Raises KeyStoreError for TpmError."""
    try:
        yield
    except TpmError as error:
        raise KeyStoreError(str(error)) from error


class Tpm2Key(ec.EllipticCurvePrivateKey):
    """A key that `cryptography` signs with as with its own: it asks the TPM.

    Args:
        stored: PEM.
        public: its public half.
    """

    def __init__(self, stored: bytes, public: ec.EllipticCurvePublicKey) -> None:
        self._stored, self._public = stored, public

    @property
    def curve(self) -> ec.EllipticCurve:
        """P-256."""
        return self._public.curve

    @property
    def key_size(self) -> int:
        """Bits."""
        return self._public.key_size

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """Its public half."""
        return self._public

    def sign(self, data: Buffer, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """ECDSA with SHA-256, in DER. Raises KeyStoreError."""
        if not isinstance(signature_algorithm.algorithm, hashes.SHA256):
            raise KeyStoreError("the TPM: expected to sign with ECDSA and SHA-256")
        with _told():
            return tpm2_command.sign(self._stored, hashlib.sha256(data).digest())

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> bytes:
        """Not what it is for. Raises KeyStoreError."""
        _keep_inside()

    def private_numbers(self) -> ec.EllipticCurvePrivateNumbers:
        """Only the TPM knows them. Raises KeyStoreError."""
        _keep_inside()

    def private_bytes(
        self,
        encoding: serialization.Encoding,
        format: serialization.PrivateFormat,
        encryption_algorithm: serialization.KeySerializationEncryption,
    ) -> bytes:
        """Only the TPM knows them. Raises KeyStoreError."""
        _keep_inside()

    def __copy__(self) -> Tpm2Key:
        """Itself: it does not change."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Tpm2Key:
        """Itself: it does not change."""
        return self


def _keep_inside() -> NoReturn:
    """Raises KeyStoreError."""
    raise KeyStoreError("the TPM: the key is used inside it, to sign, and never leaves it")
