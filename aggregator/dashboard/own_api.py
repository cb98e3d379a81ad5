"""The API's own routes, asked within the process: how the dashboard acts, and reads what is somebody's.

A request goes through everything that one from outside goes through (token, scope, limits, journal, audit), so a button
can do nothing that its user's token cannot, whatever its page shows.
"""

from __future__ import annotations

from typing import Any, TypeVar
from urllib.parse import urlencode

import httpx
import msgspec

from aggregator.api.answers import Problem
from aggregator.api.shield import App
from aggregator.api_client import ApiProblemError

T = TypeVar("T")
_HOST = "http://dashboard"


class OwnApi:
    """See the module docstring.

    Args:
        app: the API, shielded.
    """

    def __init__(self, app: App) -> None:
        self._app: Any = app

    async def get(
        self, path: str, kind: type[T], *, secret: str, address: str, query: dict[str, str | int | None] | None = None
    ) -> T:
        """What a route answers; as `ask`."""
        chosen = {name: value for name, value in (query or {}).items() if value not in {None, ""}}
        return await self.ask("GET", f"{path}?{urlencode(chosen)}", kind, secret=secret, address=address)

    async def ask(
        self,
        method: str,
        path: str,
        kind: type[T],
        *,
        secret: str,
        address: str,
        body: object = None,
        etag: str | None = None,
    ) -> T:
        """Ask a route.

        Args:
            method: of HTTP.
            path: with its query.
            kind: of the answer.
            secret: access token of who asks.
            address: where they are.
            body: what the route is told; None for nothing.
            etag: what the decision was made on; None if that does not matter.

        Raises:
            ApiProblemError: it was not carried out.
        """
        headers = {"Authorization": f"Bearer {secret}"} | ({} if etag is None else {"If-Match": f'"{etag}"'})
        content = b"" if body is None else msgspec.json.encode(body)
        request = httpx.Request(method, _HOST + path, headers=headers, content=content)
        transport = httpx.ASGITransport(app=self._app, client=(address, 0))
        response = await transport.handle_async_request(request)
        data = await response.aread()
        if response.is_success:
            return msgspec.json.decode(data, type=kind)
        told = response.headers.get("Retry-After")
        problem = msgspec.json.decode(data, type=Problem)
        raise ApiProblemError(response.status_code, problem, None if told is None else float(told))
