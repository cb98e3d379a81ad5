"""An MQTT broker in memory, for fleets in one process and virtual time: retained messages, wildcards, last wills,
sessions.

Delivery is immediate and in order; what a real broker may do worse (drop, repeat, reorder) is laid on top by its users.
A session that is kept does not expire: there is no clock here.
"""

from __future__ import annotations

import heapq
import itertools
import pickle
from collections import deque

from fl_protocol.acknowledgement_order import AcknowledgementOrder
from fl_protocol.transport import Connected, Disconnected, Received, TransportEvent


class VirtualBroker:
    """Routes messages between `VirtualTransport`s."""

    def __init__(self, *, maximum_packet_bytes: int | None = None) -> None:
        self.maximum_packet_bytes = maximum_packet_bytes
        self.retained: dict[str, bytes] = {}
        self.is_down = False
        self._clients: list[VirtualTransport] = []
        self._waiting: list[VirtualTransport] = []
        self._sessions: dict[str, VirtualSession] = {}

    def attach(self, client: VirtualTransport, session_name: str | None) -> VirtualSession | None:
        """Accept a connection; the session kept under that name, if any. Another client under it is cut off."""
        if session_name is not None:
            for other in [one for one in self._clients if one.session_name == session_name]:
                other.drop("another client took the session over")
        self._clients.append(client)
        return None if session_name is None else self._sessions.get(session_name)

    def keep(self, session_name: str, session: VirtualSession) -> None:
        """Remember a session while its client is away."""
        self._sessions[session_name] = session

    def detach(self, client: VirtualTransport) -> None:
        """End a connection."""
        for clients in (self._clients, self._waiting):
            if client in clients:
                clients.remove(client)

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Deliver to every subscriber, or to its session; keep, or with an empty payload forget, when retained.

        A broker that is down does nothing, with last wills too.
        """
        if self.is_down:
            return
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        present = {client.session_name for client in self._clients}
        for name, session in self._sessions.items():
            if name not in present:
                session.offer(topic, payload)
        for client in list(self._clients):
            client.deliver(topic, payload)

    def kept_state(self) -> bytes:
        """What it keeps while nobody is connected, for `restore` of another one in the same program."""
        return pickle.dumps((self.retained, self._sessions))

    def restore(self, state: bytes) -> None:
        """Go on from what another one has kept. Only of bytes that this program has written: they are a pickle."""
        self.retained, self._sessions = pickle.loads(state)  # noqa: S301 - see above

    def go_down(self, *, keep_retained: bool, keep_sessions: bool) -> None:
        """Cut every connection and accept none, until `come_up`; the clients then come back by themselves."""
        self.is_down = True
        self._forget(keep_retained=keep_retained, keep_sessions=keep_sessions)
        for client in list(self._clients):
            client.drop("the broker is down")
            self.wait(client)

    def come_up(self) -> None:
        """Accept connections again."""
        self.is_down = False
        waiting, self._waiting = self._waiting, []
        for client in waiting:
            client.open()

    def wait(self, client: VirtualTransport) -> None:
        """Have a client connected once the broker is there again."""
        if client not in self._waiting:
            self._waiting.append(client)

    def restart(self, *, keep_retained: bool, keep_sessions: bool = False) -> None:
        """Cut every connection, as a broker that was killed does; the clients reconnect by themselves."""
        self._forget(keep_retained=keep_retained, keep_sessions=keep_sessions)
        for client in list(self._clients):
            client.drop("the broker restarted")
            client.open()

    def _forget(self, *, keep_retained: bool, keep_sessions: bool) -> None:
        """Forget what a broker that dies does not keep."""
        if not keep_retained:
            self.retained.clear()
        if not keep_sessions:
            self._sessions.clear()


class VirtualSession:
    """What a broker knows of one client: its subscriptions, and the messages it has not acknowledged.

    Args:
        receive_maximum: most messages delivered and not acknowledged.
    """

    def __init__(self, receive_maximum: int) -> None:
        self._receive_maximum = receive_maximum
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._unacknowledged: dict[int, tuple[str, bytes]] = {}
        self._free_ids: list[int] = []
        # By what comes before their first wildcard: an ingest worker has 64 filters, and each message matches one.
        self._filters: dict[str, list[str]] = {}

    @property
    def filters(self) -> list[str]:
        """What is subscribed to."""
        return [topic_filter for filters in self._filters.values() for topic_filter in filters]

    def subscribe(self, topic_filter: str) -> None:
        """Add a subscription, if there is none."""
        filters = self._filters.setdefault(_before_wildcards(topic_filter), [])
        if topic_filter not in filters:
            filters.append(topic_filter)

    def unsubscribe(self, topic_filter: str) -> None:
        """Take a subscription away, if there is one."""
        filters = self._filters.get(_before_wildcards(topic_filter), [])
        if topic_filter in filters:
            filters.remove(topic_filter)

    def offer(self, topic: str, payload: bytes) -> None:
        """Line a message up, if it was subscribed to."""
        levels = topic.split("/")
        for count in range(len(levels) + 1):
            for topic_filter in self._filters.get("/".join(levels[:count]), ()):
                if topic_matches(topic_filter, topic):
                    self.line_up(topic, payload)
                    return

    def line_up(self, topic: str, payload: bytes) -> None:
        """Line a message up."""
        self._waiting.append((topic, payload))

    def next_delivery(self) -> tuple[int, str, bytes] | None:
        """(packet id, topic, payload) to deliver now, if the client may have another."""
        if not self._waiting or len(self._unacknowledged) >= self._receive_maximum:
            return None
        # The lowest free one: ids are used again at once, so that a client that mixes them up shows it.
        packet_id = heapq.heappop(self._free_ids) if self._free_ids else len(self._unacknowledged) + 1
        self._unacknowledged[packet_id] = self._waiting.popleft()
        return packet_id, *self._unacknowledged[packet_id]

    def acknowledged(self, packet_id: int) -> None:
        """Forget a message."""
        if self._unacknowledged.pop(packet_id, None) is not None:
            heapq.heappush(self._free_ids, packet_id)

    def interrupted(self) -> None:
        """The connection is over: what was not acknowledged is to be delivered again, before everything else."""
        self._waiting.extendleft(reversed(self._unacknowledged.values()))
        self._unacknowledged.clear()
        self._free_ids.clear()


class VirtualTransport:
    """`fl_protocol.transport.Transport` over a `VirtualBroker`.

    Args:
        broker: to connect to.
        will: topic and payload of the last will.
        session: name (client id) under which the broker keeps the session while the client is away; None for a clean
            start each time.
        manual_acknowledgement: what was received stays the broker's until `acknowledge`.
        receive_maximum: with manual acknowledgement, most unacknowledged messages.
    """

    def __init__(
        self,
        broker: VirtualBroker,
        *,
        will: tuple[str, bytes] | None = None,
        session: str | None = None,
        manual_acknowledgement: bool = False,
        receive_maximum: int = 1000,
    ) -> None:
        self._broker = broker
        self._will = will
        self.session_name = session
        self._manual, self._receive_maximum = manual_acknowledgement, receive_maximum
        self._session = VirtualSession(receive_maximum)
        self._events: deque[TransportEvent] = deque()
        self._unacknowledged = AcknowledgementOrder()
        self._connected = False

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self._connected

    @property
    def has_events(self) -> bool:
        """Whether `poll` has something to give."""
        return bool(self._events)

    def open(self) -> None:
        """Connect."""
        if self._broker.is_down:
            self._broker.wait(self)
        elif not self._connected:
            kept = self._broker.attach(self, self.session_name)
            self._connected = True
            self._session = kept if kept is not None else VirtualSession(self._receive_maximum)
            if self.session_name is not None:
                self._broker.keep(self.session_name, self._session)
            self._events.append(Connected(self._broker.maximum_packet_bytes, session_present=kept is not None))
            self._take_deliveries()

    def poll(self, timeout_s: float) -> TransportEvent | None:
        """The next event; never waits, since time is virtual."""
        del timeout_s
        return self._events.popleft() if self._events else None

    def subscribe(self, topic_filter: str) -> None:
        """Subscribe; matching retained messages come at once."""
        if not self._connected:
            return
        self._session.subscribe(topic_filter)
        for topic, payload in list(self._broker.retained.items()):
            if topic_matches(topic_filter, topic):
                self._session.line_up(topic, payload)
        self._take_deliveries()

    def unsubscribe(self, topic_filter: str) -> None:
        """Unsubscribe."""
        if self._connected:
            self._session.unsubscribe(topic_filter)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expires_s: int | None = None) -> None:
        """Publish; lost when not connected."""
        del expires_s
        if self._connected:
            self._broker.publish(topic, payload, retain=retain)

    def acknowledge(self, message: Received) -> None:
        """Let the broker forget a message of this connection, and those that waited for it."""
        if message.delivery is not None and self._unacknowledged.settle(message.delivery):
            for packet_id in self._unacknowledged.take_due():
                self._session.acknowledged(packet_id)
            self._take_deliveries()

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
        self._session.offer(topic, payload)
        self._take_deliveries()

    def _take_deliveries(self) -> None:
        """Take what the broker may deliver now."""
        while (delivered := self._session.next_delivery()) is not None:
            packet_id, topic, payload = delivered
            if self._manual:
                self._events.append(Received(topic, payload, self._unacknowledged.arrived(packet_id)))
            else:
                self._session.acknowledged(packet_id)
                self._events.append(Received(topic, payload))

    def _disconnect(self) -> None:
        """Leave the broker; a session that is not kept ends with the connection."""
        self._connected = False
        self._unacknowledged.forget_all()
        self._session.interrupted()
        if self.session_name is None:
            self._session = VirtualSession(self._receive_maximum)
        self._broker.detach(self)


def _before_wildcards(topic_filter: str) -> str:
    """The levels of a filter before the first that is a wildcard."""
    levels = topic_filter.split("/")
    return "/".join(itertools.takewhile(lambda level: level not in {"+", "#"}, levels))


def topic_matches(topic_filter: str, topic: str) -> bool:
    """Whether an MQTT topic filter matches a topic (MQTT 5, section 4.7)."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    for index, part in enumerate(wanted):
        if part == "#":
            return True
        if index >= len(levels) or part not in {"+", levels[index]}:
            return False
    return len(wanted) == len(levels)
