"""Keys of a TPM 2.0 by the ``openssl`` command and its provider ``tpm2``: made, read and signed with.

A process for each signature: the provider of tpm2-openssl before 1.3 lets two threads talk to the TPM at once, and
both fail ("Esys called in bad sequence"), so it stays out of processes that have threads.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fl_protocol.errors import CoveyError

PEM_BEGINS = b"-----BEGIN TSS2 PRIVATE KEY-----"
WITHIN_S = 60.0
# Signatures by the TPM; digests and random numbers, which the command needs besides, by software.
_PREFER_TPM = "?provider=tpm2,tpm2.digest!=yes,tpm2.cipher!=yes,tpm2.rand!=yes"
_PROVIDERS = ("-provider", "tpm2", "-provider", "default", "-propquery", _PREFER_TPM)
_TPM_ALONE = ("-provider", "tpm2")
_LONGEST_REASON = 300


class TpmError(CoveyError):
    """The TPM, or the command that asks it, is missing or refuses; the text begins with "the TPM: "."""


def check() -> None:
    """Raise TpmError unless the TPM answers."""
    _openssl("rand", "-hex", "8", providers=_TPM_ALONE)


def make() -> bytes:
    """A new P-256 key that the TPM makes from its own entropy: PEM that only this TPM can use. Raises TpmError."""
    stored = _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "group:P-256")
    # Security: a provider that is not there must not lead to a key in software.
    if not stored.startswith(PEM_BEGINS):
        raise TpmError(f"the TPM: expected a TSS2 PRIVATE KEY from openssl, got {stored[:40]!r}")
    return stored


def public_half(stored: bytes) -> ec.EllipticCurvePublicKey:
    """Of a key that this TPM has made. Raises TpmError."""
    try:
        found = serialization.load_pem_public_key(_openssl("pkey", "-pubout", given=stored))
    except ValueError as error:
        raise TpmError(f"the TPM: expected a key on P-256 ({error})") from error
    if not isinstance(found, ec.EllipticCurvePublicKey) or not isinstance(found.curve, ec.SECP256R1):
        raise TpmError("the TPM: expected a key on P-256")
    return found


def sign(stored: bytes, digest: bytes) -> bytes:
    """ECDSA, in DER, over a digest of 32 bytes that is SHA-256's. Raises TpmError."""
    with ExitStack() as stack:
        try:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="covey-"))) / "key.pem"
            path.write_bytes(stored)
        except OSError as error:
            raise TpmError(f"the TPM: its key cannot be handed to openssl in a file ({error})") from error
        return _openssl("pkeyutl", "-sign", "-inkey", str(path), "-pkeyopt", "digest:sha256", given=digest)


def _openssl(command: str, *arguments: str, given: bytes = b"", providers: Sequence[str] = _PROVIDERS) -> bytes:
    """What the command writes. Raises TpmError."""
    asked = ["openssl", command, *providers, *arguments]
    try:
        done = subprocess.run(asked, input=given, capture_output=True, timeout=WITHIN_S, check=False)
    except FileNotFoundError as error:
        raise TpmError("the TPM: expected the command openssl; install openssl and tpm2-openssl") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TpmError(f"the TPM: openssl {command} does not answer ({error})") from error
    if done.returncode or not done.stdout:
        raise TpmError(f"the TPM: openssl {command} failed: {_reason(done.stderr)}")
    return done.stdout


def _reason(said: bytes) -> str:
    """The cause in what openssl said, which names every layer that passed it on; and what to do."""
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    causes = [line for line in lines if "ERROR" in line or "rror" in line] or lines or ["it said nothing"]
    first = causes[0].strip()[:_LONGEST_REASON]
    if "could not load the shared library" in first or "unable to load provider" in first:
        return f"{first}; install tpm2-openssl"
    return f"{first}; is there a TPM, and may this user open it (/dev/tpmrm0, group tss)?"
