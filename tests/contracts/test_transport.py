"""What `fl_protocol.transport.Transport` promises, run over the virtual broker (also behind a
simulated radio), mosquitto and iotcore alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from firmware_sim.virtual_broker import VirtualTransport
from fl_protocol.adapters import paho_client
from fl_protocol.adapters.acknowledgements import Acknowledgements
from fl_protocol.limits import MAX_PACKET_BYTES
from fl_protocol.transport import Connected, Delivery, Disconnected, Received, Transport, TransportEvent
from tests.contracts.brokers import (
    WITHIN_S,
    BrokerUnderTest,
    Real,
    Virtual,
    VirtualOverRadio,
    await_event,
    find_mosquitto,
    start_iotcore,
    start_mosquitto,
)


def _make(kind: str, folder: Path) -> BrokerUnderTest:
    if kind == "virtual":
        return Virtual()
    if kind == "radio":
        return VirtualOverRadio()
    if kind == "iotcore":
        return Real(start_iotcore)
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    return Real(start_mosquitto(folder))


@pytest.fixture(params=["virtual", "radio", "mosquitto", "iotcore"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerUnderTest]:
    broker = _make(request.param, tmp_path)
    yield broker
    broker.stop()


def _connected(broker: BrokerUnderTest, name: str, *, will: tuple[str, bytes] | None = None) -> Transport:
    transport = broker.client(name, will=will)
    transport.open()
    await_event(transport, Connected)
    return transport


def _drain_until(transport: Transport, marker: str) -> list[Received]:
    """What comes before the message on the topic `marker`, so that absence is seen without waiting for it."""
    before = []
    while (message := await_event(transport, Received)).topic != marker:
        before.append(message)
    return before


def _subscribed(transport: Transport, *filters: str) -> None:
    """Subscribe, and wait until the broker has taken it: what is published next is delivered."""
    for topic_filter in (*filters, "t/ready"):
        transport.subscribe(topic_filter)
    # Brokers handle one client's packets in order.
    transport.publish("t/ready", b"ready")
    _drain_until(transport, "t/ready")
    transport.unsubscribe("t/ready")


def test_opening_gives_a_connected_event(broker: BrokerUnderTest) -> None:
    transport = broker.client("one")
    assert transport.poll(0.0) is None
    transport.open()
    assert isinstance(transport.poll(20.0), Connected)
    transport.close()


def test_a_message_reaches_its_subscriber_byte_for_byte(broker: BrokerUnderTest) -> None:
    sender, receiver = _connected(broker, "sender"), _connected(broker, "receiver")
    _subscribed(receiver, "t/wanted")
    payload = bytes(range(256))
    sender.publish("t/unwanted", b"no")
    sender.publish("t/wanted", payload, expires_s=60)
    assert await_event(receiver, Received) == Received("t/wanted", payload)


def test_messages_of_one_sender_come_in_order(broker: BrokerUnderTest) -> None:
    sender, receiver = _connected(broker, "sender"), _connected(broker, "receiver")
    _subscribed(receiver, "t/count")
    for number in range(100):
        sender.publish("t/count", str(number).encode())
    assert [int(await_event(receiver, Received).payload) for _ in range(100)] == list(range(100))


def test_a_message_as_large_as_we_send_passes(broker: BrokerUnderTest) -> None:
    sender, receiver = _connected(broker, "sender"), _connected(broker, "receiver")
    _subscribed(receiver, "t/large")
    payload = bytes(MAX_PACKET_BYTES)
    sender.publish("t/large", payload)
    assert await_event(receiver, Received) == Received("t/large", payload)


def test_a_plus_matches_exactly_one_level(broker: BrokerUnderTest) -> None:
    sender, receiver = _connected(broker, "sender"), _connected(broker, "receiver")
    _subscribed(receiver, "t/+/end")
    for topic in ("t/end", "t/a/b/end", "t/a/end/b", "t/a/end"):
        sender.publish(topic, topic.encode())
    assert _drain_until(receiver, "t/a/end") == []


def test_a_retained_message_is_delivered_to_a_later_subscriber(broker: BrokerUnderTest) -> None:
    sender, receiver = _connected(broker, "sender"), _connected(broker, "receiver")
    _subscribed(sender)
    sender.publish("t/kept/1", b"old", retain=True)
    sender.publish("t/kept/1", b"new", retain=True)
    sender.publish("t/kept/2", b"other", retain=True)
    sender.publish("t/kept/3", b"not kept")
    _subscribed(sender)
    receiver.subscribe("t/kept/+")
    came = {await_event(receiver, Received) for _ in range(2)}
    assert came == {Received("t/kept/1", b"new"), Received("t/kept/2", b"other")}
    sender.publish("t/kept/end", b"")
    assert _drain_until(receiver, "t/kept/end") == []


def test_subscribing_again_brings_retained_messages_again(broker: BrokerUnderTest) -> None:
    sender, receiver = _connected(broker, "sender"), _connected(broker, "receiver")
    sender.publish("t/kept/1", b"kept", retain=True)
    _subscribed(sender)
    for _ in range(3):
        receiver.subscribe("t/kept/+")
        assert await_event(receiver, Received) == Received("t/kept/1", b"kept")


def test_an_empty_payload_makes_the_broker_forget_a_retained_message(broker: BrokerUnderTest) -> None:
    sender, receiver = _connected(broker, "sender"), _connected(broker, "receiver")
    sender.publish("t/kept/1", b"first", retain=True)
    sender.publish("t/kept/2", b"second", retain=True)
    sender.publish("t/kept/1", b"", retain=True)
    _subscribed(sender)
    receiver.subscribe("t/kept/+")
    assert await_event(receiver, Received) == Received("t/kept/2", b"second")
    sender.publish("t/kept/end", b"")
    assert _drain_until(receiver, "t/kept/end") == []


def test_unsubscribing_stops_delivery(broker: BrokerUnderTest) -> None:
    sender, receiver = _connected(broker, "sender"), _connected(broker, "receiver")
    _subscribed(receiver, "t/a", "t/b")
    receiver.unsubscribe("t/a")
    _subscribed(receiver)
    sender.publish("t/a", b"no")
    sender.publish("t/b", b"yes")
    assert await_event(receiver, Received) == Received("t/b", b"yes")


def test_a_client_that_dies_leaves_its_last_will_retained(broker: BrokerUnderTest) -> None:
    watcher = _connected(broker, "watcher")
    _subscribed(watcher, "t/state/+")
    broker.die("dying", will=("t/state/dying", b"offline"))
    assert await_event(watcher, Received) == Received("t/state/dying", b"offline")
    late = _connected(broker, "late")
    late.subscribe("t/state/+")
    assert await_event(late, Received) == Received("t/state/dying", b"offline")


def test_a_client_that_says_goodbye_leaves_no_last_will(broker: BrokerUnderTest) -> None:
    watcher = _connected(broker, "watcher")
    _subscribed(watcher, "t/state/+")
    polite = _connected(broker, "polite", will=("t/state/polite", b"offline"))
    polite.publish("t/state/polite", b"gone home")
    assert await_event(watcher, Received) == Received("t/state/polite", b"gone home")
    polite.close()
    broker.die("dying", will=("t/state/dying", b"offline"))
    assert _drain_until(watcher, "t/state/dying") == []


def test_after_a_broker_restart_a_client_is_told_reconnects_and_can_work_again(broker: BrokerUnderTest) -> None:
    transport = _connected(broker, "survivor")
    _subscribed(transport, "t/before")
    broker.restart()
    await_event(transport, Disconnected)
    await_event(transport, Connected)
    _subscribed(transport, "t/after")
    transport.publish("t/before", b"subscriptions ended with the connection")
    transport.publish("t/after", b"works")
    assert await_event(transport, Received) == Received("t/after", b"works")


def test_what_is_published_while_not_connected_never_comes(broker: BrokerUnderTest) -> None:
    receiver = _connected(broker, "receiver")
    _subscribed(receiver, "t/late")
    sender = broker.client("sender")
    sender.publish("t/late", b"before opening")
    sender.open()
    await_event(sender, Connected)
    sender.publish("t/late", b"connected")
    assert await_event(receiver, Received) == Received("t/late", b"connected")


# Sessions and manual acknowledgement. iotcore keeps no sessions for MQTT 5 clients.


@pytest.fixture(params=["virtual", "mosquitto"])
def keeping(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerUnderTest]:
    broker = _make(request.param, tmp_path)
    yield broker
    broker.stop()


def _worker(broker: BrokerUnderTest, *, receive_maximum: int = 1000, present: bool | None = None) -> Transport:
    """The worker, connected; `present`: whether the broker must (not) have known it."""
    transport = broker.worker("worker", receive_maximum=receive_maximum)
    transport.open()
    connected = await_event(transport, Connected)
    assert present in {None, connected.session_present}
    return transport


def _answered(transport: Transport) -> list[Received]:
    """What came before the broker answered a publish of now: brokers handle one client's packets in order."""
    transport.publish("t/void", b"")
    came: list[TransportEvent | None] = []
    ends_s = time.monotonic() + WITHIN_S
    while transport.backlog():
        assert time.monotonic() < ends_s, "the broker does not answer"
        came.append(transport.poll(0.01))
    while (event := transport.poll(0.0)) is not None:
        came.append(event)
    return [event for event in came if isinstance(event, Received)]


