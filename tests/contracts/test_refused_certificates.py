"""A broker's certificate that does not hold: nothing is said to such a broker, and what is wrong is told in words."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aggregator.certificates import KeyPair, issue, make_ca
from fl_protocol.adapters import mqtt
from fl_protocol.adapters.mqtt import MqttTransport, TlsFiles
from fl_protocol.adapters.paho_client import PahoClient
from fl_protocol.transport import Disconnected
from tests.contracts.brokers import WITHIN_S, await_event

HOST, DAY_S = "127.0.0.1", 86_400.0
NOW_S = time.time()
CA, OTHER_CA = make_ca("covey test", now_s=NOW_S - 400 * DAY_S), make_ca("covey test", now_s=NOW_S - 400 * DAY_S)
SHOWN: dict[str, tuple[Callable[[], KeyPair], str]] = {
    "a device's own": (lambda: issue(CA, "watch-1", now_s=NOW_S), "unsuitable certificate purpose"),
    "another CA's": (
        lambda: issue(OTHER_CA, "broker", now_s=NOW_S, server_hosts=(HOST,)),
        "unable to get local issuer certificate",
    ),
    "another host's": (lambda: issue(CA, "broker", now_s=NOW_S, server_hosts=("192.0.2.1",)), "mismatch"),
    # A device whose clock is behind sees every new certificate so, and one that is ahead every old one.
    "clock behind": (
        lambda: issue(CA, "broker", now_s=NOW_S + 2 * DAY_S, server_hosts=(HOST,)),
        "not yet valid; check this machine's clock first",
    ),
    "clock ahead": (
        lambda: issue(CA, "broker", now_s=NOW_S - 399 * DAY_S, server_hosts=(HOST,)),
        "expired; check this machine's clock first",
    ),
}


class Heard:
    """A TLS server that shows a certificate, and what clients said to it inside the encryption."""

    def __init__(self, shown: KeyPair, folder: Path) -> None:
        (folder / "server.pem").write_bytes(shown.certificate)
        (folder / "server.key").write_bytes(shown.key)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        self.said = b""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(WITHIN_S)
                try:
                    with self._context.wrap_socket(connection, server_side=True) as secure:
                        self.said += secure.recv(256)
                except OSError:
                    continue

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(WITHIN_S)


@contextmanager
def shown_to_a_device(shown: KeyPair, folder: Path) -> Iterator[tuple[Heard, MqttTransport]]:
    """A server and a device that has tried to connect to it."""
    own = issue(CA, "watch-1", now_s=NOW_S)
    for name, data in (("ca.pem", CA.certificate), ("own.pem", own.certificate), ("own.key", own.key)):
        (folder / name).write_bytes(data)
    server = Heard(shown, folder)
    files = TlsFiles(folder / "ca.pem", folder / "own.pem", folder / "own.key")
    transport = MqttTransport(host=HOST, port=server.port, client_id="watch-1", tls=files)
    transport.open()
    try:
        yield server, transport
    finally:
        transport.close()
        server.close()


def check_it_is_refused(kind: str, folder: Path) -> None:
    make, words = SHOWN[kind]
    with shown_to_a_device(make(), folder) as (server, transport):
        reason = await_event(transport, Disconnected).reason
    assert reason.startswith(f"the broker's certificate at {HOST}:{server.port} is not accepted: ")
    assert words in reason
    assert server.said == b""


@pytest.mark.parametrize("kind", SHOWN)
def test_a_broker_that_shows_a_certificate_that_does_not_hold_is_told_nothing(kind: str, tmp_path: Path) -> None:
    check_it_is_refused(kind, tmp_path)


@pytest.mark.parametrize("kind", SHOWN)
def test_a_client_that_takes_any_certificate_is_caught(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lenient(files: TlsFiles) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(files.certificate, files.key)
        return context

    monkeypatch.setattr(mqtt, "tls_context", lenient)
    with pytest.raises(AssertionError):
        check_it_is_refused(kind, tmp_path)


def test_a_client_that_calls_it_unreachable_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PahoClient, "reconnect", mqtt.paho.Client.reconnect)
    with pytest.raises(AssertionError):
        check_it_is_refused("clock behind", tmp_path)
