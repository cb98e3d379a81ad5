"""TLS handshakes with a key in a TPM (in software) and with one in a file: in turns, at once, and when it is gone."""

from __future__ import annotations

import gc
import ipaddress
import os
import shutil
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from aggregator.certificates import KeyPair, certify, issue, make_ca
from device_client.adapters.tpm2_tls_keys import Tpm2TlsKeys
from device_client.tls_keys import SoftwareTlsKeys, TlsKeys
from fl_protocol.adapters import mqtt, openssl_tpm2, tpm2_command
from fl_protocol.adapters.mqtt import TlsFiles, tls_context
from fl_protocol.adapters.tpm2_command import TpmError
from fl_protocol.errors import LocalMisuseError
from tests.contracts.brokers import WITHIN_S
from tests.contracts.software_tpm import SoftwareTpm, software_tpm
from tests.enrolments import broken_copy

HOST = "127.0.0.1"
AT_ONCE, TURNS = 6, 24


def client_files(ca: KeyPair, keys: TlsKeys, folder: Path) -> TlsFiles:
    """A certificate for a key of either kind."""
    folder.mkdir()
    made = keys.make(os.urandom)
    now_s = time.time()
    signed = certify(ca, "watch-7", made.key.public_key(), not_before_s=now_s - 3600, not_after_s=now_s + 86_400)
    contents = {"ca.pem": ca.certificate, "client.pem": signed, "client.key": made.stored}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return TlsFiles(folder / "ca.pem", folder / "client.pem", folder / "client.key")


class Server:
    """It asks for a certificate of the CA, and sends back what it is sent."""

    def __init__(self, folder: Path, pair: KeyPair, ca: KeyPair) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=ca.certificate.decode())
        context.verify_mode, context.minimum_version = ssl.CERT_REQUIRED, ssl.TLSVersion.TLSv1_3
        folder.mkdir()
        (folder / "server.pem").write_bytes(pair.certificate)
        (folder / "server.key").write_bytes(pair.key)
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self._context, self._listener = context, socket.create_server((HOST, 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(WITHIN_S)
        try:
            with self._context.wrap_socket(connection, server_side=True) as secured:
                secured.sendall(secured.recv(16))
        except OSError:
            connection.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def shake_hands(context: ssl.SSLContext, port: int) -> None:
    """As paho does. Raises OSError, AssertionError."""
    with (
        socket.create_connection((HOST, port), timeout=WITHIN_S) as plain,
        context.wrap_socket(plain, server_hostname=HOST, do_handshake_on_connect=False) as line,
    ):
        line.do_handshake()
        line.sendall(b"hello")
        assert line.recv(16) == b"hello"
        assert line.version() == "TLSv1.3"


@pytest.fixture(scope="module")
def ca() -> KeyPair:
    return make_ca("covey test", now_s=time.time())


@pytest.fixture(scope="module")
def server(ca: KeyPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pair = issue(ca, "broker", now_s=time.time(), server_hosts=(HOST,))
    server = Server(tmp_path_factory.mktemp("server") / "files", pair, ca)
    yield server
    server.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftwareTpm]:
    with software_tpm(tmp_path_factory.mktemp("tpm")) as tpm:
        yield tpm


@pytest.fixture
def tpm(running: SoftwareTpm, monkeypatch: pytest.MonkeyPatch) -> SoftwareTpm:
    """Where this process's commands look for one."""
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    return running


@pytest.mark.usefixtures("tpm")
def test_a_tpms_key_and_one_in_a_file_shake_hands_in_turns_and_at_once(
    ca: KeyPair, server: Server, tmp_path: Path
) -> None:
    contexts = [
        tls_context(client_files(ca, keys, tmp_path / name))
        for name, keys in (("software", SoftwareTlsKeys()), ("tpm", Tpm2TlsKeys()))
    ]
    for context in (*contexts, *contexts):
        shake_hands(context, server.port)
    gc.collect()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda turn: shake_hands(contexts[turn % 2], server.port), range(TURNS)))


@pytest.mark.usefixtures("tpm")
def test_the_files_are_needed_only_to_load_them(ca: KeyPair, server: Server, tmp_path: Path) -> None:
    context = tls_context(client_files(ca, Tpm2TlsKeys(), tmp_path / "tpm"))
    shutil.rmtree(tmp_path / "tpm")
    shake_hands(context, server.port)


