"""The three brokers that the transport contract is run over, behind one small interface."""

from __future__ import annotations

import itertools
import math
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from firmware_sim import iotcore_broker
from firmware_sim.radio.broker_edge import BrokerEdge
from firmware_sim.radio.links import IDEAL
from firmware_sim.radio.radio import Radio
from firmware_sim.radio.transport import RadioTransport
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from fl_protocol.adapters.mqtt import LastWill, MqttTransport
from fl_protocol.transport import Connected, Disconnected, Received, Transport

WITHIN_S = 20.0
"""How long a real broker may take for anything; nothing waits this long unless it fails."""

E = TypeVar("E", Connected, Disconnected, Received)


def await_event(transport: Transport, kind: type[E], *, within_s: float = WITHIN_S) -> E:
    """The next event of this kind; others on the way are passed over."""
    ends_s = time.monotonic() + within_s
    while time.monotonic() < ends_s:
        event = transport.poll(0.1)
        if isinstance(event, kind):
            return event
    raise AssertionError(f"no {kind.__name__} within {within_s} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_mosquitto() -> str | None:
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


class BrokerUnderTest(Protocol):
    """A broker, and clients of it."""

    def client(self, name: str, *, will: tuple[str, bytes] | None = None) -> Transport:
        """A transport, not yet opened."""

    def worker(self, name: str, *, receive_maximum: int = 1000) -> Transport:
        """A transport with a session kept under its name, and manual acknowledgement; not yet opened."""

    def cut(self, client: Transport) -> None:
        """A client's connection dies; it comes back by itself."""

    def kill(self, client: Transport) -> None:
        """A client is gone without a goodbye, for good."""

    def die(self, name: str, *, will: tuple[str, bytes]) -> None:
        """A client connects and then dies without a goodbye."""

    def restart(self) -> None:
        """Kill the broker and start it again at the same address."""

    def stop(self) -> None:
        """End it and every client."""


class Virtual:
    """The simulator's broker."""

    kind: type[VirtualTransport] = VirtualTransport
    """What its workers are; tests put broken copies here."""

    def __init__(self, maximum_packet_bytes: int | None = None) -> None:
        self._broker = VirtualBroker(maximum_packet_bytes=maximum_packet_bytes)

    def client(self, name: str, *, will: tuple[str, bytes] | None = None) -> VirtualTransport:
        del name
        return VirtualTransport(self._broker, will=will)

    def worker(self, name: str, *, receive_maximum: int = 1000) -> VirtualTransport:
        return self.kind(self._broker, session=name, manual_acknowledgement=True, receive_maximum=receive_maximum)

    def cut(self, client: Transport) -> None:
        self.kill(client)
        client.open()

    def kill(self, client: Transport) -> None:
        assert isinstance(client, VirtualTransport)
        client.drop("cut")

    def die(self, name: str, *, will: tuple[str, bytes]) -> None:
        client = self.client(name, will=will)
        client.open()
        client.drop("killed")

    def restart(self) -> None:
        self._broker.restart(keep_retained=False)

    def stop(self) -> None:
        pass


class VirtualOverRadio(Virtual):
    """The same broker; clients reach it over an ideal radio link. Each look at the clock is a millisecond later."""

    def __init__(self, maximum_packet_bytes: int | None = None) -> None:
        super().__init__(maximum_packet_bytes)
        self._looks = itertools.count()
        self._edge = BrokerEdge(self._broker, now_s=self._now_s)

    def _now_s(self) -> float:
        return next(self._looks) / 1000

    def client(self, name: str, *, will: tuple[str, bytes] | None = None) -> RadioTransport:  # type: ignore[override]
        radio = Radio(
            {"lab": IDEAL}, place=lambda _: "lab", next_place_change_s=lambda _: math.inf, seed=1, device=name
        )
        return RadioTransport(radio, self._edge, now_s=self._now_s, will=will)

    def die(self, name: str, *, will: tuple[str, bytes]) -> None:
        client = self.client(name, will=will)
        client.open()
        await_event(client, Connected)
        client.drop("killed")


_DYING_CLIENT = """
import sys
from fl_protocol.adapters.mqtt import LastWill, MqttTransport
from fl_protocol.transport import Connected
transport = MqttTransport(host="127.0.0.1", port=int(sys.argv[1]), client_id=sys.argv[2],
                          will=LastWill(sys.argv[3], bytes.fromhex(sys.argv[4])))
transport.open()
while not isinstance(transport.poll(1.0), Connected):
    pass
print("connected", flush=True)
sys.stdin.read()
"""


class Real:
    """A broker process on loopback and paho clients."""

    def __init__(self, start: Callable[[int], Callable[[], None]]) -> None:
        """`start(port)` starts the broker and gives what stops it."""
        self.port = free_port()
        self._start = start
        self._stop = start(self.port)
        self._clients: list[MqttTransport] = []

    def client(self, name: str, *, will: tuple[str, bytes] | None = None) -> MqttTransport:
        transport = MqttTransport(
            host="127.0.0.1",
            port=self.port,
            client_id=name,
            will=None if will is None else LastWill(*will),
            max_back_off_s=2,
        )
        self._clients.append(transport)
        return transport

    def worker(self, name: str, *, receive_maximum: int = 1000) -> MqttTransport:
        transport = MqttTransport(
            host="127.0.0.1",
            port=self.port,
            client_id=name,
            max_back_off_s=2,
            manual_acknowledgement=True,
            session_expiry_s=3600,
            receive_maximum=receive_maximum,
        )
        self._clients.append(transport)
        return transport

    def cut(self, client: Transport) -> None:
        assert isinstance(client, MqttTransport)
        connection = client._client.socket()
        assert isinstance(connection, socket.socket)
        connection.shutdown(socket.SHUT_RDWR)

    def kill(self, client: Transport) -> None:
        assert isinstance(client, MqttTransport)
        client._client._thread_terminate = True  # it does not come back
        self.cut(client)
        client._client.loop_stop()

    def die(self, name: str, *, will: tuple[str, bytes]) -> None:
        command = [sys.executable, "-c", _DYING_CLIENT, str(self.port), name, will[0], will[1].hex()]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"connected\n"
            process.send_signal(signal.SIGKILL)

    def restart(self) -> None:
        self._stop()
        self._stop = self._start(self.port)

    def stop(self) -> None:
        for client in self._clients:
            client.close()
        self._stop()


def start_mosquitto(folder: Path, *settings: str) -> Callable[[int], Callable[[], None]]:
    """What starts a mosquitto without TLS, for tests of the transport only."""
    program = find_mosquitto()
    assert program is not None

    def start(port: int) -> Callable[[], None]:
        config = folder / "mosquitto.conf"
        config.write_text("\n".join([f"listener {port} 127.0.0.1", "allow_anonymous true", *settings, ""]))
        process = subprocess.Popen([program, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ends_s = time.monotonic() + WITHIN_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "mosquitto ended at once"
                assert time.monotonic() < ends_s, "mosquitto does not listen"
                time.sleep(0.02)

        def stop() -> None:
            process.kill()
            process.wait()

        return stop

    return start


def start_iotcore(port: int) -> Callable[[], None]:
    """Starts iotcore with the recipe in `firmware_sim.iotcore_broker`."""
    return iotcore_broker.start(port).stop
