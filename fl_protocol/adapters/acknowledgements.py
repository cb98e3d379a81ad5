"""`AcknowledgementOrder` for any thread, and its acknowledgements as packets."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

from fl_protocol.acknowledgement_order import AcknowledgementOrder
from fl_protocol.transport import Delivery

_PUBACK = 0x40


class Acknowledgements:
    """Of one connection after the other; any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._order = AcknowledgementOrder()

    def arrived(self, packet_id: int) -> Delivery:
        """A message was delivered under this id."""
        with self._lock:
            return self._order.arrived(packet_id)

    def settle(self, delivery: Delivery) -> bool:
        """The message is done with; whether there are acknowledgements to be sent, and were none before."""
        with self._lock:
            return self._order.settle(delivery)

    def hand_over(self, send: Callable[[bytes], object]) -> None:
        """Give `send` the PUBACK packets that are due, as one piece: one system call and one wake-up for all."""
        if self._order.is_due:
            # Under the lock, so that they are on their way before `forget_all` returns, or not at all.
            with self._lock:
                due = self._order.take_due()
                send(b"".join(struct.pack("!BBH", _PUBACK, 2, packet_id) for packet_id in due))

    def forget_all(self) -> None:
        """The connection is over; its packet ids will stand for other messages."""
        with self._lock:
            self._order.forget_all()
