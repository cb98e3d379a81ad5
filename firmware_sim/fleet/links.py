"""How a device's messages get to the broker and back: the `Transport` of a device in a fleet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import simpy

from firmware_sim.fleet.edge import Edge
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.fleet.windows import Upload
from fl_protocol.transport import Connected, Disconnected, Received, TransportEvent


class Line(Protocol):
    """What a message costs on its way."""

    def up_s(self, num_bytes: int) -> float:
        """Seconds until a message that is sent now arrives at the broker."""

    def down_s(self, num_bytes: int) -> float:
        """Seconds until one that leaves the broker now arrives at the device."""


class SteadyLine:
    """A line that is always up, of one latency and bandwidth.

    Args:
        latency_s: one way.
        bytes_per_s: each way.
    """

    def __init__(self, *, latency_s: float = 0.05, bytes_per_s: float = 1e6) -> None:
        self._latency_s, self._bytes_per_s = latency_s, bytes_per_s

    def up_s(self, num_bytes: int) -> float:
        """Latency, and the time that its bytes take."""
        return self._latency_s + num_bytes / self._bytes_per_s

    def down_s(self, num_bytes: int) -> float:
        """As `up_s`."""
        return self.up_s(num_bytes)


class FleetTransport:
    """`fl_protocol.transport.Transport` between a device and its shard's edge.

    Args:
        environment: of the shard; its time is seconds since the fleet's beginning.
        edge: of the shard.
        record: the device's, whose messages are counted.
        line: what messages cost.
        wake: rings the device's bell.
    """

    def __init__(
        self,
        environment: simpy.Environment,
        edge: Edge,
        record: DeviceRecord,
        line: Line,
        wake: Callable[[], None],
    ) -> None:
        self._environment, self._edge, self._record, self._line, self._wake = environment, edge, record, line, wake
        self._inbox: deque[TransportEvent] = deque()
        self._filters: set[str] = set()
        self._connected = False
        self._sent_until_s = self._received_until_s = 0.0

    def open(self) -> None:
        """Connect."""
        if not self._connected:
            self._connected = True
            self._inbox.append(Connected())

    def poll(self, timeout_s: float) -> TransportEvent | None:
        """The next event that has arrived; never waits, since time is virtual."""
        del timeout_s
        return self._inbox.popleft() if self._inbox else None

    def subscribe(self, topic_filter: str) -> None:
        """Ask for a topic filter's messages."""
        if self._connected:
            self._filters.add(topic_filter)
            self._edge.subscribe(self._record.name, topic_filter, self._deliver)

    def unsubscribe(self, topic_filter: str) -> None:
        """Stop asking for it."""
        self._filters.discard(topic_filter)
        self._edge.unsubscribe(self._record.name, topic_filter)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expires_s: int | None = None) -> None:
        """Send; lost when not connected. A device's presence goes no further than the broker."""
        del expires_s
        if not self._connected:
            return
        now_s = self._environment.now
        self._sent_until_s = max(self._sent_until_s, now_s) + self._line.up_s(len(payload)) - self._line.up_s(0)
        self._record.sent += 1
        self._record.bytes_up += len(payload)
        if not retain:
            arrives_s = self._sent_until_s + self._line.up_s(0)
            self._edge.publish(Upload(arrives_s, self._record.name, self._record.sent, topic, payload))

    def acknowledge(self, message: Received) -> None:
        """Nothing: this broker forgets what it has delivered."""

    def backlog(self) -> int:
        """Nothing waits for an acknowledgement."""
        return 0

    def close(self) -> None:
        """Disconnect."""
        for topic_filter in self._filters:
            self._edge.unsubscribe(self._record.name, topic_filter)
        self._filters.clear()
        self._connected = False

    def drop(self, reason: str) -> None:
        """Lose the connection."""
        if self._connected:
            self.close()
            self._inbox.clear()
            self._inbox.append(Disconnected(reason))
            self._wake()

    def _deliver(self, topic: str, payload: bytes) -> None:
        """A message leaves the broker for this device."""
        now_s = self._environment.now
        begins_s = max(self._received_until_s, now_s)
        self._received_until_s = begins_s + self._line.down_s(len(payload)) - self._line.down_s(0)
        arrival = self._environment.timeout(self._received_until_s + self._line.down_s(0) - now_s)
        arrival.callbacks.append(lambda _event: self._arrived(topic, payload))

    def _arrived(self, topic: str, payload: bytes) -> None:
        """It is here, unless the connection was lost meanwhile."""
        if self._connected:
            self._record.bytes_down += len(payload)
            self._inbox.append(Received(topic, payload))
            self._wake()
