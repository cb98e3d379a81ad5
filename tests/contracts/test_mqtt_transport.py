"""`MqttTransport` against brokers that are absent, that refuse, and that send bytes no broker should."""

from __future__ import annotations

import socket
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fl_protocol import back_off
from fl_protocol.adapters.acknowledgements import Acknowledgements
from fl_protocol.adapters.mqtt import MAX_QUEUED_BYTES, MqttTransport, TlsFiles
from fl_protocol.adapters.paho_client import MAX_INCOMING_BYTES, PahoClient
from fl_protocol.errors import LocalMisuseError
from fl_protocol.limits import MAX_PACKET_BYTES
from fl_protocol.transport import Connected, Delivery, Disconnected, Received
from tests.contracts.brokers import (
    WITHIN_S,
    Real,
    await_event,
    find_mosquitto,
    free_port,
    start_iotcore,
    start_mosquitto,
)

CONNACK = bytes([0x20, 3, 0, 0, 0])
CONNECT, PUBLISH, PUBACK, PINGREQ, PINGRESP, DISCONNECT = 0x10, 0x30, 0x40, 0xC0, 0xD0, 0xE0


def publish_packet(topic: bytes, payload: bytes, *, packet_id: int | None = None, qos: int = 1) -> bytes:
    """An MQTT 5 PUBLISH, at QoS 0 without a packet id."""
    named = b"" if packet_id is None else packet_id.to_bytes(2, "big")
    body = len(topic).to_bytes(2, "big") + topic + named + b"\0" + payload
    length, left = b"", len(body)
    while True:
        left, digit = left >> 7, left & 0x7F
        length += bytes([digit | (0x80 if left else 0)])
        if not left:
            return bytes([PUBLISH | (qos << 1 if named else 0)]) + length + body


class ScriptedBroker:
    """A TCP server that accepts clients one after another and lets the test read and write their bytes."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(WITHIN_S)
        self.port = int(self._listener.getsockname()[1])
        self._connection: socket.socket | None = None

    def accept(self) -> bytes:
        """Take the next connection and read its CONNECT; that packet's body."""
        self.hang_up()
        self._connection, _ = self._listener.accept()
        self._connection.settimeout(WITHIN_S)
        kind, body = self.read_packet()
        assert kind == CONNECT
        return body

    def read_until(self, last: int) -> list[tuple[int, bytes]]:
        """Packets before the first one of the type `last`."""
        found = []
        while (packet := self.read_packet())[0] != last:
            found.append(packet)
        return found

    def send(self, data: bytes) -> None:
        assert self._connection is not None
        self._connection.sendall(data)

    def read_packet(self) -> tuple[int, bytes]:
        """(type, body) of the next packet."""
        kind, length, shift = self._read(1)[0], 0, 0
        while True:
            digit = self._read(1)[0]
            length, shift = length | (digit & 0x7F) << shift, shift + 7
            if not digit & 0x80:
                return kind & 0xF0, self._read(length)

    def _read(self, count: int) -> bytes:
        assert self._connection is not None
        data = b""
        while len(data) < count:
            more = self._connection.recv(count - len(data))
            assert more, "the client hung up"
            data += more
        return data

    def hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def stop(self) -> None:
        self.hang_up()
        self._listener.close()


@pytest.fixture
def scripted() -> Iterator[ScriptedBroker]:
    broker = ScriptedBroker()
    yield broker
    broker.stop()


@pytest.fixture
def transport(scripted: ScriptedBroker) -> Iterator[MqttTransport]:
    transport = MqttTransport(host="127.0.0.1", port=scripted.port, client_id="one", max_back_off_s=1)
    yield transport
    scripted.stop()
    transport.close()


def test_an_unreachable_broker_is_named_and_tried_again_until_it_is_there() -> None:
    port = free_port()
    transport = MqttTransport(host="127.0.0.1", port=port, client_id="one", max_back_off_s=1)
    transport.open()
    for _ in range(2):
        assert await_event(transport, Disconnected).reason == f"no broker reachable at 127.0.0.1:{port}"
    stop = start_iotcore(port)
    await_event(transport, Connected)
    transport.close()
    stop()


