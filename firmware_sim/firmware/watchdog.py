"""A hardware watchdog: who does not feed it for its timeout is reset. Pure: time is what the clock says."""

from __future__ import annotations

from collections.abc import Callable

from fl_protocol.errors import LocalMisuseError


class HardwareWatchdog:
    """`device_client.ports.Watchdog` that resets the device.

    Args:
        timeout_s: above 0.
        now_s: true virtual Unix seconds: a watchdog has an oscillator of its own.
    """

    def __init__(self, timeout_s: float, *, now_s: Callable[[], float]) -> None:
        if not timeout_s > 0:
            raise LocalMisuseError(f"timeout_s: expected above 0, got {timeout_s!r}")
        self._timeout_s, self._now_s = timeout_s, now_s
        self._fed_s = now_s()

    @property
    def longest_wait_s(self) -> float:
        """Half the timeout, as systemd asks of who is watched (sd_watchdog_enabled(3))."""
        return self._timeout_s / 2

    def alive(self, status: str) -> None:
        """Feed it."""
        del status
        self._fed_s = self._now_s()

    @property
    def bites_s(self) -> float:
        """When it resets the device, unless it is fed before."""
        return self._fed_s + self._timeout_s
