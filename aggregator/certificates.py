"""X.509 certificates for TLS between broker and clients: P-256, one CA per study (`cryptography`).

Ed25519 would be refused: `cryptography`'s verifier rejects Ed25519 chains, and so do many brokers.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass

from cryptography import x509
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
from fl_protocol.topics import checked_name

_CA_DAYS, _LEAF_DAYS = 3650, 365


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
    subject = _name(name)
    certificate = (
        _builder(subject, subject, key.public_key(), now_s=now_s, days=_CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _pair(certificate, key)


def issue(ca: KeyPair, name: str, *, now_s: float, server_hosts: tuple[str, ...] = ()) -> KeyPair:
    """A leaf certificate: for a client `name`, or for a server when `server_hosts` names where it listens.

    A client's carries its name as a URI too: `cryptography`'s verifier wants a subject alternative name in every leaf,
    and one that is no host name cannot be mistaken for a server's.

    Args:
        ca: from `make_ca`.
        name: common name; the broker takes it as the client's identity and MQTT client id.
        now_s: Unix seconds.
        server_hosts: DNS names and IP addresses.
    """
    ca_key = load_pem_private_key(ca.key, None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey) or not isinstance(ca_key.curve, ec.SECP256R1):
        raise AggregatorError("the CA key: expected a P-256 key, got another kind; run the CA set-up again")
    issuer = x509.load_pem_x509_certificate(ca.certificate).subject
    key = ec.generate_private_key(ec.SECP256R1())
    usage = ExtendedKeyUsageOID.SERVER_AUTH if server_hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(_name(checked_name(name, "name")), issuer, key.public_key(), now_s=now_s, days=_LEAF_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    names = [_general_name(host) for host in server_hosts] or [x509.UniformResourceIdentifier(f"urn:covey:{name}")]
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return _pair(builder.sign(ca_key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, *, now_s: float, days: int
) -> x509.CertificateBuilder:
    """What every certificate has."""
    now = datetime.datetime.fromtimestamp(now_s, datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


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
        return x509.DNSName(host)


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> KeyPair:
    """Both as PEM."""
    pem_key = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return KeyPair(certificate.public_bytes(Encoding.PEM), pem_key)
