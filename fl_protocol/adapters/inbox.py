"""What a connection's network thread hands to the thread that consumes it, with a bound on number and bytes."""

from __future__ import annotations

import threading
from collections import deque

from fl_protocol.transport import Received, TransportEvent


class Inbox:
    """Events in order; one thread puts, one takes.

    Every message passes here, so there is one lock for both bounds: `queue.Queue` with a count of bytes beside it took
    half as long again for each.

    Args:
        most_events: that are held.
        most_bytes: payload bytes that are held.
        room_wait_s: how long a message waits for room.
    """

    def __init__(self, *, most_events: int, most_bytes: int, room_wait_s: float) -> None:
        self._most_events, self._most_bytes, self._room_wait_s = most_events, most_bytes, room_wait_s
        self._events: deque[TransportEvent] = deque()
        self._bytes = 0
        lock = threading.Lock()
        self._came, self._left = threading.Condition(lock), threading.Condition(lock)

    def put(self, event: TransportEvent) -> TransportEvent | None:
        """Add an event; what had to be dropped for want of room: a message itself, or the oldest for another event."""
        dropped: TransportEvent | None = None
        with self._came:
            if isinstance(event, Received):
                size = len(event.payload)
                if not self._has_room(size) and not self._left.wait_for(
                    lambda: self._has_room(size), self._room_wait_s
                ):
                    return event
                self._bytes += size
            elif len(self._events) >= self._most_events:
                dropped = self._pop()  # a lost Connected would not come again
            self._events.append(event)
            self._came.notify()
        return dropped

    def take(self, timeout_s: float) -> TransportEvent | None:
        """The oldest event, or None after `timeout_s`."""
        with self._came:
            if not self._events and (timeout_s <= 0 or not self._came.wait_for(lambda: self._events, timeout_s)):
                return None
            self._left.notify()
            return self._pop()

    def _has_room(self, num_bytes: int) -> bool:
        return len(self._events) < self._most_events and self._bytes + num_bytes <= self._most_bytes

    def _pop(self) -> TransportEvent:
        event = self._events.popleft()
        if isinstance(event, Received):
            self._bytes -= len(event.payload)
        return event
