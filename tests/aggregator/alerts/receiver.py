"""A webhook's receiver on loopback: takes messages, or answers as it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from aggregator.alerts.signature import is_signed


@dataclass
class Receiver:
    """What came, and what is answered.

    Args:
        answers: statuses, one after the other, then 200; 0 hangs up without an answer.
    """

    key: bytes
    now_s: float
    port: int = 0
    answers: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    taken: list[dict[str, Any]] = field(default_factory=list)
    signed: list[bool] = field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        return [one["id"] for one in self.taken]


@contextmanager
def receiving(key: bytes, now_s: float) -> Iterator[Receiver]:
    """Listen until left."""
    found = Receiver(key, now_s)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            found.paths.append(self.path)
            found.signed.append(is_signed(headers, body, key=found.key, now_s=found.now_s))
            status = found.answers.pop(0) if found.answers else 200
            if status == 0:
                self.close_connection = True
                return
            if status == 200:
                found.taken.append(msgspec.json.decode(body))
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", f"http://127.0.0.1:{found.port}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