def larger(ca: KeyPair, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> tuple[KeyPair, KeyPair]:
    """A CA of another kind, and a certificate of a broker by it."""
    signer = x509.load_pem_x509_certificate(ca.certificate)

    def certificate(subject: x509.Name, public: object, *, is_ca: bool) -> bytes:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(signer.subject)
        builder = builder.public_key(public).serial_number(x509.random_serial_number())  # type: ignore[arg-type]
        builder = builder.not_valid_before(signer.not_valid_before_utc).not_valid_after(signer.not_valid_after_utc)
        builder = builder.add_extension(x509.BasicConstraints(is_ca, None), critical=True)
        if not is_ca:
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(key, hashes.SHA512()).public_bytes(serialization.Encoding.PEM)

    own = SoftwareTlsKeys().make(os.urandom)
    broker = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "broker")])
    return (
        KeyPair(certificate(signer.subject, key.public_key(), is_ca=True), b""),
        KeyPair(certificate(broker, own.key.public_key(), is_ca=False), own.stored),
    )


@pytest.mark.usefixtures("tpm")
@pytest.mark.parametrize("kind", ["RSA 4096", "P-521"])
def test_a_broker_whose_ca_no_tpm_knows_is_verified_all_the_same(ca: KeyPair, kind: str, tmp_path: Path) -> None:
    """A clinic may have a CA of its own for its brokers."""
    key = ec.generate_private_key(ec.SECP521R1()) if kind == "P-521" else rsa.generate_private_key(65537, 4096)
    theirs, pair = larger(ca, key)
    server = Server(tmp_path / "server", pair, ca)
    files = client_files(ca, Tpm2TlsKeys(), tmp_path / "tpm")
    files.ca.write_bytes(theirs.certificate)
    try:
        shake_hands(tls_context(files), server.port)
    finally:
        server.close()


@pytest.mark.usefixtures("tpm")
def test_a_certificate_of_another_key_is_refused(ca: KeyPair, tmp_path: Path) -> None:
    files, other = (client_files(ca, Tpm2TlsKeys(), tmp_path / name) for name in ("one", "other"))
    shutil.copy(other.certificate, files.certificate)
    with pytest.raises(LocalMisuseError, match="expected a certificate of the TPM's key"):
        tls_context(files)
    theirs = rsa.generate_private_key(65537, 2048)
    files.certificate.write_bytes(larger(ca, theirs)[0].certificate)
    with pytest.raises(LocalMisuseError, match="expected a certificate of the TPM's key"):
        tls_context(files)
    files.certificate.write_bytes(b"rubbish")
    with pytest.raises(LocalMisuseError, match="expected a certificate of the TPM's key"):
        tls_context(files)
    files.certificate.unlink()
    with pytest.raises(LocalMisuseError, match="No such file"):
        tls_context(files)


