"""The broker's side of a simulated radio: what a device's connection hands over, and what comes back. Interfaces only.

A shard of a fleet implements `Edge` over its exchange with the hub; `firmware_sim.radio.broker_edge` over a
`VirtualBroker` in the same process. All times are true virtual Unix seconds. Times handed over may lie ahead: what a
radio sends now arrives later, and its sender knows when.
"""

from __future__ import annotations

from typing import Protocol

from fl_protocol.transport import Connected


class EdgeClient(Protocol):
    """A device's end."""

    def deliver(self, topic: str, payload: bytes, sent_s: float) -> None:
        """The broker sent this message to the device at `sent_s`; the device's radio decides when it is there."""

    def cut(self, reason: str, at_s: float) -> None:
        """The broker ended the connection, or died, at `at_s`; the edge has forgotten the client already."""


class Edge(Protocol):
    """The broker's end."""

    def connect(self, client: EdgeClient, *, will: tuple[str, bytes] | None, at_s: float) -> Connected | None:
        """A connection is set up, `at_s` is now or past. None: the broker is not there, or refuses.

        Args:
            client: gets what it subscribes to from now on.
            will: topic and payload, published retained when the connection ends without a goodbye.
            at_s: when.
        """

    def publish(self, client: EdgeClient, topic: str, payload: bytes, *, retain: bool, arrives_s: float) -> None:
        """A message that is at the broker at `arrives_s`, if the client's connection has not ended before."""

    def subscribe(self, client: EdgeClient, topic_filter: str, *, arrives_s: float) -> None:
        """Deliver what matches, retained messages first; doing so again brings the retained ones again."""

    def unsubscribe(self, client: EdgeClient, topic_filter: str, *, arrives_s: float) -> None:
        """Deliver it no more."""

    def disconnect(self, client: EdgeClient, *, at_s: float, clean: bool) -> None:
        """The connection ends at `at_s`, which may lie ahead; what would arrive later never does. Nothing for a client
        that is not connected.

        Args:
            client: is delivered nothing from then on.
            at_s: when.
            clean: it said goodbye; otherwise its last will is published.
        """
