"""A program: TLS handshakes with a TPM's key and with one in a file, in turns and at once; exits 1 if one fails.

Its argument may be a change that breaks `fl_protocol.adapters.openssl_tpm2`: what stands there, and what is to.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aggregator.certificates import KeyPair, certify, issue, make_ca
from device_client.adapters.tpm2_tls_keys import Tpm2TlsKeys
from device_client.tls_keys import SoftwareTlsKeys, TlsKeys
from fl_protocol.adapters import mqtt
from fl_protocol.adapters.mqtt import TlsFiles, tls_context
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


def serve(ca: KeyPair, folder: Path) -> int:
    """A server that asks for a certificate of this CA; its port."""
    pair = issue(ca, "broker", now_s=time.time(), server_hosts=(HOST,))
    (folder / "server.pem").write_bytes(pair.certificate)
    (folder / "server.key").write_bytes(pair.key)
    (folder / "ca.pem").write_bytes(ca.certificate)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "ca.pem"))
    context.verify_mode, context.minimum_version = ssl.CERT_REQUIRED, ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    listener = socket.create_server((HOST, 0), backlog=64)
    # A process of its own, so that what is loaded here is not loaded there.
    if os.fork() == 0:
        os.setpgid(0, 0)
        parent = os.getppid()

        def answer(connection: socket.socket) -> None:
            try:
                with context.wrap_socket(connection, server_side=True) as secured:
                    secured.sendall(secured.recv(16))
            except OSError:
                connection.close()

        listener.settimeout(1)
        while os.getppid() == parent:
            try:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()
            except TimeoutError:
                continue
        os._exit(0)
    return int(listener.getsockname()[1])


def shake_hands(context: ssl.SSLContext, port: int) -> None:
    """Raises OSError, AssertionError."""
    with (
        socket.create_connection((HOST, port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname=HOST, do_handshake_on_connect=False) as line,
    ):
        line.do_handshake()
        line.sendall(b"hello")
        assert line.recv(16) == b"hello"
        assert line.version() == "TLSv1.3"


def main() -> None:
    if len(sys.argv) > 1:
        broken = broken_copy("fl_protocol.adapters.openssl_tpm2", tuple(json.loads(sys.argv[1])))
        mqtt.load_cert_chain = broken.load_cert_chain
    folder, ca = Path.cwd(), make_ca("covey test", now_s=time.time())
    port = serve(ca, folder)
    contexts = [
        tls_context(client_files(ca, keys, folder / name))
        for name, keys in (("software", SoftwareTlsKeys()), ("tpm", Tpm2TlsKeys()))
    ]
    for context in (*contexts, *contexts):
        shake_hands(context, port)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda turn: shake_hands(contexts[turn % 2], port), range(TURNS)))


if __name__ == "__main__":
    main()