def test_without_the_tpm_nothing_is_loaded(
    ca: KeyPair, tpm: SoftwareTpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del tpm
    files = client_files(ca, Tpm2TlsKeys(), tmp_path / "tpm")
    monkeypatch.setenv("TPM2OPENSSL_TCTI", "swtpm:host=127.0.0.1,port=1")
    with pytest.raises(LocalMisuseError, match="the TLS key: the TPM: openssl"):
        tls_context(files)


def check_the_reason(ca: KeyPair, server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The TPM goes while a context lives."""
    context = tls_context(client_files(ca, Tpm2TlsKeys(), folder))
    shake_hands(context, server.port)
    with monkeypatch.context() as gone:
        gone.setenv("TPM2OPENSSL_TCTI", "swtpm:host=127.0.0.1,port=1")
        with pytest.raises(ssl.SSLError, match="the TPM: openssl pkeyutl failed"):
            shake_hands(context, server.port)
    shake_hands(context, server.port)


@pytest.mark.usefixtures("tpm")
def test_a_tpm_that_goes_is_the_reason_and_comes_back(
    ca: KeyPair, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_the_reason(ca, server, tmp_path / "tpm", monkeypatch)


@pytest.mark.usefixtures("tpm")
@pytest.mark.parametrize(
    "change",
    [
        ("(method, sign, None, None)", "(method, _SIGN(0), None, None)"),
        ("    context.sslsocket_class = TpmSocket", "    pass"),
        ("            return 0\n        return 1", "            return 1\n        return 1"),
    ],
    ids=["nobody signs", "an ordinary socket", "a failure is none"],
)
def test_a_handshake_without_the_tpms_signature_is_caught(
    change: tuple[str, str], ca: KeyPair, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = broken_copy(openssl_tpm2.__name__, change)
    monkeypatch.setattr(mqtt, "load_cert_chain", broken.load_cert_chain)
    with pytest.raises((AssertionError, OSError, pytest.fail.Exception)):
        check_the_reason(ca, server, tmp_path / "tpm", monkeypatch)


def check_whatever_is_raised_while_it_signs(
    ca: KeyPair, server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handshake fails by it, where ctypes alone would answer OpenSSL with what happened to be in memory."""
    context = tls_context(client_files(ca, Tpm2TlsKeys(), folder))
    with monkeypatch.context() as failing:
        for raised in (MemoryError("no room"), ValueError("a mistake"), OSError("no file"), TpmError("the TPM: no")):
            failing.setattr(tpm2_command, "sign", raising(raised))
            with pytest.raises(ssl.SSLError, match=str(raised)):
                shake_hands(context, server.port)
        for left in (KeyboardInterrupt(), SystemExit(3)):
            failing.setattr(tpm2_command, "sign", raising(left))
            with pytest.raises(type(left)):
                shake_hands(context, server.port)
        failing.setattr(tpm2_command, "sign", lambda _stored, _digest: bytes(73))
        with pytest.raises(ssl.SSLError, match="72 bytes of signature at most, got 73"):
            shake_hands(context, server.port)
    shake_hands(context, server.port)


def raising(raised: BaseException) -> Callable[[bytes, bytes], bytes]:
    def sign(_stored: bytes, _digest: bytes) -> bytes:
        raise raised

    return sign


@pytest.mark.usefixtures("tpm")
def test_whatever_is_raised_while_it_signs_is_the_reason(
    ca: KeyPair, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_whatever_is_raised_while_it_signs(ca, server, tmp_path / "tpm", monkeypatch)


def check_no_signal_comes_between(ca: KeyPair, server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handlers of signals run in the main thread, before any instruction of it."""
    signed_by: list[threading.Thread] = []
    sign = tpm2_command.sign

    def spy(stored: bytes, digest: bytes) -> bytes:
        signed_by.append(threading.current_thread())
        return sign(stored, digest)

    monkeypatch.setattr(tpm2_command, "sign", spy)
    context = tls_context(client_files(ca, Tpm2TlsKeys(), folder))
    shake_hands(context, server.port)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(shake_hands, context, server.port).result()
    assert len(signed_by) == 2
    assert threading.main_thread() not in signed_by


@pytest.mark.usefixtures("tpm")
def test_no_signal_comes_between(ca: KeyPair, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert threading.current_thread() is threading.main_thread()
    check_no_signal_comes_between(ca, server, tmp_path / "tpm", monkeypatch)


@pytest.mark.usefixtures("tpm")
@pytest.mark.parametrize(
    "case",
    [
        (check_whatever_is_raised_while_it_signs, ("except BaseException as", "except (TpmError, OSError) as")),
        (check_whatever_is_raised_while_it_signs, ("if not isinstance(why, Exception):", "if False:")),
        (check_no_signal_comes_between, ("is not threading.main_thread()", "is not None")),
    ],
)
def test_a_signer_that_lets_openssl_answer_by_chance_is_caught(
    case: tuple[Callable[[KeyPair, Server, Path, pytest.MonkeyPatch], None], tuple[str, str]],
    ca: KeyPair,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check, change = case
    broken = broken_copy(openssl_tpm2.__name__, change)
    monkeypatch.setattr(mqtt, "load_cert_chain", broken.load_cert_chain)
    with pytest.raises((AssertionError, OSError, KeyboardInterrupt, SystemExit, pytest.fail.Exception)):
        check(ca, server, tmp_path / "tpm", monkeypatch)


@pytest.mark.usefixtures("tpm")
def test_without_room_for_the_keys_file_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Tpm2TlsKeys().make(os.urandom)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(TpmError, match="its key cannot be handed to openssl in a file"):
        tpm2_command.sign(made.stored, bytes(32))
