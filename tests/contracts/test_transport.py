"""What `fl_protocol.transport.Transport` promises, run over the virtual broker, mosquitto and iotcore alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_protocol.limits import MAX_PACKET_BYTES
from fl_protocol.transport import Connected, Disconnected, Received, Transport
from tests.contracts.brokers import (
    BrokerUnderTest,
    Real,
    Virtual,
    await_event,
    find_mosquitto,
    start_iotcore,
    start_mosquitto,
)


def _make(kind: str, folder: Path) -> BrokerUnderTest:
    if kind == "virtual":
        return Virtual()
    if kind == "iotcore":
        return Real(start_iotcore)
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    return Real(start_mosquitto(folder))


@pytest.fixture(params=["virtual", "mosquitto", "iotcore"])
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