def _settled(worker: Transport) -> None:
    """Wait until the broker has every acknowledgement: they leave with the next packet at the latest."""
    for _ in range(2):
        assert _answered(worker) == []


def _subscribed_worker(broker: BrokerUnderTest, *, receive_maximum: int = 1000) -> Transport:
    """A new worker whose subscription to `t/up` is in force."""
    worker = _worker(broker, receive_maximum=receive_maximum, present=False)
    worker.subscribe("t/up")
    assert _answered(worker) == []
    return worker


def _next(transport: Transport, count: int) -> list[Received]:
    return [await_event(transport, Received) for _ in range(count)]


def _numbers(messages: list[Received]) -> list[int]:
    return [int(message.payload) for message in messages]


def _send(broker: BrokerUnderTest, numbers: range) -> None:
    """Publish numbers, and wait until the broker has them."""
    sender = _connected(broker, "sender")
    for number in numbers:
        sender.publish("t/up", str(number).encode())
    _answered(sender)
    sender.close()


def test_a_killed_worker_s_successor_gets_what_was_not_acknowledged_and_nothing_else(keeping: BrokerUnderTest) -> None:
    worker = _subscribed_worker(keeping)
    _send(keeping, range(6))
    came = _next(worker, 6)
    assert _numbers(came) == list(range(6))
    for index in (4, 1, 0):  # in any order, as batches are committed; the one that 4 waits for is not
        worker.acknowledge(came[index])
    _settled(worker)
    keeping.kill(worker)
    _send(keeping, range(6, 8))
    successor = _worker(keeping, present=True)
    assert _numbers(_next(successor, 6)) == [2, 3, 4, 5, 6, 7]
    assert _answered(successor) == []


