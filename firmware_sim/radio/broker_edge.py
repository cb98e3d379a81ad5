"""`Edge` over a `VirtualBroker` in the same process: what arrives later is kept until its time has come. Pure.

For small fleets without shards. Whoever lets time pass calls `advance`, so that what a sleeping device sent still
arrives.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from firmware_sim.radio.edge import EdgeClient
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from fl_protocol.transport import Connected, Received


class BrokerEdge:
    """`firmware_sim.radio.edge.Edge`.

    Args:
        broker: that everybody is connected to.
        now_s: true virtual Unix seconds.

    Attributes:
        is_up: whether the broker accepts connections; set False to let it be away.
    """

    def __init__(self, broker: VirtualBroker, *, now_s: Callable[[], float]) -> None:
        self._broker, self._now_s = broker, now_s
        self._lines: dict[EdgeClient, _Line] = {}
        self._coming: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._arriving_s: float | None = None
        self.is_up = True

    def next_event_s(self) -> float:
        """When the next thing arrives; infinity if nothing is under way."""
        return self._coming[0][0] if self._coming else math.inf

    def advance(self) -> None:
        """Let everything arrive whose time has come."""
        now_s, outer_s = self._now_s(), self._arriving_s
        while self._coming and self._coming[0][0] <= now_s:
            self._arriving_s, _, arrives = heapq.heappop(self._coming)
            arrives()
        self._arriving_s = outer_s

    def connect(self, client: EdgeClient, *, will: tuple[str, bytes] | None, at_s: float) -> Connected | None:
        """Accept, unless the broker is away."""
        if not self.is_up:
            return None
        line = _Line(self._broker, will, client, self)
        self._lines[client] = line
        line.open()
        return Connected(self._broker.maximum_packet_bytes)

    def publish(self, client: EdgeClient, topic: str, payload: bytes, *, retain: bool, arrives_s: float) -> None:
        """A message that is under way."""
        line = self._lines[client]
        self._later(arrives_s, lambda: line.publish(topic, payload, retain=retain))

    def subscribe(self, client: EdgeClient, topic_filter: str, *, arrives_s: float) -> None:
        """A request that is under way."""
        line = self._lines[client]
        self._later(arrives_s, lambda: line.subscribe(topic_filter))

    def unsubscribe(self, client: EdgeClient, topic_filter: str, *, arrives_s: float) -> None:
        """A request that is under way."""
        line = self._lines[client]
        self._later(arrives_s, lambda: line.unsubscribe(topic_filter))

    def disconnect(self, client: EdgeClient, *, at_s: float, clean: bool) -> None:
        """End a connection; what comes over its line afterwards finds it closed."""
        line = self._lines.pop(client, None)
        if line is not None:
            line.is_over = True
            self._later(at_s, line.close if clean else line.die)

    def lost(self, client: EdgeClient, reason: str) -> None:
        """The broker cut a line off."""
        self._lines.pop(client, None)
        client.cut(reason, self.event_s)

    @property
    def event_s(self) -> float:
        """When what the broker does now happens: with a message that came, or now."""
        return self._now_s() if self._arriving_s is None else self._arriving_s

    def _later(self, at_s: float, arrives: Callable[[], None]) -> None:
        """Let something arrive, at once if its time has come."""
        self._count += 1
        heapq.heappush(self._coming, (at_s, self._count, arrives))
        self.advance()


class _Line(VirtualTransport):
    """One connection, as the broker sees it: its messages go on to the device's radio at once.

    Attributes:
        is_over: the device has ended it, so that it need not be told.
    """

    def __init__(
        self, broker: VirtualBroker, will: tuple[str, bytes] | None, client: EdgeClient, edge: BrokerEdge
    ) -> None:
        super().__init__(broker, will=will)
        self._client, self._edge = client, edge
        self.is_over = self._opened = False

    def open(self) -> None:
        """Connect, once: the device's radio sees to what follows."""
        if not self._opened:
            self._opened = True
            super().open()

    def deliver(self, topic: str, payload: bytes) -> None:
        """Called by the broker."""
        super().deliver(topic, payload)
        self._hand_on()

    def subscribe(self, topic_filter: str) -> None:
        """Subscribe; retained messages go on at once."""
        super().subscribe(topic_filter)
        self._hand_on()

    def die(self) -> None:
        """End without a goodbye."""
        super().drop("the device is gone")

    def drop(self, reason: str) -> None:
        """Called by the broker: it cuts the line off."""
        was_connected = self.is_connected
        super().drop(reason)
        if was_connected and not self.is_over:
            self.is_over = True
            self._edge.lost(self._client, reason)

    def _hand_on(self) -> None:
        """Everything that came, to the device's radio."""
        while (event := self.poll(0.0)) is not None:
            if isinstance(event, Received):
                self._client.deliver(event.topic, event.payload, self._edge.event_s)
