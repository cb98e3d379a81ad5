"""NiceGUI's scripts and styles, kept in memory as they are sent.

Compressing half a megabyte anew for every browser that knows nothing yet took longer than the page itself (about 180 ms
of processor time).
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers

from aggregator.api.shield import App, Message, Receive, Send

_FOR_GOOD = b"public, max-age=31536000, immutable"
"""Assets have their version in their path."""
MOST_BYTES = 32 * 2**20
_ASKED = {b"accept-encoding", b"host"}


class Assets:
    """See the module docstring.

    Args:
        app: answers each asset once.
    """

    def __init__(self, app: App) -> None:
        self._app, self._bytes = app, 0
        self._known: dict[tuple[str, bool], tuple[Message, bytes]] = {}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request for an asset."""
        key = (scope["path"], "gzip" in Headers(scope=scope).get("accept-encoding", ""))
        start, body = self._known.get(key) or await self._ask(scope, receive, key)
        await send({**start, "headers": list(start["headers"])})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _ask(
        self, scope: MutableMapping[str, Any], receive: Receive, key: tuple[str, bool]
    ) -> tuple[Message, bytes]:
        """The whole of an asset, whatever part of it or since when was asked for; kept if there is one."""
        start: Message = {}
        parts: list[bytes] = []

        async def gathered(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                parts.append(message.get("body", b""))

        headers = [one for one in scope["headers"] if one[0].lower() in _ASKED]
        await self._app({**scope, "method": "GET", "headers": headers, "query_string": b""}, receive, gathered)
        body = b"".join(parts)
        if start["status"] == 200:
            start["headers"] = [one for one in start["headers"] if one[0] != b"cache-control"]
            start["headers"].append((b"cache-control", _FOR_GOOD))
            if self._bytes + len(body) <= MOST_BYTES:
                self._bytes += len(body)
                self._known[key] = (start, body)
        return start, body
