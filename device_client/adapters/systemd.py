"""Telling systemd that the daemon lives (sd_notify(3)): a datagram to the socket it names; without one, nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

_LONGEST_WAIT_S = 60.0


class Systemd:
    """`device_client.ports.Watchdog` for a unit of type ``notify``.

    Args:
        environment: where ``NOTIFY_SOCKET`` and ``WATCHDOG_USEC`` stand; the process's own by default.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        found = os.environ if environment is None else environment
        self._address = found.get("NOTIFY_SOCKET", "")
        timeout_s = int(found.get("WATCHDOG_USEC", "0") or 0) / 1e6
        # Half the time that systemd waits, as it recommends itself (sd_watchdog_enabled(3)).
        self._longest_wait_s = min(_LONGEST_WAIT_S, timeout_s / 2) if timeout_s > 0 else _LONGEST_WAIT_S
        self._ready = False
        self._status = ""

    @property
    def longest_wait_s(self) -> float:
        """How long the daemon may be silent, seconds."""
        return self._longest_wait_s

    def alive(self, status: str) -> None:
        """Say that the daemon lives, and once that it is ready; a status only when it has changed."""
        lines = ["WATCHDOG=1"]
        if not self._ready:
            lines.insert(0, "READY=1")
        if status != self._status:
            # A line break would begin another assignment.
            lines.append("STATUS=" + " ".join(status.split())[:500])
        self._ready, self._status = True, status
        self._send("\n".join(lines))

    def stopping(self) -> None:
        """Say that the daemon ends because it was asked to."""
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        """One datagram; a systemd that does not listen stops no daemon."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.sendto(text.encode(), address)
        except OSError:
            return
