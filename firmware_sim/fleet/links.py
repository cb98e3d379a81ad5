"""A device's connection to its shard's edge: over a simulated radio, or over a line that is always there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import simpy

from firmware_sim.fleet.edge import ShardEdge
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.radio.edge import Edge
from firmware_sim.radio.radio import Radio
from firmware_sim.radio.transport import RadioTransport
from fl_protocol.transport import Disconnected, Received, TransportEvent

LATENCY_S = 0.05
"""One way, of a steady line."""
BYTES_PER_S = 1e6
"""Each way, of a steady line."""


class FleetRadio(RadioTransport):
    """A radio's connection that wakes its device when something is there.

    Args:
        radio: the device's.
        edge: of the shard, or around it.
        now_s: true Unix seconds.
        record: the device's, whose messages are counted.
        due: told of the Unix second at which the device has to look at the connection again.
    """

    def __init__(
        self,
        radio: Radio,
        edge: Edge,
        *,
        now_s: Callable[[], float],
        record: DeviceRecord,
        due: Callable[[float], None],
    ) -> None:
        super().__init__(radio, edge, now_s=now_s)
        self._record, self._due = record, due

    @property
    def name(self) -> str:
        """The device's name on the wire."""
        return self._record.name

    def next_number(self) -> int:
        """Of the next message that the device sends."""
        self._record.sent += 1
        return self._record.sent

    def deliver(self, topic: str, payload: bytes, sent_s: float) -> None:
        """A message leaves the broker."""
        super().deliver(topic, payload, sent_s)
        self._due(self.next_event_s())

    def cut(self, reason: str, at_s: float) -> None:
        """The broker ended the connection."""
        super().cut(reason, at_s)
        self._due(self.next_event_s())


class SteadyLine:
    """`fl_protocol.transport.Transport` over a line that is always up, of one latency and bandwidth, and costs nothing.

    Args:
        environment: of the shard; its time is seconds since the fleet's beginning.
        edge: of the shard.
        began_s: Unix seconds of that beginning.
        record: the device's, whose messages are counted.
        wake: rings the device's bell.
    """

    def __init__(
        self,
        environment: simpy.Environment,
        edge: ShardEdge,
        *,
        began_s: float,
        record: DeviceRecord,
        wake: Callable[[], None],
    ) -> None:
        self._environment, self._edge, self._began_s = environment, edge, began_s
        self._record, self._wake = record, wake
        self._inbox: deque[TransportEvent] = deque()
        self._connected = self._is_over = False
        self._sent_until_s = self._received_until_s = 0.0

    @property
    def name(self) -> str:
        """The device's name on the wire."""
        return self._record.name

    def next_number(self) -> int:
        """Of the next message that the device sends."""
        self._record.sent += 1
        return self._record.sent

    def open(self) -> None:
        """Connect."""
        if not (self._connected or self._is_over):
            accepted = self._edge.connect(self, will=None, at_s=self._now_s())
            self._connected = accepted is not None
            self._inbox.append(accepted if accepted is not None else Disconnected("the broker is down"))
            self._wake()
            if accepted is None:
                self._later(5.0, self.open)

    def poll(self, timeout_s: float) -> TransportEvent | None:
        """The next event that has arrived; never waits, since time is virtual."""
        del timeout_s
        return self._inbox.popleft() if self._inbox else None

    def subscribe(self, topic_filter: str) -> None:
        """Ask for a topic filter's messages."""
        if self._connected:
            self._edge.subscribe(self, topic_filter, arrives_s=self._now_s())

    def unsubscribe(self, topic_filter: str) -> None:
        """Stop asking for it."""
        self._edge.unsubscribe(self, topic_filter, arrives_s=self._now_s())

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expires_s: int | None = None) -> None:
        """Send; lost when not connected."""
        del expires_s
        if self._connected:
            self._sent_until_s = max(self._sent_until_s, self._now_s()) + len(payload) / BYTES_PER_S
            self._record.bytes_up += len(payload)
            self._edge.publish(self, topic, payload, retain=retain, arrives_s=self._sent_until_s + LATENCY_S)

    def acknowledge(self, message: Received) -> None:
        """Nothing: this broker forgets what it has delivered."""

    def backlog(self) -> int:
        """Nothing waits for an acknowledgement."""
        return 0

    def close(self) -> None:
        """Disconnect, once everything has arrived."""
        self._is_over = True
        if self._connected:
            self._connected = False
            self._edge.disconnect(self, at_s=max(self._sent_until_s, self._now_s()) + LATENCY_S, clean=True)

    def deliver(self, topic: str, payload: bytes, sent_s: float) -> None:
        """A message leaves the broker for this device."""
        begins_s = max(self._received_until_s, sent_s)
        self._received_until_s = begins_s + len(payload) / BYTES_PER_S
        delay_s = self._received_until_s + LATENCY_S - self._now_s()
        self._later(delay_s, lambda: self._arrived(topic, payload))

    def cut(self, reason: str, at_s: float) -> None:
        """The broker ended the connection; try again a little later."""
        del at_s
        if self._connected:
            self._connected = False
            self._inbox.append(Disconnected(reason))
            self._wake()
            self._later(5.0, self.open)

    def _arrived(self, topic: str, payload: bytes) -> None:
        """It is here, unless the connection was lost meanwhile."""
        if self._connected:
            self._record.bytes_down += len(payload)
            self._inbox.append(Received(topic, payload))
            self._wake()

    def _now_s(self) -> float:
        return self._began_s + float(self._environment.now)

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do something when some time has passed."""

        def act(_event: simpy.Event) -> None:
            action()

        self._environment.timeout(delay_s).callbacks.append(act)
