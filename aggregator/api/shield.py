"""What surrounds every request: its length is limited, its answer has security headers, and it is counted (ASGI).

A body is read whole, up to the limit, before anything else happens: routes decode it from memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from aggregator.api.problems import ProblemError, problem

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MOST_BODY_BYTES = 64 * 1024
BODY_KEY = "covey.body"
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_OVER_TLS = {"strict-transport-security": "max-age=31536000"}


class Counted(Protocol):
    """Where requests are counted."""

    def answered(self, *, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered."""


class Shield:
    """See the module docstring.

    Args:
        app: what is shielded.
        counted: where requests are counted; None for nowhere.
        monotonic_s: seconds that no clock setting moves.
    """

    def __init__(self, app: App, *, counted: Counted | None, monotonic_s: Callable[[], float]) -> None:
        self._app, self._counted, self._monotonic_s = app, counted, monotonic_s

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, status = self._monotonic_s(), 0

        async def sends(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_security_headers(scope, message)]
            await send(message)

        try:
            await self._limited(scope, receive, sends)
        finally:
            if self._counted is not None:
                route = getattr(scope.get("route"), "path", "none")
                seconds = self._monotonic_s() - began_s
                self._counted.answered(route=route, method=_method(scope), status=status, seconds=seconds)

    async def _limited(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve a request that is not too long."""
        body = await _body(scope, receive)
        if body is None:
            detail = f"expected at most {MOST_BODY_BYTES} bytes; send less"
            await problem(ProblemError(413, "too_long", detail))(scope, receive, send)
            return
        scope[BODY_KEY], is_told = body, False

        async def again() -> Message:
            nonlocal is_told
            if is_told:
                return await receive()
            is_told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)


async def _body(scope: MutableMapping[str, Any], receive: Receive) -> bytes | None:
    """A request's body; None if it is too long."""
    told = dict(scope["headers"]).get(b"content-length", b"0")
    if not told.isdigit() or int(told[:20]) > MOST_BODY_BYTES:
        return None
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MOST_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _security_headers(scope: MutableMapping[str, Any], message: Message) -> list[tuple[bytes, bytes]]:
    """Those that an answer does not set itself."""
    there = {name.lower() for name, _ in message.get("headers", ())}
    wanted = {**_HEADERS, **(_OVER_TLS if scope.get("scheme") == "https" else {})}
    return [(name.encode(), value.encode()) for name, value in wanted.items() if name.encode() not in there]


def _method(scope: MutableMapping[str, Any]) -> str:
    """One of the methods that there are: what a client makes up becomes no label."""
    method = str(scope["method"])
    return method if method in {"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"} else "other"
