"""Serves the HTTP API: TLS 1.3 with a certificate, or plain HTTP on loopback, behind a proxy there (uvicorn)."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path

import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from fastapi import FastAPI

from aggregator.accounts.account_store import Accounts
from aggregator.accounts.verification import TokenVerifier
from aggregator.adapters.prometheus import serve_metrics
from aggregator.api.application import make_api
from aggregator.api.audit_book import AuditBook
from aggregator.api.guard import ApiServices, RequestLimits
from aggregator.api.metrics import ApiMetrics
from aggregator.api.privacy_book import PrivacyBook
from aggregator.api.round_book import RoundBook
from aggregator.api.shield import Shield
from aggregator.config import ApiSection
from aggregator.errors import AggregatorError
from aggregator.record_privacy import load_accounting
from aggregator.store.aggregator_store import AggregatorStore
from fl_protocol.adapters.config_files import relative_to_config
from fl_protocol.adapters.journal import Journal
from fl_protocol.errors import ConfigError
from fl_protocol.signing import public_key_from_hex

_BACKLOG = 256
_LOOK_S = 0.1
_LONGEST_MESSAGE_BYTES = 64 * 1024
_MOST_AT_ONCE = 256
"""Connections; more are told to come again."""


def services_for(
    store: AggregatorStore,
    section: ApiSection,
    *,
    tenant: str,
    journal: Journal,
    helpers: Mapping[str, Ed25519PublicKey],
) -> ApiServices:
    """What the routes work with, with this machine's clock and randomness. Raises LocalMisuseError: a key is none."""
    accounts = Accounts(store.database)
    key = None if section.aggregator_key is None else public_key_from_hex(section.aggregator_key)
    return ApiServices(
        store=store,
        tenant=tenant,
        accounts=accounts,
        verifier=TokenVerifier(accounts, now_s=time.time, entropy=os.urandom),
        limits=RequestLimits(
            per_token=section.requests_a_minute,
            per_address=section.address_requests_a_minute,
            guesses=section.unknown_tokens_a_minute,
        ),
        privacy=PrivacyBook(store),
        rounds=RoundBook(store),
        audit=AuditBook(store.database, tenant=tenant, aggregator=key, helpers=helpers, now_s=time.time),
        journal=journal,
        now_s=time.time,
        monotonic_s=time.monotonic,
        sleep=time.sleep,
        entropy=os.urandom,
    )


def serve(
    store: AggregatorStore,
    section: ApiSection,
    *,
    tenant: str,
    config: Path,
    journal: Journal,
    helpers: Mapping[str, Ed25519PublicKey],
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        store: the database.
        section: where, and with which files.
        tenant: name on the wire.
        config: path of the configuration file, which the files are beside.
        journal: where events are told.
        helpers: keys of those that co-sign the audit log, by name.

    Raises:
        ConfigError: the certificate or its key cannot be used.
        AggregatorError: the address cannot be listened on, or dp-accounting is not installed.
    """
    load_accounting()
    metrics = ApiMetrics()
    services = services_for(store, section, tenant=tenant, journal=journal, helpers=helpers)
    extend = _dashboard(services, section, metrics) if section.dashboard else None
    api = make_api(services, counted=metrics, extend=extend)
    server = uvicorn.Server(_config(api, section, config))
    port = section.metrics_port
    scraped = closing(serve_metrics(metrics.registry, port)) if port is not None else nullcontext()
    with scraped, closing(_listener(section)) as listener:
        where = f"{section.host}:{listener.getsockname()[1]}"
        journal.write("started", at_s=time.time(), api=where, tls=section.certificate is not None)
        _run(server, listener)
    journal.write("stopped", at_s=time.time())


def _dashboard(services: ApiServices, section: ApiSection, metrics: ApiMetrics) -> Callable[[FastAPI], None]:
    """What adds the dashboard to the API. Raises ConfigError: it is not installed."""
    try:
        from aggregator.dashboard.mounting import mount_dashboard  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise ConfigError(f"the dashboard needs pip install 'covey[dashboard]' ({error})") from error
    joules = section.joules_per_update
    return lambda api: mount_dashboard(api, services, counted=metrics, joules_per_update=joules)


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve from a thread, where uvicorn leaves signals alone: in the main one it would end the process by them."""
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, _frame: stop.append(signum))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="api", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_LOOK_S)
        server.should_exit = bool(stop)


def _listener(section: ApiSection) -> socket.socket:
    """A socket that takes connections from now on. Raises AggregatorError."""
    family = socket.AF_INET6 if ":" in section.host else socket.AF_INET
    try:
        return socket.create_server((section.host, section.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise AggregatorError(
            f"api: {section.host}:{section.port} cannot be listened on ({error.strerror}); choose another port"
        ) from error


def _config(api: Shield, section: ApiSection, config: Path) -> uvicorn.Config:
    """How uvicorn listens. Raises ConfigError."""
    certificate = key = None
    if section.certificate is not None and section.key is not None:
        certificate, key = (relative_to_config(config, name) for name in (section.certificate, section.key))
    made = uvicorn.Config(
        api,
        host=section.host,
        port=section.port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        http="h11",
        ws="websockets-sansio" if section.dashboard else "none",
        ws_max_size=_LONGEST_MESSAGE_BYTES,
        lifespan="on" if section.dashboard else "off",
        server_header=False,
        access_log=False,
        log_config=None,
        # Security: only a proxy on this machine says where requests come from.
        proxy_headers=certificate is None,
        forwarded_allow_ips="127.0.0.1,::1",
        limit_concurrency=_MOST_AT_ONCE,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )
    try:
        made.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"configuration {config}: api: expected PEM files at {certificate} and {key}; {error}"
        ) from error
    if made.ssl is not None:
        made.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    return made
