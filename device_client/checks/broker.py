"""Checks of the way to a broker: name, connection, TLS with this device's certificate, and MQTT.

A broker lets one connection per client id live and ends the older one, so MQTT is only spoken while no daemon runs.
Without consent nothing that identifies the device is sent: then it is only seen whether something listens.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from device_client.checks.findings import Result, ok, problem, warning
from fl_protocol.adapters.mqtt import TlsFiles, tls_context
from fl_protocol.transport import Connected, Disconnected, Transport

TIMEOUT_S = 5.0
_AFTER_HANDSHAKE_S = 1.0
"""How long a broker that refuses a certificate takes to say so: in TLS 1.3 that comes after the handshake."""


@dataclass(frozen=True)
class Way:
    """What is tried.

    Args:
        host, port: of the broker.
        identified: whether the device may show who it is; if not, only the connection is tried.
        tls: its files, None without TLS.
        mqtt: makes a transport, for the last step; None where a daemon speaks MQTT already.
        timeout_s: for each step.
    """

    host: str
    port: int
    identified: bool
    tls: TlsFiles | None
    mqtt: Callable[[], Transport] | None
    timeout_s: float = TIMEOUT_S


def check_broker(way: Way) -> Result:
    """Try every step; the sentence says which one failed."""
    place = f"{way.host}:{way.port}"
    try:
        connection = _connect(way)
    except (OSError, UnicodeError) as error:
        return _no_connection(way, error)
    done = f"connected to {place} without TLS"
    with connection:
        if not way.identified:
            return ok(f"something listens at {place}; no more is tried without the wearer's consent and a certificate")
        if way.tls is not None:
            try:
                done = f"connected to {place}, {_handshake(connection, way, way.tls)}"
            except ssl.SSLError as error:
                return _tls_problem(place, error)
    if way.mqtt is None:
        return ok(f"{done}; MQTT is not tried beside the running daemon")
    return _speak_mqtt(way.mqtt(), done, way.timeout_s)


def _no_connection(way: Way, error: OSError | UnicodeError) -> Result:
    """Why there is none."""
    place, network = f"{way.host}:{way.port}", "check the network, a firewall, and the section's host and port"
    if isinstance(error, socket.gaierror):
        return problem(f"the name {way.host} is not known ({error.strerror})", network)
    if isinstance(error, UnicodeError):
        return problem(f"{way.host} cannot be the name of a machine", network)
    if isinstance(error, TimeoutError):
        return problem(f"{place} did not answer within {way.timeout_s:g} s", network)
    if isinstance(error, ConnectionRefusedError):
        return problem(f"nothing listens at {place}", "ask the operator whether the broker runs, and on which port")
    return problem(f"{place} cannot be reached ({error.strerror or error})", network)


def _connect(way: Way) -> socket.socket:
    """The first address that answers. Raises OSError, UnicodeError."""
    failure: OSError = TimeoutError()
    for family, kind, protocol, _name, address in _addresses(way.host, way.port, way.timeout_s):
        try:
            connection = socket.socket(family, kind, protocol)
        except OSError as error:  # IPv6 is switched off
            failure = error
            continue
        try:
            connection.settimeout(way.timeout_s)
            connection.connect(address)
        except OSError as error:
            connection.close()
            failure = error
        else:
            return connection
    raise failure


def _addresses(host: str, port: int, timeout_s: float) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    """What the name leads to; a resolver may take half a minute, so it is asked in a thread. Raises OSError."""
    answer: queue.Queue[list[tuple[int, int, int, str, tuple[str, int]]] | OSError | UnicodeError] = queue.Queue()

    def ask() -> None:
        try:
            answer.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))  # type: ignore[arg-type]
        except (OSError, UnicodeError) as error:
            answer.put(error)

    threading.Thread(target=ask, name="resolver", daemon=True).start()
    try:
        found = answer.get(timeout=timeout_s)
    except queue.Empty:
        raise socket.gaierror(socket.EAI_AGAIN, f"no name server answered within {timeout_s:g} s") from None
    if isinstance(found, (OSError, UnicodeError)):
        raise found
    return found


def _handshake(connection: socket.socket, way: Way, files: TlsFiles) -> str:
    """Which TLS was agreed on, and how long the broker's certificate lasts. Raises SSLError, OSError."""
    with tls_context(files).wrap_socket(connection, server_hostname=way.host) as secure:
        certificate = secure.getpeercert() or {}
        ends_s = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
        secure.settimeout(min(_AFTER_HANDSHAKE_S, way.timeout_s))
        try:
            if not secure.recv(1):
                raise ssl.SSLError(0, "the broker closed the connection after the handshake")
        except TimeoutError:  # it waits for MQTT: the certificate is accepted
            pass
        days = (ends_s - time.time()) / 86_400
        kind = f"{secure.version()} with this device's certificate"
        return f"{kind}, the broker's is valid for {days:.0f} days more"


def _tls_problem(place: str, error: ssl.SSLError) -> Result:
    """Whose certificate was refused, by whom."""
    if isinstance(error, ssl.SSLCertVerificationError):
        advice = "ask the operator: does the broker's certificate name this host, and come from the CA of this study?"
        if "not yet valid" in error.verify_message or "expired" in error.verify_message:
            advice = "check this device's clock first, then tell the operator"
        return problem(f"the broker's certificate at {place} is not accepted: {error.verify_message}", advice)
    reason = (error.reason or error.strerror or str(error)).lower().replace("_", " ")
    return problem(
        f"TLS with {place} failed: {reason}",
        "if the broker refuses this device's certificate, ask the operator whether it was withdrawn or has ended",
    )


def _speak_mqtt(transport: Transport, done: str, timeout_s: float) -> Result:
    """Connect as the daemon would, and leave."""
    transport.open()
    try:
        ends_s = time.monotonic() + timeout_s
        while (left_s := ends_s - time.monotonic()) > 0:
            event = transport.poll(left_s)
            if isinstance(event, Connected):
                return ok(f"{done}; the broker accepts this device over MQTT")
            if isinstance(event, Disconnected):
                return problem(
                    f"{done}; but over MQTT: {event.reason}",
                    "ask the operator whether this device is admitted under its present name",
                )
        return warning(f"{done}; the broker did not answer over MQTT within {timeout_s:g} s", "try again")
    finally:
        transport.close()
