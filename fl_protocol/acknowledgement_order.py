"""Acknowledgements go out in the order in which messages came (MQTT 5, section 4.6), whatever is done with first. Pure.

Batches are committed in another order; rumqttd ends a connection that acknowledges in it. So a message that is done
with waits for all before it. Whoever holds one for long holds all behind it, until the broker sends no more (its
ReceiveMaximum is the bound), and has to give up the oldest in time (`aggregator.transfers.HeldMessages`).
"""

from __future__ import annotations

from collections import OrderedDict

from fl_protocol.transport import Delivery


class AcknowledgementOrder:
    """Of one connection after the other.

    Packet ids are used again (section 2.2.1): an acknowledgement that came too late, or twice, would make the broker
    forget another message. So each goes by its delivery, and nothing outlives its connection.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[int, Delivery] = OrderedDict()
        self._settled: set[int] = set()
        self._due: list[int] = []

    def __len__(self) -> int:
        """How many messages the broker still has to remember, those left out whose acknowledgement is due."""
        return len(self._waiting)

    @property
    def is_due(self) -> bool:
        """Whether `take_due` has something to give."""
        return bool(self._due)

    def arrived(self, packet_id: int) -> Delivery:
        """A message was delivered under this id."""
        # An id that was not free is a fault of the broker's; the older message is never acknowledged.
        self._waiting[packet_id] = delivery = Delivery(packet_id)
        self._waiting.move_to_end(packet_id)
        self._settled.discard(packet_id)
        return delivery

    def settle(self, delivery: Delivery) -> bool:
        """The message is done with; whether there are acknowledgements to be sent, and were none before."""
        if self._waiting.get(delivery.packet_id) is not delivery:
            return False
        self._settled.add(delivery.packet_id)
        had_none = not self._due
        while self._waiting and (first := next(iter(self._waiting))) in self._settled:
            del self._waiting[first]
            self._settled.remove(first)
            self._due.append(first)
        return had_none and bool(self._due)

    def take_due(self) -> list[int]:
        """Packet ids to be acknowledged now, in order."""
        due, self._due = self._due, []
        return due

    def forget_all(self) -> None:
        """The connection is over; its packet ids will stand for other messages."""
        self._waiting.clear()
        self._settled.clear()
        self._due.clear()
