"""A TCP proxy on loopback that counts what a device sends and receives: TLS records and all, without TCP's headers.

It looks at no byte, so it serves MQTT and HTTP alike. Frames are passed on as they come, with TCP_NODELAY.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass
from types import TracebackType

HOST = "127.0.0.1"
_PIECE_BYTES = 65536


@dataclass(frozen=True)
class Traffic:
    """Bytes that the device sent (`up_bytes`) and received (`down_bytes`), and connections it made."""

    up_bytes: int = 0
    down_bytes: int = 0
    connections: int = 0

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(
            self.up_bytes - earlier.up_bytes,
            self.down_bytes - earlier.down_bytes,
            self.connections - earlier.connections,
        )


class CountingProxy:
    """Accepts on a free port and passes everything on to `port`, both on loopback; a context manager."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._traffic = Traffic()
        self._open: list[socket.socket] = []

    def traffic(self) -> Traffic:
        """Counted so far; a byte is counted before it is passed on."""
        with self._lock:
            return self._traffic

    def __enter__(self) -> CountingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            sockets = [self._listener, *self._open]
        for each in sockets:
            with contextlib.suppress(OSError):  # wakes the thread that waits on it
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        """Serve connections until the listener is closed."""
        with contextlib.suppress(OSError):
            while True:
                device, _ = self._listener.accept()
                try:
                    server = socket.create_connection((HOST, self._target))
                except OSError:  # the server is not there: the device sees a closed connection, as it would without us
                    device.close()
                    continue
                self._count(connections=1)
                with self._lock:
                    self._open += [device, server]
                for each in (device, server):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pump, args=(device, server, "up"), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, device, "down"), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        """One direction of one connection, until either end closes it."""
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE_BYTES):
                if direction == "up":
                    self._count(up=len(piece))
                else:
                    self._count(down=len(piece))
                sink.sendall(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _count(self, *, up: int = 0, down: int = 0, connections: int = 0) -> None:
        with self._lock:
            now = self._traffic
            self._traffic = Traffic(now.up_bytes + up, now.down_bytes + down, now.connections + connections)