def test_a_worker_that_acknowledges_before_it_commits_is_caught() -> None:
    """What the transport does by itself where acknowledgement is not manual: a killed aggregator would lose them."""
    broker = Virtual()
    worker = VirtualTransport(broker._broker, session="worker")
    worker.open()
    worker.subscribe("t/up")
    _send(broker, range(3))
    worker.drop("killed")
    assert _answered(_worker(broker, present=True)) == []


def test_a_connection_that_dies_brings_the_unacknowledged_again_without_subscribing(keeping: BrokerUnderTest) -> None:
    worker = _subscribed_worker(keeping)
    _send(keeping, range(3))
    _next(worker, 3)
    keeping.cut(worker)
    assert await_event(worker, Connected).session_present
    assert _numbers(_next(worker, 3)) == [0, 1, 2]
    _send(keeping, range(3, 4))
    assert _numbers(_next(worker, 1)) == [3]


def test_a_worker_that_goes_home_sends_its_last_acknowledgements_and_is_remembered(keeping: BrokerUnderTest) -> None:
    worker = _subscribed_worker(keeping)
    _send(keeping, range(2))
    worker.acknowledge(_next(worker, 2)[0])
    worker.close()
    _send(keeping, range(2, 3))
    assert _numbers(_next(_worker(keeping, present=True), 2)) == [1, 2]