def waits_after_hanging_up(scripted: ScriptedBroker, lives_s: list[float]) -> list[float]:
    """A broker accepts and hangs up again and again; what paho is told to wait each time (it does not wait here)."""
    now_s, waits = [0.0], list[float]()
    transport = MqttTransport(host="127.0.0.1", port=scripted.port, client_id="one", clock=lambda: now_s[0])
    set_delay = transport._client.reconnect_delay_set

    def at_once(*, min_delay: int, max_delay: int) -> None:
        del max_delay
        waits.append(min_delay)
        set_delay(0, 0)

    transport._client.reconnect_delay_set = at_once  # type: ignore[method-assign,assignment]
    transport.open()
    for lived_s in lives_s:
        scripted.accept()
        scripted.send(CONNACK)
        await_event(transport, Connected)
        now_s[0] += lived_s
        scripted.hang_up()
        await_event(transport, Disconnected)
    scripted.stop()
    transport.close()
    return waits[: len(lives_s)]


def test_a_broker_that_accepts_and_hangs_up_is_asked_ever_more_rarely(scripted: ScriptedBroker) -> None:
    assert waits_after_hanging_up(scripted, [0.05] * 4 + [61.0]) == [1, 2, 4, 8, 1]


def test_a_transport_that_forgets_its_failures_is_caught(
    scripted: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(back_off, "LASTING_S", 0.0)
    assert waits_after_hanging_up(scripted, [0.05] * 4) == [1, 1, 1, 1]


def test_closing_while_the_broker_is_unreachable_ends_the_thread() -> None:
    before = threading.active_count()
    transport = MqttTransport(host="127.0.0.1", port=free_port(), client_id="one")
    transport.open()
    await_event(transport, Disconnected)
    transport.close()
    assert threading.active_count() == before


def test_a_broker_that_refuses_is_reported_with_its_reason(tmp_path: Path) -> None:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    broker = Real(start_mosquitto(tmp_path, "allow_anonymous false"))
    transport = broker.client("stranger")
    transport.open()
    assert await_event(transport, Disconnected).reason == "broker refused the connection: Not authorized"
    broker.stop()


@pytest.mark.parametrize(
    "garbage",
    [
        bytes([0x90, 0]),  # SUBACK without a message id
        bytes([0x40, 1, 0]),  # PUBACK with half a message id
        bytes([0x30, 2, 0xFF, 0xFF]),  # PUBLISH whose topic is longer than the packet
        bytes([0x30, 5, 0, 1, 0x61, 2, 0x99]),  # PUBLISH with a property that does not exist
        bytes([0x30, 6, 0, 1, 0x61, 3, 0x08, 0]),  # PUBLISH with a property cut off
        bytes([0xE0, 1, 0x05]),  # DISCONNECT with a reason code that does not exist
        bytes([0x20, 0]),  # CONNACK, empty, in the middle of a connection
        bytes([0xF0, 0xFF, 0xFF, 0xFF, 0xFF, 0x01]),  # AUTH with an endless length
    ],
    ids=lambda packet: packet.hex(),
)
def test_malformed_packets_do_not_end_the_transport(
    garbage: bytes, scripted: ScriptedBroker, transport: MqttTransport
) -> None:
    transport.open()
    scripted.accept()
    scripted.send(CONNACK)
    await_event(transport, Connected)
    scripted.send(garbage)
    await_event(transport, Disconnected)
    scripted.accept()
    scripted.send(CONNACK + publish_packet(b"t", b"alive"))
    await_event(transport, Connected)
    assert await_event(transport, Received) == Received("t", b"alive")


def test_a_topic_that_is_not_utf8_is_dropped(scripted: ScriptedBroker, transport: MqttTransport) -> None:
    transport.open()
    scripted.accept()
    scripted.send(CONNACK + publish_packet(b"\xff\xfe", b"bad") + publish_packet(b"t", b"good"))
    assert await_event(transport, Received) == Received("t", b"good")


def test_nothing_left_over_from_an_old_connection_is_sent_on_a_new_one(
    scripted: ScriptedBroker, transport: MqttTransport
) -> None:
    transport.open()
    scripted.accept()
    scripted.send(CONNACK)
    await_event(transport, Connected)
    transport.publish("round", b"manifest of round 1", retain=True)
    kind, body = scripted.read_packet()
    assert (kind, b"round 1" in body) == (PUBLISH, True)
    scripted.hang_up()  # without an acknowledgement
    scripted.accept()
    scripted.send(CONNACK)
    await_event(transport, Disconnected)
    await_event(transport, Connected)
    transport.publish("round", b"manifest of round 2", retain=True)
    kind, body = scripted.read_packet()
    assert (kind, b"round 2" in body) == (PUBLISH, True)


def test_a_slow_consumer_holds_a_bounded_number_of_bytes(scripted: ScriptedBroker, transport: MqttTransport) -> None:
    transport.open()
    scripted.accept()
    scripted.send(CONNACK)
    await_event(transport, Connected)
    size = 64 * 1024
    for _ in range(MAX_QUEUED_BYTES // size + 3):
        scripted.send(publish_packet(b"flood", bytes(size)))
    scripted.send(bytes([0xE0, 0]))  # DISCONNECT: the event after which nothing more comes
    scripted.accept()  # everything was taken from the socket before the client came back
    held = 0
    while not isinstance(event := transport.poll(WITHIN_S), Disconnected):
        assert isinstance(event, Received)
        held += len(event.payload)
    assert held == MAX_QUEUED_BYTES


def reads_after_announcing(size: int, scripted: ScriptedBroker, transport: MqttTransport) -> str:
    """A broker announces a packet of that size and sends none of it; why the client hangs up."""
    transport.open()
    scripted.accept()
    scripted.send(CONNACK)
    await_event(transport, Connected)
    length = bytes([0x80 | size & 0x7F, 0x80 | size >> 7 & 0x7F, 0x80 | size >> 14 & 0x7F, size >> 21])
    scripted.send(bytes([PUBLISH]) + length)
    return await_event(transport, Disconnected).reason


@pytest.mark.parametrize("size", [MAX_INCOMING_BYTES + 1, 2**28 - 1])
def test_a_packet_larger_than_announced_is_not_waited_for(
    size: int, scripted: ScriptedBroker, transport: MqttTransport
) -> None:
    """It also says when another paho reads its packets another way."""
    reason = reads_after_announcing(size, scripted, transport)
    assert f"a packet of {size} bytes" in reason
    scripted.accept()  # and it comes back
    scripted.send(CONNACK + publish_packet(b"t", b"alive"))
    assert await_event(transport, Received) == Received("t", b"alive")


def test_the_largest_packet_that_was_announced_is_taken(scripted: ScriptedBroker, transport: MqttTransport) -> None:
    transport.open()
    scripted.accept()
    payload = bytes(MAX_PACKET_BYTES)
    scripted.send(CONNACK + publish_packet(b"t" * 1000, payload))
    assert await_event(transport, Received) == Received("t" * 1000, payload)


def test_a_giant_packet_takes_no_memory(scripted: ScriptedBroker, transport: MqttTransport) -> None:
    tracemalloc.start()
    reads_after_announcing(2**28 - 1, scripted, transport)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**22


def test_a_client_that_reads_whatever_is_announced_is_caught(
    scripted: ScriptedBroker, transport: MqttTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(PahoClient, "_sock_recv")
    tracemalloc.start()
    transport.open()
    scripted.accept()
    scripted.send(CONNACK)
    await_event(transport, Connected)
    scripted.send(bytes([PUBLISH, 0xFF, 0xFF, 0xFF, 0x7F]) + bytes(2**20))
    scripted.hang_up()
    await_event(transport, Disconnected)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes > 2**22


def test_messages_larger_than_any_of_ours_are_kept_away_by_an_honest_broker(tmp_path: Path) -> None:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    broker = Real(start_mosquitto(tmp_path))
    receiver, sender = broker.client("receiver"), broker.client("sender")
    for client in (receiver, sender):
        client.open()
        await_event(client, Connected)
    receiver.subscribe("t/+")
    receiver.publish("t/ready", b"")
    await_event(receiver, Received)
    sender.publish("t/huge", bytes(2 * MAX_PACKET_BYTES))
    sender.publish("t/end", b"end")
    assert await_event(receiver, Received) == Received("t/end", b"end")
    broker.stop()


def test_the_servers_limits_are_handed_up(scripted: ScriptedBroker, transport: MqttTransport) -> None:
    transport.open()
    scripted.accept()
    receive_maximum, packet_bytes = bytes([0x21, 0, 3]), bytes([0x27, 0, 0, 8, 0])
    properties = receive_maximum + packet_bytes
    scripted.send(bytes([0x20, 3 + len(properties), 0, 0, len(properties)]) + properties)
    assert await_event(transport, Connected) == Connected(2048, 3)


def manual(scripted: ScriptedBroker, **settings: Any) -> MqttTransport:
    """A connected transport with manual acknowledgement."""
    transport = MqttTransport(
        host="127.0.0.1",
        port=scripted.port,
        client_id="one",
        max_back_off_s=1,
        manual_acknowledgement=True,
        session_expiry_s=600,
        **settings,
    )
    transport.open()
    scripted.accept()
    scripted.send(CONNACK)
    await_event(transport, Connected)
    return transport


def test_what_a_session_needs_is_asked_for_and_nothing_of_it_without_one(scripted: ScriptedBroker) -> None:
    flags, properties = 7, slice(10, None)  # behind the protocol's name and version; behind the keepalive
    expiry, receive_maximum = b"\x11\x00\x00\x02\x58", b"\x21\x01\xf4"
    cases: list[tuple[dict[str, Any], bool]] = [({}, True), ({"session_expiry_s": 600, "receive_maximum": 500}, False)]
    for settings, clean in cases:
        transport = MqttTransport(host="127.0.0.1", port=scripted.port, client_id="one", **settings)
        transport.open()
        body = scripted.accept()
        assert bool(body[flags] & 0x02) == clean
        assert (expiry in body[properties], receive_maximum in body[properties]) == (not clean, not clean)
        scripted.hang_up()
        transport.close()


def test_nothing_is_acknowledged_before_it_is_done_with(scripted: ScriptedBroker) -> None:
    transport = manual(scripted)
    scripted.send(b"".join(publish_packet(b"t", b"%d" % number, packet_id=number) for number in (7, 8, 9)))
    came = [await_event(transport, Received) for _ in range(3)]
    scripted.send(bytes([PINGREQ, 0]))
    assert scripted.read_until(PINGRESP) == []
    transport.acknowledge(came[1])
    scripted.send(bytes([PINGREQ, 0]))
    assert scripted.read_until(PINGRESP) == []
    transport.acknowledge(came[0])
    assert [scripted.read_packet() for _ in range(2)] == [(PUBACK, b"\x00\x07"), (PUBACK, b"\x00\x08")]
    transport.close()
    assert scripted.read_until(DISCONNECT) == []


def check_rumqttd_bears_any_order_of_commits(*, num_messages: int = 5) -> None:
    port = free_port()
    stop = start_iotcore(port)
    transport = MqttTransport(host="127.0.0.1", port=port, client_id="one", manual_acknowledgement=True)
    try:
        transport.open()
        await_event(transport, Connected)
        transport.subscribe("t/#")
        for number in range(num_messages):
            transport.publish(f"t/{number}", b"")
        came = [await_event(transport, Received) for _ in range(num_messages)]
        for message in reversed(came):
            transport.acknowledge(message)
        for _ in range(2):  # acknowledgements leave with the next packet at the latest
            transport.publish("t/after", b"")
            assert isinstance(transport.poll(WITHIN_S), Received)
    finally:
        transport.close()
        stop()


def test_rumqttd_bears_any_order_of_commits() -> None:
    check_rumqttd_bears_any_order_of_commits()


def test_acknowledgements_in_the_order_of_commits_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(self: Acknowledgements, delivery: Delivery) -> bool:
        self._order._due.append(delivery.packet_id)
        return len(self._order._due) == 1

    monkeypatch.setattr(Acknowledgements, "settle", settle)
    with pytest.raises(AssertionError):
        check_rumqttd_bears_any_order_of_commits()


def test_an_acknowledgement_wakes_the_network_thread(scripted: ScriptedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paho looks up once a second by itself; here it never would."""
    step = PahoClient._loop
    monkeypatch.setattr(PahoClient, "_loop", lambda self, _timeout=1.0: step(self, 3600.0))
    transport = manual(scripted)
    scripted.send(publish_packet(b"t", b"one", packet_id=1))
    transport.acknowledge(await_event(transport, Received))
    assert scripted.read_packet() == (PUBACK, b"\x00\x01")
    transport.close()


def acknowledged_after_reuse(scripted: ScriptedBroker) -> list[tuple[int, bytes]]:
    """A message is acknowledged again after its packet id went to another message; what the broker hears of that."""
    transport = manual(scripted)
    scripted.send(publish_packet(b"t", b"first", packet_id=7))
    first = await_event(transport, Received)
    transport.acknowledge(first)
    assert scripted.read_packet() == (PUBACK, b"\x00\x07")
    scripted.send(publish_packet(b"t", b"second", packet_id=7))
    await_event(transport, Received)
    transport.acknowledge(first)
    transport.close()
    return scripted.read_until(DISCONNECT)


def test_a_second_acknowledgement_is_not_sent_for_another_message(scripted: ScriptedBroker) -> None:
    assert acknowledged_after_reuse(scripted) == []


def test_a_transport_that_acknowledges_by_packet_id_alone_is_caught(
    scripted: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settle(self: Acknowledgements, delivery: Delivery) -> bool:
        self._order._due.append(delivery.packet_id)
        return True

    monkeypatch.setattr(Acknowledgements, "settle", settle)
    assert acknowledged_after_reuse(scripted) == [(PUBACK, b"\x00\x07")]


def acknowledged_undelivered(scripted: ScriptedBroker) -> list[bytes]:
    """More comes than the queue holds, and a topic that is not UTF-8; the ids that are acknowledged at last."""
    transport = manual(scripted, most_queued_bytes=1000)
    scripted.send(b"".join(publish_packet(b"t", bytes(400), packet_id=number) for number in range(1, 5)))
    scripted.send(publish_packet(b"\xff", b"", packet_id=5))
    scripted.send(bytes([PINGREQ, 0]))
    found = scripted.read_until(PINGRESP)
    for _ in range(2):
        transport.acknowledge(await_event(transport, Received))
    transport.close()
    return [body for _kind, body in found + scripted.read_until(DISCONNECT)]


def test_what_is_dropped_for_a_slow_consumer_is_acknowledged(scripted: ScriptedBroker) -> None:
    """Its sender sends it again; unacknowledged, the window would be narrower for ever."""
    assert acknowledged_undelivered(scripted) == [bytes([0, number]) for number in (1, 2, 3, 4, 5)]


def test_a_transport_that_drops_without_acknowledging_is_caught(
    scripted: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MqttTransport, "_drop", lambda _self, _event: None)
    assert acknowledged_undelivered(scripted) == [b"\x00\x01", b"\x00\x02"]


def sent_unacknowledged(scripted: ScriptedBroker, receive_maximum: int | None) -> int:
    """How many of 30 messages come from a client that may have 20 on their way, and hears nothing of them."""
    transport = MqttTransport(host="127.0.0.1", port=scripted.port, client_id="one", maximum_inflight=20)
    transport.open()
    scripted.accept()
    properties = b"" if receive_maximum is None else b"\x21" + receive_maximum.to_bytes(2, "big")
    scripted.send(bytes([0x20, 3 + len(properties), 0, 0, len(properties)]) + properties)
    await_event(transport, Connected)
    for number in range(30):
        transport.publish("t", b"%d" % number)
    scripted.send(bytes([PINGREQ, 0]))
    found = scripted.read_until(PINGRESP)
    scripted.hang_up()
    transport.close()
    return len(found)


@pytest.mark.parametrize(("receive_maximum", "sent"), [(None, 20), (3, 3), (1, 1), (65535, 20)])
def test_no_more_is_on_its_way_than_the_broker_takes(
    receive_maximum: int | None, sent: int, scripted: ScriptedBroker
) -> None:
    assert sent_unacknowledged(scripted, receive_maximum) == sent


def test_a_transport_that_does_not_hear_the_brokers_maximum_is_caught(
    scripted: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PahoClient, "limit_inflight", lambda _self, _messages: None)
    assert sent_unacknowledged(scripted, 3) == 20


def test_a_maximum_that_paho_takes_for_no_limit_is_refused() -> None:
    with pytest.raises(LocalMisuseError, match="maximum_inflight: expected at least 1, got 0"):
        MqttTransport(host="127.0.0.1", port=1, client_id="one", maximum_inflight=0)


def test_messages_at_qos_2_are_refused(scripted: ScriptedBroker, transport: MqttTransport) -> None:
    """Security: paho would hold 65,535 of them, and nobody here asks for any."""
    transport.open()
    scripted.accept()
    scripted.send(CONNACK)
    await_event(transport, Connected)
    scripted.send(publish_packet(b"t", b"held", packet_id=1, qos=2))
    await_event(transport, Disconnected)


def test_a_client_that_holds_messages_at_qos_2_is_caught(
    scripted: ScriptedBroker, transport: MqttTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(PahoClient, "_handle_publish")
    transport.open()
    scripted.accept()
    scripted.send(CONNACK + publish_packet(b"t", b"held", packet_id=1, qos=2))
    assert scripted.read_packet()[0] == 0x50  # PUBREC: go on
    assert len(transport._client._in_messages) == 1


def test_the_embedded_broker_listens_on_loopback_only() -> None:
    port = free_port()
    stop = start_iotcore(port)
    # Columns of /proc/net/tcp: local address in hexadecimal, little-endian; 0A is LISTEN.
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port]
    stop()
    assert listening == ["0100007F"]


def test_tls_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    missing = TlsFiles(ca=tmp_path / "ca.pem", certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    with pytest.raises(LocalMisuseError, match=r"ca\.pem.*cert\.pem.*key\.pem"):
        MqttTransport(host="127.0.0.1", port=1, client_id="one", tls=missing)


def test_a_host_that_no_resolver_takes_is_refused_at_once() -> None:
    with pytest.raises(LocalMisuseError, match="host: expected"):
        MqttTransport(host="x" * 70 + ".example", port=1883, client_id="one")
