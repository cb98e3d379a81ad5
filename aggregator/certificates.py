"""X.509 certificates for TLS between broker and clients: P-256, one CA per study (`cryptography`).

Ed25519 would be refused: `cryptography`'s verifier rejects Ed25519 chains, and so do many brokers. A certificate says
what this module writes into it; of a certificate request only the key and the proof that it is held are taken.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aggregator.errors import AggregatorError
from fl_protocol.errors import LocalMisuseError
from fl_protocol.topics import checked_name

_CA_DAYS, _LEAF_DAYS = 3650, 365
_HOST = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)*"
)


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


def make_ca(name: str, *, now_s: float) -> KeyPair:
    """A self-signed CA; its key must never leave the operator.

    Args:
        name: common name, for people.
        now_s: Unix seconds; validity starts an hour before, since devices' clocks differ.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject, now = _name(name), _moment(now_s)
    validity = now - datetime.timedelta(hours=1), now + datetime.timedelta(days=_CA_DAYS)
    certificate = (
        _builder(subject, subject, key.public_key(), validity=validity)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _pair(certificate, key)


def issue(
    ca: KeyPair, name: str, *, now_s: float, server_hosts: tuple[str, ...] = (), valid_s: float = _LEAF_DAYS * 86_400.0
) -> KeyPair:
    """A leaf certificate: for a client `name`, or for a server when `server_hosts` names where it listens.

    A client's carries its name as a URI too: `cryptography`'s verifier wants a subject alternative name in every leaf,
    and one that is no host name cannot be mistaken for a server's.

    Args:
        ca: from `make_ca`.
        name: common name; the broker takes it as the client's identity and MQTT client id.
        now_s: Unix seconds.
        server_hosts: DNS names and IP addresses.
        valid_s: how long, seconds; a year by default.
    """
    now = _moment(now_s)
    validity = now - datetime.timedelta(hours=1), now + datetime.timedelta(seconds=valid_s)
    key = ec.generate_private_key(ec.SECP256R1())
    return _pair(_leaf(ca, name, key.public_key(), validity=validity, server_hosts=server_hosts), key)


def certify(
    ca: KeyPair, name: str, public_key: ec.EllipticCurvePublicKey, *, not_before_s: float, not_after_s: float
) -> bytes:
    """A client certificate (PEM) for a key that somebody else holds; that they hold it must have been shown before.

    Args:
        ca: from `make_ca`.
        name: common name; the broker takes it as the client's identity and MQTT client id.
        public_key: P-256.
        not_before_s: Unix seconds.
        not_after_s: Unix seconds.

    Raises:
        AggregatorError: the CA's own certificate ends before this one would.
    """
    if not isinstance(public_key.curve, ec.SECP256R1):
        raise LocalMisuseError(f"public_key: expected P-256, got {public_key.curve.name}")
    ends = x509.load_pem_x509_certificate(ca.certificate).not_valid_after_utc
    if _moment(not_after_s) > ends:
        raise AggregatorError(
            f"the CA's certificate ends on {ends:%Y-%m-%d}, before this one would on {_moment(not_after_s):%Y-%m-%d}; "
            "ask for less, or make a new CA"
        )
    leaf = _leaf(ca, name, public_key, validity=(_moment(not_before_s), _moment(not_after_s)))
    return leaf.public_bytes(Encoding.PEM)


def make_crl(ca: KeyPair, revoked: Iterable[tuple[int, float]], *, now_s: float) -> bytes:
    """A certificate revocation list (RFC 5280, section 5), PEM.

    Args:
        ca: from `make_ca`.
        revoked: serial number and moment (Unix seconds) of each revoked certificate.
        now_s: Unix seconds. The list is valid for as long as the CA: a broker with a list that has run out lets nobody
            in.

    Raises:
        AggregatorError: the CA's files cannot be used.
    """
    key, certificate = _ca_key(ca), x509.load_pem_x509_certificate(ca.certificate)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(certificate.subject)
        .last_update(_moment(now_s) - datetime.timedelta(hours=1))
        .next_update(certificate.not_valid_after_utc)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(x509.CRLNumber(int(1000 * now_s)), critical=False)
    )
    for serial, at_s in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_moment(at_s)).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


