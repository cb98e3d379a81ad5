"""The HTTP API over a seeded study, served on loopback; and one request to it, whatever its answer."""

from __future__ import annotations

import http.client
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.accounts.verification import TokenVerifier
from aggregator.api.application import make_api
from aggregator.api.audit_book import AuditBook
from aggregator.api.guard import ApiServices, RequestLimits
from aggregator.api.metrics import ApiMetrics
from aggregator.api.privacy_book import PrivacyBook
from aggregator.api.round_book import RoundBook
from aggregator.api.shield import Shield
from aggregator.api_client import ApiClient
from tests.aggregator.api.seeded_study import NOW_S, SeededStudy

MANY = 1_000_000
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes([5]) * 32)


@dataclass
class Told:
    """A journal that keeps what it is told."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def write(self, event: str, /, *, at_s: float, **fields: Any) -> None:
        assert at_s > 0
        self.events.append((event, fields))


@dataclass
class Desk:
    """The parts of an API whose clock stands still until it is set."""

    study: SeededStudy
    limits: tuple[int, int, int] = (MANY, MANY, MANY)
    now_s: float = NOW_S

    def __post_init__(self) -> None:
        self.journal, self.metrics = Told(), ApiMetrics()
        per_token, per_address, guesses = self.limits
        self.services = ApiServices(
            store=self.study.store,
            tenant="clinic",
            accounts=self.study.accounts,
            verifier=TokenVerifier(self.study.accounts, now_s=lambda: self.now_s, entropy=os.urandom),
            limits=RequestLimits(per_token=per_token, per_address=per_address, guesses=guesses),
            privacy=PrivacyBook(self.study.store),
            rounds=RoundBook(self.study.store),
            audit=AuditBook(
                self.study.store.database,
                tenant="clinic",
                aggregator=SIGNER.public_key(),
                helpers={},
                now_s=lambda: self.now_s,
            ),
            journal=self.journal,
            now_s=lambda: self.now_s,
            monotonic_s=time.monotonic,
            sleep=time.sleep,
            entropy=os.urandom,
            order_patience_s=0.0,
        )

    def api(self) -> Shield:
        return make_api(self.services, counted=self.metrics)


@dataclass
class Served:
    """Where an API listens."""

    desk: Desk
    port: int

    def client(self, token: str) -> ApiClient:
        return ApiClient(f"http://127.0.0.1:{self.port}", token)

    def ask(
        self,
        method: str,
        path: str,
        *,
        token: str | None = None,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and decoded body."""
        given = dict(headers or {})
        if token is not None:
            given["Authorization"] = f"Bearer {token}"
        raw = body if isinstance(body, (bytes, type(None))) else msgspec.json.encode(body)
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request(method, path, raw, given)
            response = connection.getresponse()
            data = response.read()
        found = {name.lower(): value for name, value in response.headers.items()}
        return response.status, found, msgspec.json.decode(data) if data else None


@contextmanager
def served(desk: Desk, api: Shield | None = None) -> Iterator[Served]:
    """Serve from a thread until left."""
    config = uvicorn.Config(
        api or desk.api(), port=0, lifespan="off", log_config=None, http="h11", ws="none", server_header=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(desk, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