def test_a_client_without_a_session_is_not_remembered(keeping: BrokerUnderTest) -> None:
    for _ in range(2):
        client = keeping.client("one")
        client.open()
        assert not await_event(client, Connected).session_present
        client.subscribe("t/up")
        assert _answered(client) == []
        keeping.kill(client)
        _send(keeping, range(1))


def test_no_more_is_under_way_than_the_receive_maximum_until_something_is_acknowledged(
    keeping: BrokerUnderTest,
) -> None:
    worker = _subscribed_worker(keeping, receive_maximum=3)
    _send(keeping, range(6))
    came = _next(worker, 3)
    assert _answered(worker) == []
    worker.acknowledge(came[1])
    assert _answered(worker) == []  # it waits for the one before it (MQTT 5, section 4.6)
    worker.acknowledge(came[0])
    assert _numbers(_next(worker, 2)) == [3, 4]


def test_acknowledging_twice_is_acknowledging_once(keeping: BrokerUnderTest) -> None:
    worker = _subscribed_worker(keeping)
    _send(keeping, range(1))
    (first,) = _next(worker, 1)
    worker.acknowledge(first)
    _settled(worker)
    _send(keeping, range(1, 2))
    _next(worker, 1)
    worker.acknowledge(first)
    _settled(worker)
    keeping.kill(worker)
    assert _numbers(_next(_worker(keeping, present=True), 1)) == [1]


def _acknowledge_late(broker: BrokerUnderTest) -> list[int]:
    """A message of before a broker's restart is acknowledged after it; what a successor gets of the one after it."""
    worker = _subscribed_worker(broker)
    _send(broker, range(1))
    (old,) = _next(worker, 1)
    broker.restart()  # it forgets the session, and begins with its packet ids again
    assert not await_event(worker, Connected).session_present
    worker.subscribe("t/up")
    assert _answered(worker) == []
    _send(broker, range(1, 2))
    _next(worker, 1)
    worker.acknowledge(old)
    _settled(worker)
    broker.kill(worker)
    return _numbers(_answered(_worker(broker, present=True)))


def test_a_late_acknowledgement_makes_the_broker_forget_no_other_message(keeping: BrokerUnderTest) -> None:
    """Durability: packet ids are used again, after a restart from the first one on."""
    assert _acknowledge_late(keeping) == [1]


class _ByPacketIdAlone(Acknowledgements):
    def settle(self, delivery: Delivery) -> bool:
        self._order._due.append(delivery.packet_id)
        return True


class _VirtualByPacketIdAlone(VirtualTransport):
    def acknowledge(self, message: Received) -> None:
        assert message.delivery is not None
        self._session.acknowledged(message.delivery.packet_id)


def test_a_client_that_acknowledges_by_packet_id_alone_is_caught(
    keeping: BrokerUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paho_client, "Acknowledgements", _ByPacketIdAlone)
    monkeypatch.setattr(Virtual, "kind", _VirtualByPacketIdAlone)
    assert _acknowledge_late(keeping) == []


@pytest.mark.parametrize("kind", ["virtual", "mosquitto"])
def test_the_servers_packet_limit_is_handed_up(kind: str, tmp_path: Path) -> None:
    if kind == "virtual":
        broker: BrokerUnderTest = Virtual(maximum_packet_bytes=50_000)
    elif find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    else:
        broker = Real(start_mosquitto(tmp_path, "max_packet_size 50000"))
    transport = broker.client("one")
    transport.open()
    connected = await_event(transport, Connected)
    assert isinstance(connected, Connected)
    assert connected.maximum_packet_bytes == 50_000
    broker.stop()
