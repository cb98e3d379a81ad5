"""The machine's clock, and a bell to wait on."""

from __future__ import annotations

import queue
import time


class SystemClock:
    """`device_client.ports.Clock`."""

    def now_s(self) -> float:
        """Unix seconds."""
        return time.time()

    def local_time_s(self) -> float:
        """Seconds since local midnight, by the wall clock."""
        now = time.localtime()
        return float(now.tm_hour * 3600 + now.tm_min * 60 + now.tm_sec)


class SystemBell:
    """`device_client.ports.Bell`; may be rung from any thread, and from a signal handler.

    Over a `queue.SimpleQueue`, whose `put` is documented to be reentrant. `threading.Event.set` is not: a handler that
    runs while its own thread is inside `wait` or `clear` would wait for a lock that this thread holds.
    """

    def __init__(self) -> None:
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        """End the wait."""
        if self._rings.empty():  # one is enough; a daemon that is busy for hours would otherwise collect them
            self._rings.put(None)

    def wait(self, timeout_s: float) -> None:
        """Wait for a ring; all that rang by then count as one."""
        try:
            self._rings.get(timeout=max(0.0, timeout_s))
            for _ in range(self._rings.qsize()):
                self._rings.get_nowait()
        except queue.Empty:
            return
