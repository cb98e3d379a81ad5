"""An MQTT broker in memory, for fleets in one process and virtual time: retained messages, wildcards, last wills.

Delivery is immediate and in order; what a real broker may do worse (drop, repeat, reorder) is laid on top by its users.
"""

from __future__ import annotations

from collections import deque

from fl_protocol.transport import Connected, Disconnected, Received, TransportEvent


class VirtualBroker:
    """Routes messages between `VirtualTransport`s."""

    def __init__(self, *, maximum_packet_bytes: int | None = None) -> None:
        self.maximum_packet_bytes = maximum_packet_bytes
        self.retained: dict[str, bytes] = {}
        self._clients: list[VirtualTransport] = []

    def attach(self, client: VirtualTransport) -> None:
        """Accept a connection."""
        self._clients.append(client)

    def detach(self, client: VirtualTransport) -> None:
        """End a connection."""
        if client in self._clients:
            self._clients.remove(client)

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Deliver to every subscriber; keep, or with an empty payload forget, when retained."""
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        for client in list(self._clients):
            client.deliver(topic, payload)

    def restart(self, *, keep_retained: bool) -> None:
        """Cut every connection, as a broker that was killed does; the clients reconnect by themselves."""
        if not keep_retained:
            self.retained.clear()
        for client in list(self._clients):
            client.drop("the broker restarted")
            client.open()


class VirtualTransport:
    """`fl_protocol.transport.Transport` over a `VirtualBroker`."""

    def __init__(self, broker: VirtualBroker, *, will: tuple[str, bytes] | None = None) -> None:
        self._broker = broker
        self._will = will
        self._filters: list[str] = []
        self._events: deque[TransportEvent] = deque()
        self._connected = False

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self._connected

    def open(self) -> None:
        """Connect."""
        if not self._connected:
            self._connected = True
            self._broker.attach(self)
            self._events.append(Connected(self._broker.maximum_packet_bytes))

    def poll(self, timeout_s: float) -> TransportEvent | None:
        """The next event; never waits, since time is virtual."""
        del timeout_s
        return self._events.popleft() if self._events else None

    def subscribe(self, topic_filter: str) -> None:
        """Subscribe; matching retained messages come at once."""
        if not self._connected:
            return
        if topic_filter not in self._filters:
            self._filters.append(topic_filter)
        for topic, payload in list(self._broker.retained.items()):
            if topic_matches(topic_filter, topic):
                self._events.append(Received(topic, payload))

    def unsubscribe(self, topic_filter: str) -> None:
        """Unsubscribe."""
        if topic_filter in self._filters:
            self._filters.remove(topic_filter)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expires_s: int | None = None) -> None:
        """Publish; lost when not connected."""
        del expires_s
        if self._connected:
            self._broker.publish(topic, payload, retain=retain)

    def backlog(self) -> int:
        """Nothing waits: this broker takes every message at once."""
        return 0

    def close(self) -> None:
        """Disconnect cleanly."""
        self._disconnect()

    def drop(self, reason: str) -> None:
        """Lose the connection: undelivered messages are gone and the last will is published."""
        if self._connected:
            self._disconnect()
            self._events.clear()
            self._events.append(Disconnected(reason))
            if self._will is not None:
                self._broker.publish(*self._will, retain=True)

    def deliver(self, topic: str, payload: bytes) -> None:
        """Called by the broker."""
        if any(topic_matches(topic_filter, topic) for topic_filter in self._filters):
            self._events.append(Received(topic, payload))

    def _disconnect(self) -> None:
        """Leave the broker; subscriptions end with the connection (clean start)."""
        self._connected = False
        self._filters.clear()
        self._broker.detach(self)


def topic_matches(topic_filter: str, topic: str) -> bool:
    """Whether an MQTT topic filter matches a topic (MQTT 5, section 4.7)."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    for index, part in enumerate(wanted):
        if part == "#":
            return True
        if index >= len(levels) or part not in {"+", levels[index]}:
            return False
    return len(wanted) == len(levels)