class RevocationList(NamedTuple):
    """What a CRL says: the moment (Unix seconds) for each serial number, and until when it holds."""

    revoked: dict[int, float]
    ends_s: float


def read_crl(data: bytes, ca_certificate: bytes) -> RevocationList:
    """Read a list that `make_crl` wrote.

    Args:
        data: PEM.
        ca_certificate: of the CA that has to have signed it, PEM.

    Raises:
        AggregatorError: it is no such list, or not signed by this CA.
    """
    try:
        found = x509.load_pem_x509_crl(data)
        signer = x509.load_pem_x509_certificate(ca_certificate).public_key()
        # Security: it throws devices out for good.
        is_signed = isinstance(signer, ec.EllipticCurvePublicKey) and found.is_signature_valid(signer)
        ends = found.next_update_utc
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise AggregatorError(
            f"expected a list of revoked certificates and a CA's certificate, PEM; {error}"
        ) from error
    if not is_signed or ends is None:
        raise AggregatorError("the list of revoked certificates is not signed by the study's CA; name the broker's own")
    return RevocationList({one.serial_number: one.revocation_date_utc.timestamp() for one in found}, ends.timestamp())


def check_ca(ca: KeyPair) -> None:
    """Whether a CA that was read from files can issue certificates.

    Raises:
        AggregatorError: certificate or key cannot be read, or they do not belong together.
    """
    try:
        certificate = x509.load_pem_x509_certificate(ca.certificate)
        fits = certificate.public_key() == _ca_key(ca).public_key()
    except (ValueError, TypeError) as error:  # TypeError: the key is encrypted
        raise AggregatorError(
            f"the CA: expected a certificate and a key without password, both PEM; {error}"
        ) from error
    if not fits:
        raise AggregatorError("the CA: its key is not the one in its certificate; put both files back as they were")


def _leaf(
    ca: KeyPair,
    name: str,
    public_key: ec.EllipticCurvePublicKey,
    *,
    validity: tuple[datetime.datetime, datetime.datetime],
    server_hosts: tuple[str, ...] = (),
) -> x509.Certificate:
    """A leaf certificate for a server or, without hosts, for a client."""
    ca_key = _ca_key(ca)
    issuer = x509.load_pem_x509_certificate(ca.certificate).subject
    usage = ExtendedKeyUsageOID.SERVER_AUTH if server_hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    subject = _name(checked_name(name, "name"))
    names = [_general_name(host) for host in server_hosts] or [x509.UniformResourceIdentifier(f"urn:covey:{name}")]
    return (
        _builder(subject, issuer, public_key, validity=validity)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _ca_key(ca: KeyPair) -> ec.EllipticCurvePrivateKey:
    """The CA's key. Raises AggregatorError if it is of another kind."""
    key = load_pem_private_key(ca.key, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise AggregatorError("the CA key: expected a P-256 key, got another kind; run the CA set-up again")
    return key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    *,
    validity: tuple[datetime.datetime, datetime.datetime],
) -> x509.CertificateBuilder:
    """What every certificate has."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity[0])
        .not_valid_after(validity[1])
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _moment(at_s: float) -> datetime.datetime:
    """Unix seconds as a date."""
    return datetime.datetime.fromtimestamp(at_s, datetime.timezone.utc)


def _key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    """A CA signs certificates and CRLs, a leaf signs handshakes."""
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    """An X.501 name with only a common name."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.IPAddress | x509.DNSName | x509.UniformResourceIdentifier:
    """An IP address or a DNS name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host):
            raise LocalMisuseError(f"host: expected a DNS name or an IP address, got {host[:80]!r}") from None
        return x509.DNSName(host)


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> KeyPair:
    """Both as PEM."""
    pem_key = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return KeyPair(certificate.public_bytes(Encoding.PEM), pem_key)
