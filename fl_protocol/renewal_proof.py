"""What shows that a renewal comes from the device itself: a signature by the TLS key of a name that it was granted.

A renewal key is a file's content, and whoever has copied the file has it. TLS keys may be in hardware that gives none
away (`tls_keys`, ADR 17). So the desk grants further names only to whoever can use a present one, and a copy of the
device's files without its TPM comes to no name that way. Pure.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Meta

from fl_protocol.client_certificates import load_certificate
from fl_protocol.enrolment import PseudonymAnswer, PseudonymId
from fl_protocol.errors import ProtocolError
from fl_protocol.message_base import Msg

_PROOF = b"covey v1 renewal proof\0"
_ECDSA = ec.ECDSA(hashes.SHA256())


class RenewalProofMsg(Msg, frozen=True):
    """Part of a request for a renewal.

    Args:
        name: that the enrolment was granted last time; its certificate may have ended since.
        signature: ECDSA with SHA-256 in DER, by this name's TLS key, over the names asked for.
    """

    name: PseudonymId
    signature: Annotated[bytes, Meta(min_length=8, max_length=72)]


def signed_proof(
    name: str, key: ec.EllipticCurvePrivateKey, *, tenant: str, task: str, enrolment: str, names: bytes
) -> RenewalProofMsg:
    """Runs at a device.

    Args:
        name: whose TLS key signs.
        key: the TLS key.
        tenant: the study's.
        task: the study's.
        enrolment: that is renewed.
        names: the pseudonym request, a file's bytes.
    """
    return RenewalProofMsg(name=name, signature=key.sign(_signed(tenant, task, enrolment, names), _ECDSA))


def check_proof(
    proof: RenewalProofMsg | None,
    granted: PseudonymAnswer,
    *,
    tenant: str,
    task: str,
    enrolment: str,
    names: bytes,
) -> None:
    """Whether a renewal is signed by a TLS key of the names that were granted last; runs at the desk.

    Args:
        proof: untrusted; None where there is none.
        granted: what the enrolment was granted last.
        tenant: the study's.
        task: the study's.
        enrolment: that is renewed.
        names: the pseudonym request, a file's bytes.

    Raises:
        ProtocolError: it is not.
    """
    if proof is None:
        raise ProtocolError(
            "expected a renewal signed by a TLS key of the names that this device was granted last, got one without: "
            "bring the device's software up to date, or enrol with a new token if it has none of these names any more"
        )
    certificate = {one.id: one.certificate for one in granted.certificates}.get(proof.name)
    if certificate is None:
        raise ProtocolError(
            f"expected a renewal signed by one of the names that were granted last, got {proof.name}; enrol with a new "
            "token"
        )
    key = load_certificate(certificate.encode(), f"the certificate of {proof.name}").public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ProtocolError(f"the certificate of {proof.name}: expected a P-256 key")
    try:
        key.verify(proof.signature, _signed(tenant, task, enrolment, names), _ECDSA)
    except InvalidSignature:
        raise ProtocolError(f"the renewal is not signed by the TLS key of {proof.name}") from None


def _signed(tenant: str, task: str, enrolment: str, names: bytes) -> bytes:
    """What a proof's signature covers."""
    return _PROOF + msgspec.msgpack.encode([tenant, task, enrolment, hashlib.sha256(names).digest()])
