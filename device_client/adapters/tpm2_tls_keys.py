"""TLS keys that a TPM 2.0 makes and uses, and nobody else can: by the ``openssl`` command and its provider ``tpm2``.

A key is a PEM file of some 400 bytes, encrypted to this TPM, which keeps nothing of it: a row of names takes no room
there. It is fixed to the TPM (TPM 2.0, part 1, attribute fixedTPM). Requests for certificates are signed by the
command; handshakes by the same provider within ``ssl`` (`fl_protocol.adapters.openssl_tpm2`). Signing keys of updates
are Ed25519, which TPMs do not know; they stay in the encrypted store.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from device_client.checks.identity import public_half
from device_client.errors import KeyStoreError
from device_client.tls_keys import TlsKey
from fl_protocol.adapters.openssl_tpm2 import PEM_BEGINS, PREFER_TPM
from fl_protocol.integer_noise import Entropy

Buffer = bytes | bytearray | memoryview
_WITHIN_S = 60.0
_PROVIDERS = ("-provider", "tpm2", "-provider", "default", "-propquery", PREFER_TPM)
_TPM_ALONE = ("-provider", "tpm2")
_LONGEST_REASON = 300
_ECDSA = ec.ECDSA(hashes.SHA256())


class Tpm2TlsKeys:
    """`TlsKeys` on the TPM that tpm2-openssl finds (``TPM2OPENSSL_TCTI``, else /dev/tpmrm0)."""

    def check(self) -> None:
        """Raise KeyStoreError unless the TPM answers."""
        _openssl("rand", "-hex", "8", providers=_TPM_ALONE)

    def make(self, entropy: Entropy) -> TlsKey:
        """A new key, made by the TPM from its own entropy. Raises KeyStoreError."""
        del entropy
        stored = _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "group:P-256")
        # Security: a provider that is not there must not lead to a key in software.
        if not stored.startswith(PEM_BEGINS):
            raise KeyStoreError(f"the TPM: expected a TSS2 PRIVATE KEY from openssl, got {stored[:40]!r}")
        return TlsKey(stored, _loaded(stored))


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
    """A key that this TPM has made. Raises KeyStoreError, ValueError."""
    found = serialization.load_pem_public_key(_openssl("pkey", "-pubout", given=stored))
    if not isinstance(found, ec.EllipticCurvePublicKey):
        raise ValueError("expected a key on P-256")
    return Tpm2Key(stored, found)


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
        with tempfile.TemporaryDirectory(prefix="covey-") as folder:
            path = Path(folder) / "key.pem"
            path.write_bytes(self._stored)
            return _openssl("dgst", "-sha256", "-sign", str(path), given=bytes(data))

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


def _openssl(command: str, *arguments: str, given: bytes = b"", providers: Sequence[str] = _PROVIDERS) -> bytes:
    """What the command writes. Raises KeyStoreError."""
    asked = ["openssl", command, *providers, *arguments]
    try:
        done = subprocess.run(asked, input=given, capture_output=True, timeout=_WITHIN_S, check=False)
    except FileNotFoundError as error:
        raise KeyStoreError("the TPM: expected the command openssl; install openssl and tpm2-openssl") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KeyStoreError(f"the TPM: openssl {command} does not answer ({error})") from error
    if done.returncode or not done.stdout:
        raise KeyStoreError(f"the TPM: openssl {command} failed: {_reason(done.stderr)}")
    return done.stdout


def _reason(said: bytes) -> str:
    """The cause in what openssl said, which names every layer that passed it on; and what to do."""
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    causes = [line for line in lines if "ERROR" in line or "rror" in line] or lines or ["it said nothing"]
    first = causes[0].strip()[:_LONGEST_REASON]
    if "could not load the shared library" in first or "unable to load provider" in first:
        return f"{first}; install tpm2-openssl"
    return f"{first}; is there a TPM, and may this user open it (/dev/tpmrm0, group tss)?"
