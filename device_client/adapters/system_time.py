"""The machine's clock, and a bell to wait on."""

from __future__ import annotations

import threading
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
    """`device_client.ports.Bell` over an event; may be rung from any thread, and from a signal handler."""

    def __init__(self) -> None:
        self._rung = threading.Event()

    def ring(self) -> None:
        """End the wait."""
        self._rung.set()

    def wait(self, timeout_s: float) -> None:
        """Wait for a ring."""
        self._rung.wait(timeout_s)
        self._rung.clear()
