"""Certificates: the chain holds under `cryptography`'s verifier, for the purpose it was made for and no other."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.certificates import KeyPair, certify, check_ca, issue, make_ca
from aggregator.errors import AggregatorError
from fl_protocol.errors import LocalMisuseError
from fl_protocol.topics import NAME_PATTERN

NOW_S = 1_800_000_000.0
HOUR_S, DAY_S = 3600.0, 86_400.0
CA = make_ca("covey test", now_s=NOW_S)
OTHER_CA = make_ca("covey test", now_s=NOW_S)  # the same name: only the key tells them apart
CLIENT = issue(CA, "watch-7", now_s=NOW_S)
SERVER = issue(CA, "broker", now_s=NOW_S, server_hosts=("127.0.0.1", "broker.clinic.example"))


def load(pair: KeyPair) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pair.certificate)


def policy(ca: KeyPair, at_s: float) -> PolicyBuilder:
    moment = datetime.datetime.fromtimestamp(at_s, datetime.timezone.utc)
    return PolicyBuilder().store(Store([load(ca)])).time(moment)


def verify_client(leaf: KeyPair, *, ca: KeyPair = CA, at_s: float = NOW_S) -> None:
    policy(ca, at_s).build_client_verifier().verify(load(leaf), [])


def verify_server(leaf: KeyPair, host: str, *, ca: KeyPair = CA, at_s: float = NOW_S) -> None:
    try:
        subject: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        subject = x509.DNSName(host)
    policy(ca, at_s).build_server_verifier(subject).verify(load(leaf), [])  # type: ignore[arg-type]


def test_a_clients_chain_holds() -> None:
    verify_client(CLIENT)


@pytest.mark.parametrize("host", ["127.0.0.1", "broker.clinic.example"])
def test_a_servers_chain_holds_for_its_hosts(host: str) -> None:
    verify_server(SERVER, host)


@pytest.mark.parametrize("host", ["127.0.0.2", "broker.other.example", "clinic.example", "broker", "watch-7"])
def test_a_servers_certificate_is_for_no_other_host(host: str) -> None:
    with pytest.raises(VerificationError):
        verify_server(SERVER, host)


def test_a_certificate_of_another_ca_is_refused() -> None:
    with pytest.raises(VerificationError):
        verify_client(issue(OTHER_CA, "watch-7", now_s=NOW_S))
    with pytest.raises(VerificationError):
        verify_client(CLIENT, ca=OTHER_CA)
    with pytest.raises(VerificationError):
        verify_server(SERVER, "127.0.0.1", ca=OTHER_CA)


def test_a_client_cannot_pose_as_a_server_nor_a_server_as_a_client() -> None:
    with pytest.raises(VerificationError, match="EKU"):
        verify_client(SERVER)
    as_host = issue(CA, "localhost", now_s=NOW_S)  # a client that is called like a host
    with pytest.raises(VerificationError):
        verify_server(as_host, "localhost")


def test_a_client_cannot_issue_certificates() -> None:
    child = issue(CLIENT, "watch-8", now_s=NOW_S)
    with pytest.raises(VerificationError):
        verify_client(child)
    with pytest.raises(VerificationError):
        policy(CA, NOW_S).build_client_verifier().verify(load(child), [load(CLIENT)])


def test_a_ca_below_the_ca_is_refused() -> None:
    """`path_length` 0: no intermediate."""
    key = load_pem_private_key(CA.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    lower_key = ec.generate_private_key(ec.SECP256R1())
    original = load(OTHER_CA)
    builder = x509.CertificateBuilder(
        issuer_name=load(CA).subject,
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lower")]),
        public_key=lower_key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=original.not_valid_before_utc,
        not_valid_after=original.not_valid_after_utc,
    )
    for extension in original.extensions:
        if not isinstance(extension.value, x509.SubjectKeyIdentifier):
            builder = builder.add_extension(extension.value, extension.critical)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(lower_key.public_key()), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
    )
    lower = KeyPair(
        builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM),
        lower_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )
    child = issue(lower, "watch-9", now_s=NOW_S)
    verify_client(child, ca=lower)  # the child itself is well made
    with pytest.raises(VerificationError):
        policy(CA, NOW_S).build_client_verifier().verify(load(child), [load(lower)])


def test_validity_starts_an_hour_early_for_slow_clocks_and_ends_after_a_year() -> None:
    for leaf in (CLIENT, SERVER):
        certificate = load(leaf)
        assert certificate.not_valid_before_utc.timestamp() == NOW_S - HOUR_S
        assert certificate.not_valid_after_utc.timestamp() == NOW_S + 365 * DAY_S
    assert load(CA).not_valid_after_utc.timestamp() == NOW_S + 3650 * DAY_S


@pytest.mark.parametrize(
    ("offset_s", "valid"), [(-HOUR_S - 1, False), (-HOUR_S, True), (364 * DAY_S, True), (365 * DAY_S + 1, False)]
)
def test_a_certificate_is_refused_outside_its_validity(offset_s: float, *, valid: bool) -> None:
    if valid:
        verify_client(CLIENT, at_s=NOW_S + offset_s)
    else:
        with pytest.raises(VerificationError):
            verify_client(CLIENT, at_s=NOW_S + offset_s)


def test_the_common_name_is_the_identity() -> None:
    """Mosquitto takes it as user name and client id."""
    for leaf, name in ((CLIENT, "watch-7"), (SERVER, "broker")):
        (attribute,) = load(leaf).subject
        assert (attribute.oid, attribute.value) == (NameOID.COMMON_NAME, name)
        assert load(leaf).issuer == load(CA).subject


@pytest.mark.parametrize("leaf", [CLIENT, SERVER], ids=["client", "server"])
def test_extensions_are_those_of_a_leaf(leaf: KeyPair) -> None:
    extensions = load(leaf).extensions
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.value.ca, constraints.critical) == (False, True)
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    purposes = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert purposes == [ExtendedKeyUsageOID.SERVER_AUTH if leaf is SERVER else ExtendedKeyUsageOID.CLIENT_AUTH]


def test_keys_are_p256_fresh_and_fit_their_certificates() -> None:
    again = issue(CA, "watch-7", now_s=NOW_S)
    serials = {load(pair).serial_number for pair in (CA, OTHER_CA, CLIENT, SERVER, again)}
    assert len(serials) == 5
    for pair in (CA, CLIENT, SERVER, again):
        key = load_pem_private_key(pair.key, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert isinstance(key.curve, ec.SECP256R1)
        assert key.public_key() == load(pair).public_key()
    assert load(again).public_key() != load(CLIENT).public_key()


@pytest.mark.parametrize("name", ["", "Watch-7", "a/b", "+", "#", "a b", "-a", "a" * 65, "a\nuser b", "é"])
@pytest.mark.parametrize("hosts", [(), ("127.0.0.1",)], ids=["client", "server"])
def test_a_name_that_could_mean_something_in_a_topic_is_refused(name: str, hosts: tuple[str, ...]) -> None:
    with pytest.raises(LocalMisuseError, match="name: expected"):
        issue(CA, name, now_s=NOW_S, server_hosts=hosts)


@settings(max_examples=30, deadline=None)
@given(st.from_regex(NAME_PATTERN, fullmatch=True))
def test_every_name_that_is_allowed_can_be_certified(name: str) -> None:
    verify_client(issue(CA, name, now_s=NOW_S))


@pytest.mark.parametrize(
    "key", [Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 2048)], ids=["Ed25519", "RSA"]
)
def test_a_ca_key_of_another_kind_is_refused(key: Ed25519PrivateKey | rsa.RSAPrivateKey) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(AggregatorError, match="expected a P-256 key"):
        issue(KeyPair(CA.certificate, pem), "watch-7", now_s=NOW_S)


def test_a_ca_key_on_another_curve_is_refused() -> None:
    pem = ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(AggregatorError, match="expected a P-256 key"):
        issue(KeyPair(CA.certificate, pem), "watch-7", now_s=NOW_S)


def certified(name: str, *, not_before_s: float = NOW_S, not_after_s: float = NOW_S + DAY_S) -> KeyPair:
    """A client's certificate for a key that was made elsewhere."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certify(CA, name, key.public_key(), not_before_s=not_before_s, not_after_s=not_after_s)
    return KeyPair(certificate, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def test_a_key_made_elsewhere_is_certified_like_a_clients_own() -> None:
    leaf = certified("watch-7")
    verify_client(leaf)
    with pytest.raises(VerificationError):
        verify_server(leaf, "watch-7")
    key = load_pem_private_key(leaf.key, None)
    assert load(leaf).public_key() == key.public_key()
    ours, theirs = load(CLIENT), load(leaf)
    assert theirs.subject == ours.subject
    assert {one.oid for one in theirs.extensions} == {one.oid for one in ours.extensions}


def test_a_key_made_elsewhere_is_certified_for_exactly_the_time_asked_for() -> None:
    leaf = certified("watch-7", not_before_s=NOW_S + DAY_S, not_after_s=NOW_S + 3 * DAY_S)
    for offset_s, valid in ((DAY_S - 1, False), (DAY_S, True), (3 * DAY_S, True), (3 * DAY_S + 1, False)):
        if valid:
            verify_client(leaf, at_s=NOW_S + offset_s)
        else:
            with pytest.raises(VerificationError):
                verify_client(leaf, at_s=NOW_S + offset_s)


def test_nothing_is_certified_beyond_the_cas_own_end() -> None:
    certified("watch-7", not_after_s=NOW_S + 3650 * DAY_S)
    with pytest.raises(AggregatorError, match="the CA's certificate ends on 2037-01-12"):
        certified("watch-7", not_after_s=NOW_S + 3650 * DAY_S + 1)


def test_only_p256_keys_and_wire_names_are_certified() -> None:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    with pytest.raises(LocalMisuseError, match="expected P-256, got secp384r1"):
        certify(CA, "watch-7", key, not_before_s=NOW_S, not_after_s=NOW_S + DAY_S)
    with pytest.raises(LocalMisuseError, match="name: expected"):
        certified("Anna's watch")


@pytest.mark.parametrize(
    "host", ["", "a b", "-a", "a-", "a..b", "é.example", "a/b", "a" * 64, ".".join(["a" * 60] * 5)]
)
def test_a_host_that_is_none_is_refused(host: str) -> None:
    with pytest.raises(LocalMisuseError, match="host: expected a DNS name or an IP address"):
        issue(CA, "broker", now_s=NOW_S, server_hosts=(host,))


@pytest.mark.parametrize("host", ["localhost", "mqtt_broker", "b-1.clinic.example", "::1", "10.0.0.1"])
def test_hosts_of_every_kind_are_certified(host: str) -> None:
    issue(CA, "broker", now_s=NOW_S, server_hosts=(host,))


def test_a_ca_whose_files_do_not_belong_together_is_noticed() -> None:
    check_ca(CA)
    for wrong in (
        KeyPair(CA.certificate, OTHER_CA.key),
        KeyPair(CA.certificate, b"none"),
        KeyPair(b"none", CA.key),
        KeyPair(CA.key, CA.certificate),
    ):
        with pytest.raises(AggregatorError, match="the CA: "):
            check_ca(wrong)


def test_openssl_agrees_in_a_mutual_tls_13_handshake(tmp_path: Path) -> None:
    """The same chain over a socket pair, with the machine's clock, as the broker and its clients use it."""
    now_s = datetime.datetime.now(datetime.timezone.utc).timestamp()
    ca = make_ca("covey test", now_s=now_s)
    paths = {}
    for name, pair in (
        ("server", issue(ca, "broker", now_s=now_s, server_hosts=("localhost",))),
        ("client", issue(ca, "watch-7", now_s=now_s)),
    ):
        paths[name] = tmp_path / f"{name}.pem"
        paths[name].write_bytes(pair.certificate + pair.key)
    (tmp_path / "ca.pem").write_bytes(ca.certificate)
    contexts = {}
    for name, purpose in (("server", ssl.Purpose.CLIENT_AUTH), ("client", ssl.Purpose.SERVER_AUTH)):
        context = ssl.create_default_context(purpose, cafile=str(tmp_path / "ca.pem"))
        context.minimum_version, context.verify_mode = ssl.TLSVersion.TLSv1_3, ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_cert_chain(str(paths[name]))
        contexts[name] = context
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    theirs.settimeout(20)
    seen = []

    def serve() -> None:
        with contexts["server"].wrap_socket(theirs, server_side=True) as server:
            seen.append((server.getpeercert() or {})["subject"])
            server.sendall(b"ok")

    thread = threading.Thread(target=serve)
    thread.start()
    with contexts["client"].wrap_socket(ours, server_hostname="localhost") as client:
        assert client.recv(2) == b"ok"
        assert client.version() == "TLSv1.3"
    thread.join()
    assert seen == [((("commonName", "watch-7"),),)]
