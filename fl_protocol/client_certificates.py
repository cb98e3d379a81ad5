"""What a pseudonym's certificate has to be, for whoever is shown one: its device, and helpers that know no register.

A certificate holds under a CA that its reader trusts, says the pseudonym and nothing else that would tell devices
apart, and has the dates of a period (`fl_protocol.enrolment`). Whether its time is now is another question: nothing
here looks at a clock. Pure: bytes in, a `ProtocolError` or what they say out.
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fl_protocol.enrolment import Period
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


def key_info(key: PublicKeyTypes) -> bytes:
    """A public key as DER SubjectPublicKeyInfo, whatever encoding it came in."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def is_only_name(subject: x509.Name, name: str) -> bool:
    """Whether a subject is this common name and nothing else."""
    return [(one.oid, one.value) for one in subject] == [(NameOID.COMMON_NAME, name)]


def period_under(certificate: x509.Certificate, name: str, *, cas: Sequence[x509.Certificate]) -> Period:
    """The period of a client's certificate that one of these CAs issued under this name.

    Args:
        certificate: untrusted.
        name: the pseudonym that it has to say.
        cas: trusted; each has to last as long as the certificate.

    Raises:
        ProtocolError: it does not hold, or says something else.
    """
    last = certificate.not_valid_after_utc
    try:
        # Not at the present time: that would be a clock's business, and a device has certificates for later periods.
        PolicyBuilder().store(Store(list(cas))).time(last).build_client_verifier().verify(certificate, [])
    except (VerificationError, ValueError, UnsupportedAlgorithm) as error:
        raise ProtocolError(f"the certificate of {name} does not hold under the CA: {error}") from error
    _check_content(certificate, name)
    return Period.of_validity(certificate.not_valid_before_utc.timestamp(), last.timestamp())


def _check_content(certificate: x509.Certificate, name: str) -> None:
    """Whether one that a CA has signed says the pseudonym and nothing else that would tell devices apart."""
    what = f"the certificate of {name}"
    if not is_only_name(certificate.subject, name):
        said = certificate.subject.rfc4514_string()
        raise ProtocolError(f"{what}: expected the pseudonym as its only name, got {said!r}")
    names = _alternative_names(certificate)
    if names != [x509.UniformResourceIdentifier(f"urn:covey:{name}")]:
        raise ProtocolError(f"{what}: expected urn:covey: and the pseudonym as its only alternative name, got {names}")
    # Security: all of them, or one without a purpose would do as a client's.
    differing = {one.oid for one in certificate.extensions} ^ _EXPECTED_EXTENSIONS
    if differing:
        listed = ", ".join(sorted(one.dotted_string for one in differing))
        raise ProtocolError(f"{what}: expected the extensions of every client and no others, differing in {listed}")


def _alternative_names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    """All subject alternative names."""
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []
