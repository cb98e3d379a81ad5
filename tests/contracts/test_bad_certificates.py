"""Certificates that are wrong in one thing each, on a real mosquitto: what broker, device and doctor make of it.

Both sides go by the machine's clock here, so a clock that is ahead is a certificate that has ended, and one that is
behind is a certificate that has not begun: TLS cannot tell which of the two it is, and neither can the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from aggregator.certificates import KeyPair, issue, make_ca
from device_client.checks.broker import Way, check_broker
from firmware_sim.mosquitto_broker import MosquittoBroker, find_mosquitto, free_port, write_mosquitto_files
from fl_protocol.adapters import mqtt as mqtt_module
from fl_protocol.adapters.mqtt import TlsFiles
from fl_protocol.transport import Connected, Disconnected, Transport
from tests.contracts.brokers import WITHIN_S
from tests.enrolments import broken_copy

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

HOST, DEVICE, DAY_S = "127.0.0.1", "watch-7", 86_400.0
OTHER = "another's"


@dataclass(frozen=True)
class Paper:
    """A certificate that is good, but for what is said.

    Args:
        from_s: when it was issued, seconds from now; it lasts a day.
        usage: what it may be used for, in place of what it is for.
        issuer: whose it is.
    """

    from_s: float = 0.0
    usage: x509.ObjectIdentifier | None = None
    issuer: str = ""


WRONG = {
    "wrong_issuer": Paper(issuer=OTHER),
    "not_yet_valid": Paper(from_s=2 * DAY_S),
    "expired": Paper(from_s=-2 * DAY_S),
}
"""Of either side; by whose clock makes no difference."""
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


def with_usage(pair: KeyPair, usage: x509.ObjectIdentifier, ca: KeyPair) -> KeyPair:
    """The same certificate for another use, and the CA signs it."""
    old, key = x509.load_pem_x509_certificate(pair.certificate), load_pem_private_key(ca.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    extensions = [
        x509.Extension(one.oid, one.critical, x509.ExtendedKeyUsage([usage]))
        if isinstance(one.value, x509.ExtendedKeyUsage)
        else one
        for one in old.extensions
    ]
    builder = x509.CertificateBuilder(
        issuer_name=old.issuer,
        subject_name=old.subject,
        public_key=old.public_key(),
        serial_number=old.serial_number,
        not_valid_before=old.not_valid_before_utc,
        not_valid_after=old.not_valid_after_utc,
        extensions=extensions,
    )
    return KeyPair(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), pair.key)


def written(folder: Path, name: str, paper: Paper, ca: KeyPair, *, hosts: tuple[str, ...] = ()) -> None:
    """A certificate in files of a folder."""
    issuer = make_ca("covey demo", now_s=time.time()) if paper.issuer else ca
    pair = issue(issuer, name, now_s=time.time() + paper.from_s, server_hosts=hosts, valid_s=DAY_S)
    if paper.usage is not None:
        pair = with_usage(pair, paper.usage, issuer)
    (folder / f"{name}.pem").write_bytes(pair.certificate)
    (folder / f"{name}.key").write_bytes(pair.key)


@contextmanager
def broker_with(folder: Path, ca: KeyPair, paper: Paper) -> Iterator[int]:
    """A mosquitto under our configuration, with such a certificate of its own; its port."""
    (folder / "ca.pem").write_bytes(ca.certificate)
    written(folder, "broker", paper, ca, hosts=(HOST,))
    port = free_port()
    config = write_mosquitto_files(folder, host=HOST, port=port, tenant="demo", aggregator="aggregator")
    broker = MosquittoBroker(config, host=HOST, port=port, log=folder / "broker.log")
    try:
        yield port
    finally:
        broker.stop()


def files_of(folder: Path) -> TlsFiles:
    """The device's."""
    return TlsFiles(folder / "ca.pem", folder / f"{DEVICE}.pem", folder / f"{DEVICE}.key")


def outcome(port: int, folder: Path, module: ModuleType = mqtt_module) -> type[Connected | Disconnected]:
    """What becomes of the device's first attempt to connect."""
    files = files_of(folder)
    client: Transport = module.MqttTransport(
        host=HOST, port=port, client_id=DEVICE, tls=module.TlsFiles(files.ca, files.certificate, files.key)
    )
    client.open()
    try:
        ends_s = time.monotonic() + WITHIN_S
        while time.monotonic() < ends_s:
            event = client.poll(0.2)
            if isinstance(event, Connected | Disconnected):
                return type(event)
    finally:
        client.close()
    raise AssertionError("neither connected nor told why not")


def told(port: int, folder: Path) -> str:
    """What the doctor says, and advises."""
    found = check_broker(Way(HOST, port, identified=True, tls=files_of(folder), mqtt=None))
    assert found.verdict == "problem", found
    return f"{found.found}; {found.advice}"


CA = make_ca("covey demo", now_s=time.time() - 10 * DAY_S)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with broker_with(tmp_path_factory.mktemp("good"), CA, Paper()) as port:
        yield port


def device_with(folder: Path, paper: Paper) -> None:
    """A device's files."""
    (folder / "ca.pem").write_bytes(CA.certificate)
    written(folder, DEVICE, paper, CA)


def test_good_ones_are_let_in(good: int, tmp_path: Path) -> None:
    device_with(tmp_path, Paper())
    assert outcome(good, tmp_path) is Connected


@pytest.mark.parametrize("wrong", [*WRONG, "wrong_usage"])
def test_a_broker_takes_no_device_with_a_wrong_certificate(wrong: str, good: int, tmp_path: Path) -> None:
    device_with(tmp_path, WRONG.get(wrong, Paper(usage=SERVER)))
    assert outcome(good, tmp_path) is Disconnected
    assert "ask the operator whether it was withdrawn or has ended" in told(good, tmp_path)


WORDS = {
    "wrong_issuer": "ask the operator: does the broker's certificate name this host",
    "wrong_usage": "unsuitable certificate purpose; ask the operator",
    "not_yet_valid": "certificate is not yet valid; check this device's clock first",
    "expired": "certificate has expired; check this device's clock first",
}


@pytest.mark.parametrize("wrong", WORDS)
def test_a_device_goes_to_no_broker_with_a_wrong_certificate(wrong: str, tmp_path: Path) -> None:
    device_with(tmp_path, Paper())
    with broker_with(tmp_path, CA, WRONG.get(wrong, Paper(usage=CLIENT))) as port:
        assert outcome(port, tmp_path) is Disconnected
        assert WORDS[wrong] in told(port, tmp_path)


@pytest.mark.parametrize("wrong", WORDS)
def test_a_device_that_does_not_look_at_the_brokers_certificate_is_caught(wrong: str, tmp_path: Path) -> None:
    right = "context.minimum_version = ssl.TLSVersion.TLSv1_3"
    careless = broken_copy(
        "fl_protocol.adapters.mqtt",
        (right, f"context.check_hostname, context.verify_mode = False, ssl.CERT_NONE; {right}"),
    )
    device_with(tmp_path, Paper())
    with broker_with(tmp_path, CA, WRONG.get(wrong, Paper(usage=CLIENT))) as port:
        assert outcome(port, tmp_path, careless) is Connected


def test_a_broker_that_believes_another_ca_too_is_caught(tmp_path: Path) -> None:
    other = make_ca("covey demo", now_s=time.time() - DAY_S)
    device_with(tmp_path, Paper())
    pair = issue(other, DEVICE, now_s=time.time(), valid_s=DAY_S)
    (tmp_path / f"{DEVICE}.pem").write_bytes(pair.certificate)
    (tmp_path / f"{DEVICE}.key").write_bytes(pair.key)
    both = KeyPair(CA.certificate + other.certificate, CA.key)
    with broker_with(tmp_path, both, Paper()) as port:
        (tmp_path / "ca.pem").write_bytes(CA.certificate)
        assert outcome(port, tmp_path) is Connected
