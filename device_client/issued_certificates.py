"""Checks of the certificates that a study's operator issued for this device's pseudonyms.

They are the operator's claims: each must be for a key that this device holds, hold under the CA that came with it,
name the pseudonym and nobody else, and have dates that every device of the study has too (`fl_protocol.enrolment`).
Pure: bytes in, a `ProtocolError` or nothing out.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, VerificationError
from cryptography.x509.verification import Store as TrustStore

from fl_protocol.enrolment import DAY_S, Period
from fl_protocol.errors import ProtocolError

_EXPECTED_EXTENSIONS = {
    x509.BasicConstraints.oid,
    x509.KeyUsage.oid,
    x509.ExtendedKeyUsage.oid,
    x509.SubjectKeyIdentifier.oid,
    x509.AuthorityKeyIdentifier.oid,
    x509.SubjectAlternativeName.oid,
}


def load_certificate(pem: bytes, what: str) -> x509.Certificate:
    """One certificate in PEM, with nothing around it.

    Args:
        pem: untrusted.
        what: whose it is, for the error.

    Raises:
        ProtocolError: it is not.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise ProtocolError(f"{what}: expected a certificate in PEM; {error}") from error
    if certificate.public_bytes(Encoding.PEM) != pem:
        raise ProtocolError(f"{what}: expected one certificate in PEM and nothing around it")
    return certificate


def checked_period(pem: bytes, *, pseudonym: str, public_key: bytes, ca: x509.Certificate) -> Period:
    """The period of a certificate that was issued for this key under the name `pseudonym`.

    Args:
        pem: untrusted.
        pseudonym: this device's.
        public_key: this device's, as DER SubjectPublicKeyInfo.
        ca: from an answer whose signature was checked.

    Raises:
        ProtocolError: it is not what was asked for.
    """
    what = f"the certificate of {pseudonym}"
    certificate = load_certificate(pem, what)
    begins = certificate.not_valid_before_utc.timestamp()
    # Not at the present time: most are for later, and this device's clock may be wrong. The CA has to last as long.
    last = certificate.not_valid_after_utc
    try:
        _check_content(certificate, pseudonym, public_key)
        PolicyBuilder().store(TrustStore([ca])).time(last).build_client_verifier().verify(certificate, [])
    except (VerificationError, ValueError, UnsupportedAlgorithm) as error:
        raise ProtocolError(f"{what} does not hold under the CA in the answer: {error}") from error
    return Period.of_validity(begins, last.timestamp())


def check_periods(periods: Iterable[Period]) -> None:
    """Whether periods, in order, follow each other on the grid that all devices of a study have.

    Args:
        periods: one for each pseudonym.

    Raises:
        ProtocolError: they do not.
    """
    before: Period | None = None
    for one in periods:
        text, length_s = _text(one), one.ends_s - one.begins_s
        # Security: dates that only this device has would tie its pseudonyms together.
        if not 2 * DAY_S <= length_s <= 366 * DAY_S or one.begins_s % length_s:
            raise ProtocolError(f"the answer: expected periods of 2 to 366 days on the grid of the study, got {text}")
        if before is not None and (one.begins_s, length_s) != (before.ends_s, before.ends_s - before.begins_s):
            raise ProtocolError(
                f"the answer: expected periods that follow each other, got {_text(before)}, then {text}"
            )
        before = one


def _check_content(certificate: x509.Certificate, pseudonym: str, public_key: bytes) -> None:
    """Whether it is for this device's key, and says the pseudonym and nothing else that would tell devices apart."""
    what = f"the certificate of {pseudonym}"
    if certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != public_key:
        raise ProtocolError(f"{what} is for another key than this device's")
    if [(one.oid, one.value) for one in certificate.subject] != [(NameOID.COMMON_NAME, pseudonym)]:
        name = certificate.subject.rfc4514_string()
        raise ProtocolError(f"{what}: expected the pseudonym as its only name, got {name!r}")
    names = _alternative_names(certificate)
    if names != [x509.UniformResourceIdentifier(f"urn:covey:{pseudonym}")]:
        raise ProtocolError(f"{what}: expected urn:covey: and the pseudonym as its only alternative name, got {names}")
    extra = {one.oid for one in certificate.extensions} - _EXPECTED_EXTENSIONS
    if extra:
        listed = ", ".join(sorted(one.dotted_string for one in extra))
        raise ProtocolError(f"{what}: expected no extensions but those of every client, got {listed}")


def _alternative_names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    """All subject alternative names."""
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _text(period: Period) -> str:
    """A period in words."""
    first, last = (
        datetime.datetime.fromtimestamp(at_s, datetime.timezone.utc) for at_s in (period.begins_s, period.ends_s)
    )
    return f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M}"
