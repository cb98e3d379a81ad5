"""`fl_protocol.transport.Transport` over a simulated radio: connects when there is a link, and says when it does. Pure.

Nothing happens by itself: whoever simulates the device calls `poll` at `next_event_s` at the latest, and everything
that was due by then is caught up in the order of its time. A connection ends with its link; another link is another
address, so the device connects anew (MQTT over TCP knows no roaming). Session state is not kept by the broker (clean
start), as the device's real transport asks for.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from firmware_sim.radio import wire
from firmware_sim.radio.edge import Edge
from firmware_sim.radio.links import LinkModel
from firmware_sim.radio.radio import Radio
from fl_protocol.back_off import BackOff
from fl_protocol.transport import Disconnected, Received, TransportEvent

KEEPALIVE_S = 30.0
"""As `fl_protocol.adapters.mqtt.MqttTransport` has it: so long a silence, and a ping is sent."""
MAX_BACK_OFF_S = 60


class _State(Enum):
    CLOSED = auto()
    WAITING = auto()
    """For a link, or for the next attempt."""
    CONNECTING = auto()
    CONNECTED = auto()


@dataclass
class RadioUse:
    """What a connection took from its device: energy, and bytes on the wire; `metered_bytes` are part of the others."""

    joules: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    metered_bytes: int = 0

    def set_to(self, other: RadioUse) -> None:
        """Be equal to another one."""
        self.joules, self.up_bytes, self.down_bytes = other.joules, other.up_bytes, other.down_bytes
        self.metered_bytes = other.metered_bytes

    def add(self, link: LinkModel | None, joules: float, up_bytes: int, down_bytes: int) -> None:
        """Count what went over a link; without one nothing did."""
        if link is not None:
            self.joules += joules
            self.up_bytes += up_bytes
            self.down_bytes += down_bytes
            if link.metered:
                self.metered_bytes += up_bytes + down_bytes


class RadioTransport:
    """A device's broker connection over its radio; see the module.

    Args:
        radio: the device's; another transport of the same device may share it, and then queues behind this one.
        edge: the broker's side.
        now_s: true virtual Unix seconds, never going back.
        will: topic and payload of the last will.
        keepalive_s: a ping is sent after so long a silence.
        max_back_off_s: longest wait between attempts to connect.
    """

    def __init__(
        self,
        radio: Radio,
        edge: Edge,
        *,
        now_s: Callable[[], float],
        will: tuple[str, bytes] | None = None,
        keepalive_s: float = KEEPALIVE_S,
        max_back_off_s: int = MAX_BACK_OFF_S,
    ) -> None:
        self._radio, self._edge, self._now_s, self._will = radio, edge, now_s, will
        self._keepalive_s = keepalive_s
        self._back_off = BackOff(max_back_off_s)
        self._state, self._due_s = _State.CLOSED, math.inf
        self._link: LinkModel | None = None
        self._quiet_since_s = math.inf
        self._events: list[tuple[float, int, TransportEvent]] = []
        self._count = 0
        self._unacknowledged: deque[float] = deque()
        self._use = RadioUse()

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        self._catch_up()
        return self._state is _State.CONNECTED

    @property
    def use(self) -> RadioUse:
        """What it took from the device until now."""
        now_s = self._catch_up()
        if self._state is _State.CONNECTED:
            self._ping_until(now_s)
        return self._use

    def open(self) -> None:
        """Start connecting."""
        if self._state is _State.CLOSED:
            self._state, self._due_s = _State.WAITING, self._now_s()

    def poll(self, timeout_s: float) -> TransportEvent | None:
        """The next event that has happened by now; never waits, since time is virtual."""
        del timeout_s
        now_s = self._catch_up()
        if self._events and self._events[0][0] <= now_s:
            return heapq.heappop(self._events)[2]
        return None

    def next_event_s(self) -> float:
        """When to poll next, at the latest: something arrives, or the connection may come or go; infinity if never."""
        return min(self._events[0][0] if self._events else math.inf, self._due_s)

    def subscribe(self, topic_filter: str) -> None:
        """Subscribe, once the request is at the broker."""
        sent = self._ask(topic_filter)
        if sent is not None:
            self._edge.subscribe(self, topic_filter, arrives_s=sent)

    def unsubscribe(self, topic_filter: str) -> None:
        """Unsubscribe, once the request is at the broker."""
        sent = self._ask(topic_filter)
        if sent is not None:
            self._edge.unsubscribe(self, topic_filter, arrives_s=sent)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expires_s: int | None = None) -> None:
        """Publish; lost when not connected, or when the link goes down before it has arrived."""
        now_s = self._catch_up()
        if self._state is _State.CONNECTED:
            cost = wire.publish(len(topic.encode()), len(payload), expires=expires_s is not None)
            sent = self._transfer(cost, now_s, up=True)
            self._unacknowledged.append(math.inf if sent is None else sent + self._latency_s)
            if sent is not None:
                self._edge.publish(self, topic, payload, retain=retain, arrives_s=sent)

    def acknowledge(self, message: Received) -> None:
        """Nothing: the broker keeps no session."""

    def backlog(self) -> int:
        """Messages handed over on this connection whose acknowledgement is not back yet."""
        now_s = self._catch_up()
        while self._unacknowledged and self._unacknowledged[0] <= now_s:
            self._unacknowledged.popleft()
        return len(self._unacknowledged)

    def close(self) -> None:
        """Say goodbye, after all that was handed over before it."""
        now_s = self._catch_up()
        if self._state is _State.CONNECTED:
            ends_s = self._due_s
            said = self._transfer(wire.goodbye(), now_s, up=True)
            self._edge.disconnect(self, at_s=ends_s if said is None else said, clean=said is not None)
        self._forget()

    def drop(self, reason: str) -> None:
        """The device dies: no goodbye, and it does not come back by itself."""
        now_s = self._catch_up()
        if self._state is _State.CONNECTED:
            self._ping_until(now_s)
            self._edge.disconnect(self, at_s=now_s, clean=False)
            self._events.clear()
            self._happens(now_s, Disconnected(reason))
        self._forget()

    def deliver(self, topic: str, payload: bytes, sent_s: float) -> None:
        """Called by the edge: a message leaves the broker."""
        if self._state is _State.CONNECTED and sent_s < self._due_s:
            cost = wire.publish(len(topic.encode()), len(payload))
            sent = self._transfer(cost, sent_s, up=False)
            if sent is not None:
                self._happens(sent, Received(topic, payload))

    def cut(self, reason: str, at_s: float) -> None:
        """Called by the edge: the broker ended the connection."""
        if self._state is _State.CONNECTED:
            self._ended(reason, min(at_s, self._due_s))

    def _catch_up(self) -> float:
        """Whatever was due by now, in the order of its time; what time that is."""
        now_s = self._now_s()
        while self._due_s <= now_s:
            if self._state is _State.WAITING:
                self._try(self._due_s)
            elif self._state is _State.CONNECTING:
                self._greet(self._due_s)
            elif self._radio.link_at(self._due_s) == self._link:  # a change that changes nothing
                self._due_s = self._radio.next_change_s(self._due_s)
            else:
                at_s = self._due_s
                self._edge.disconnect(self, at_s=at_s, clean=False)
                self._ended("the link went down", at_s)
        return now_s

    def _try(self, at_s: float) -> None:
        """Begin to connect, or wait for a link."""
        if self._radio.link_at(max(at_s, self._radio.free_s)) is None:
            self._due_s = self._radio.next_change_s(max(at_s, self._radio.free_s))
            return
        cost = wire.set_up()
        transfer = self._radio.connect(cost, at_s)
        self._use.add(transfer.link, transfer.joules, *cost)
        if transfer.arrives_s is None:
            self._ended("the link went down before there was a connection", transfer.free_s)
        else:
            self._state, self._due_s, self._link = _State.CONNECTING, transfer.arrives_s, transfer.link

    def _greet(self, at_s: float) -> None:
        """The connection is set up, if the broker accepts it."""
        accepted = self._edge.connect(self, will=self._will, at_s=at_s)
        if accepted is None:
            self._ended("the broker refused the connection", at_s)
            return
        self._back_off.connected(at_s)
        self._state, self._due_s = _State.CONNECTED, self._radio.next_change_s(at_s)
        self._quiet_since_s = at_s
        self._happens(at_s, accepted)

    def _ended(self, reason: str, at_s: float) -> None:
        """The connection, or the attempt, ended; try again after a while."""
        self._ping_until(at_s)
        # What had not arrived by then never does.
        self._events = [one for one in self._events if one[0] <= at_s]
        heapq.heapify(self._events)
        self._happens(at_s, Disconnected(reason))
        self._forget()
        self._state, self._due_s = _State.WAITING, at_s + self._back_off.ended(at_s)

    def _forget(self) -> None:
        """Be as never connected."""
        self._state, self._due_s, self._quiet_since_s, self._link = _State.CLOSED, math.inf, math.inf, None
        self._unacknowledged.clear()

    def _ask(self, topic_filter: str) -> float | None:
        """Send a request about a filter; when it arrives, or None if it does not."""
        now_s = self._catch_up()
        if self._state is not _State.CONNECTED:
            return None
        return self._transfer(wire.subscribe(len(topic_filter.encode())), now_s, up=True)

    def _transfer(self, cost: wire.WireBytes, at_s: float, *, up: bool) -> float | None:
        """Send or receive on this connection, which ends with its link; when it arrives, or None."""
        self._ping_until(at_s)
        if self._radio.free_s >= self._due_s:
            return None
        transfer = self._radio.send(cost.forth, at_s, up=up, back_bytes=cost.back)
        self._use.add(transfer.link, transfer.joules, *(cost if up else reversed(cost)))
        self._quiet_since_s = max(self._quiet_since_s, transfer.free_s)
        return transfer.arrives_s

    def _ping_until(self, at_s: float) -> None:
        """Catch up on the pings of a silent connection."""
        count = int((at_s - self._quiet_since_s) // self._keepalive_s) if at_s > self._quiet_since_s else 0
        if count and self._link is not None:
            cost = wire.ping()
            self._quiet_since_s += count * self._keepalive_s
            joules = self._radio.pings(count, cost, every_s=self._keepalive_s, last_s=self._quiet_since_s)
            self._use.add(self._link, joules, count * cost.forth, count * cost.back)

    def _happens(self, at_s: float, event: TransportEvent) -> None:
        """Queue an event; those of one moment stay in order."""
        self._count += 1
        heapq.heappush(self._events, (at_s, self._count, event))

    @property
    def _latency_s(self) -> float:
        return self._link.latency_s if self._link is not None else 0.0
