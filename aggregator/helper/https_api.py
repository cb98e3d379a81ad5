"""Requests over HTTPS: TLS 1.3, and only for clients with a certificate of the pinned CA (FastAPI and uvicorn).

    POST /v1/unmask        body: a signed `UnmaskRequestMsg`; 200 with a signed `MaskSumMsg`, 409 with a signed
                           `UnmaskRefusalMsg`, 400 for what is ignored, 413 for what is too long, 503 for come again
    POST /v1/cosign        the same with `CosignRequestMsg`, `CosignatureMsg` and `CosignRefusalMsg`
    POST /v1/revocations   the same with `RevokedDevicesMsg` and `RevocationsKeptMsg`; it is never refused
    GET  /v1/key/{tenant}  the signed `HelperKeyMsg`, 404 for a study that is not configured
    GET  /healthz          200 while there is a key that rounds may use

The same `Answerer` as over MQTT: a round that was answered there gets the same bytes here.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

from aggregator.errors import AggregatorError, DatabaseError
from aggregator.helper.answerer import Answerer
from aggregator.helper.answering import IgnoredError, tenant_named_in
from aggregator.helper.config import HttpsSection
from aggregator.helper.cosigning import named_cosign_request
from aggregator.helper.key_ring import KeyRing
from aggregator.helper.revocations import named_revocations
from fl_protocol.adapters.config_files import relative_to_config
from fl_protocol.errors import ConfigError
from fl_protocol.limits import MAX_TRANSFER_BYTES

_MESSAGE = "application/octet-stream"
_BACKLOG = 64
_AT_ONCE = 4
"""Requests that are held in memory at a time; others are told to come again."""


def make_api(answerer: Answerer, *, keys: KeyRing, tenants: Collection[str], now_s: Callable[[], float]) -> FastAPI:
    """The paths of the module docstring.

    Args:
        answerer: what answers.
        keys: whose announcement is told.
        tenants: studies that are configured.
        now_s: Unix seconds.
    """
    # Security: no pages about itself.
    api = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    room = threading.Semaphore(_AT_ONCE)

    @api.post("/v1/unmask")
    @api.post("/v1/cosign")
    @api.post("/v1/revocations")
    async def answer(request: Request) -> Response:
        if not room.acquire(blocking=False):
            return _told(503, "too many requests at once; come again")
        try:
            data = await _body(request)
            return _told(413, "the request is too long") if data is None else await run_in_threadpool(_answer, data)
        finally:
            room.release()

    def _answer(data: bytes) -> Response:
        aside = named_cosign_request(data) or named_revocations(data)
        try:
            reply = answerer.answer(aside.tenant if aside is not None else tenant_named_in(data), data)
        except IgnoredError as error:
            return _told(400, str(error))
        except DatabaseError:
            return _told(503, "the store fails; come again")
        return Response(reply.data, 200 if reply.is_answer else 409, media_type=_MESSAGE)

    @api.get("/v1/key/{tenant}")
    def key(tenant: str) -> Response:
        if tenant not in tenants or keys.announcement is None:
            return _told(404, "no such study, or no key yet")
        return Response(keys.announcement, media_type=_MESSAGE)

    @api.get("/healthz")
    def healthz() -> Response:
        is_well = keys.announcement is not None and now_s() < keys.not_after_s
        return _told(200, "ok") if is_well else _told(503, "there is no key that rounds may use")

    return api


@contextmanager
def serve_https(api: FastAPI, section: HttpsSection, config: Path) -> Iterator[None]:
    """Serve from a thread of its own until left.

    Args:
        api: from `make_api`.
        section: where, and with which files.
        config: path of the configuration file, which the files are beside.

    Raises:
        ConfigError: the files cannot be used.
        AggregatorError: the address cannot be listened on.
    """
    server = uvicorn.Server(_config(api, section, config))
    # Bound here: uvicorn would end its thread without a word where the address is taken.
    with closing(_listener(section)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="https", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.should_exit = True
            thread.join()


def _listener(section: HttpsSection) -> socket.socket:
    """A socket that takes connections from now on. Raises AggregatorError."""
    family = socket.AF_INET6 if ":" in section.host else socket.AF_INET
    try:
        return socket.create_server((section.host, section.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise AggregatorError(
            f"https: {section.host}:{section.port} cannot be listened on ({error.strerror}); choose another port"
        ) from error


def _config(api: FastAPI, section: HttpsSection, config: Path) -> uvicorn.Config:
    """How uvicorn listens."""
    certificate, key, client_ca = (
        relative_to_config(config, name) for name in (section.certificate, section.key, section.client_ca)
    )
    made = uvicorn.Config(
        api,
        host=section.host,
        port=section.port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        ssl_ca_certs=str(client_ca),
        ssl_cert_reqs=ssl.CERT_REQUIRED,
        http="h11",
        ws="none",
        lifespan="off",
        server_header=False,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=5,
    )
    try:
        made.load()
        if made.ssl is None:
            raise ConfigError("https: TLS is not set up")
        made.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"configuration {config}: https: expected PEM files at {certificate}, {key} and {client_ca}; {error}"
        ) from error
    return made


async def _body(request: Request) -> bytes | None:
    """A request's body; None if it is longer than any request may be."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_TRANSFER_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


def _told(status: int, text: str) -> Response:
    """A few words."""
    return Response(text, status, media_type="text/plain")
