"""What stands before every page and socket of the dashboard: a session, or nothing (ASGI).

Security: a page and its socket belong to one session: a socket is let in only from this origin, with the cookie of the
session that the page was made for, so nobody sees or presses what another one has open. Pages may load scripts, styles
and pictures from this server alone, and of scripts within a page only those that NiceGUI's own template has (by a
nonce). NiceGUI evaluates text that its server sends as code, so `unsafe-eval` stays, and it makes styles at run time.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any, cast
from urllib.parse import parse_qs, quote, urlsplit

from fastapi import Request, Response
from fastapi.responses import RedirectResponse
from nicegui import Client
from starlette.datastructures import Headers, MutableHeaders

from aggregator.api.shield import App, Message, Receive, Send
from aggregator.dashboard.assets import Assets
from aggregator.dashboard.sessions import COOKIE, Session

Scope = MutableMapping[str, Any]
SESSION_KEY, NONCE_KEY = "covey.session", "covey.nonce"
ROOT = "/dashboard"
SIGN_IN = f"{ROOT}/sign-in"
_ASSETS, _SOCKETS = "/_nicegui/", "/_nicegui_ws/"
_REFUSED = 4401
OWN_REFERRER = "same-origin"
"""Without any, browsers would not say which origin a form comes from."""
_INLINE = (  # every script that stands in NiceGUI's template (3.18); others do not run
    '<script type="importmap">',
    "<script>\n      addStyle = ",
    '<script type="module">\n      import * as Vue from "vue";',
    '<script type="module">\n      // Load DOMPurify',
)


class Gate:
    """See the module docstring.

    Args:
        app: the pages.
        admit: the session that a request comes with, or what it is answered in place of a page.
        find: the session of a cookie.
    """

    def __init__(
        self,
        app: App,
        admit: Callable[[Request], Awaitable[Session | Response]],
        find: Callable[[str | None], Session | None],
    ) -> None:
        self._app, self._admit, self._find, self._assets = app, admit, find, Assets(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        # Security: NiceGUI would write these into its pages.
        scope["headers"] = [one for one in scope["headers"] if one[0].lower() != b"x-forwarded-prefix"]
        if scope["type"] == "websocket":
            await self._socket(scope, receive, send, path)
        elif path.startswith(_ASSETS) and scope["method"] in {"GET", "HEAD"}:
            await self._assets(scope, receive, send)
        elif path.startswith(_SOCKETS) or scope["method"] != "GET":
            await Response(status_code=405)(scope, receive, send)
        else:
            found = await self._admit(Request(cast(Any, scope), cast(Any, receive)))
            if isinstance(found, Response):
                await found(cast(Any, scope), cast(Any, receive), cast(Any, send))
                return
            scope[SESSION_KEY], scope[NONCE_KEY] = found, secrets.token_urlsafe(16)
            sends = _with_header(send, "content-security-policy", content_security_policy(scope[NONCE_KEY]))
            await self._app(scope, receive, _with_header(sends, "referrer-policy", OWN_REFERRER))

    async def _socket(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        """Let a page's socket in."""
        session = self._find(cookie_of(scope))
        client = Client.instances.get(_client_id(scope))
        if (
            session is None
            or client is None
            or not path.startswith(_SOCKETS)
            or not is_own_origin(scope)
            or client.request.scope.get(SESSION_KEY) is not session
        ):
            await receive()
            await send({"type": "websocket.close", "code": _REFUSED})
            return
        scope[SESSION_KEY] = session
        await self._app(scope, receive, send)


class Nonces:
    """Marks the scripts of NiceGUI's template as ours; stands within everything that compresses answers.

    Args:
        app: the pages.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        nonce = scope.get(NONCE_KEY)
        if nonce is None or scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start: Message = {}
        parts: list[bytes] = []

        async def gathered(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            parts.append(message.get("body", b""))
            if message.get("more_body", False):
                return
            body = _marked(b"".join(parts), nonce)
            MutableHeaders(raw=start["headers"])["content-length"] = str(len(body))
            await send(start)
            await send({**message, "body": body})

        await self._app(scope, receive, gathered)


def _marked(body: bytes, nonce: str) -> bytes:
    """A page whose own scripts have a nonce, each once: the first of its kind is the template's."""
    for opening in _INLINE:
        tag, _, rest = opening.partition(">")
        body = body.replace(opening.encode(), f'{tag} nonce="{nonce}">{rest}'.encode(), 1)
    return body


def content_security_policy(nonce: str) -> str:
    """What a page may load."""
    return (
        f"default-src 'none'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "connect-src 'self'; img-src 'self' data:; font-src 'self'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    )


def cookie_of(scope: Scope) -> str | None:
    """The session's cookie, untrusted."""
    try:
        found = SimpleCookie(Headers(scope=scope).get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return None if found is None else str(found.value)


def is_own_origin(scope: Scope) -> bool:
    """Whether a browser says that the request comes from a page of this server."""
    headers = Headers(scope=scope)
    return urlsplit(headers.get("origin", "")).netloc == headers.get("host", "")


def to_sign_in(path: str, why: str = "") -> Response:
    """Off to sign in, and back to the page afterwards."""
    return RedirectResponse(f"{SIGN_IN}?why={quote(why)}&next={quote(path)}", status_code=303)


def _client_id(scope: Scope) -> str:
    """Which page a socket says that it belongs to."""
    query: bytes = scope.get("query_string", b"")
    return parse_qs(query.decode("latin-1")).get("client_id", [""])[0]


def _with_header(send: Send, name: str, value: str) -> Send:
    """Answers with one header set."""

    async def sends(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            message["headers"] = [one for one in headers if one[0].decode() != name]
            message["headers"].append((name.encode(), value.encode()))
        await send(message)

    return sends
