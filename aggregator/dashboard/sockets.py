"""What a page's socket may say: only things about pages of its own session.

Security: NiceGUI takes the name of the page from each message; whoever knew another's, 122 random bits, could press its
buttons. Here that is refused as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from nicegui import Client, core

from aggregator.dashboard.gate import SESSION_KEY

_MESSAGES = ("handshake", "event", "javascript_response", "ack", "log")


def guard_messages() -> None:
    """Have every message checked; once in a process."""
    handlers = core.sio.handlers["/"]
    for name in _MESSAGES:
        handlers[name] = _guarded(handlers[name])


async def close_sockets_of(session: object) -> None:
    """End the connections of a session's pages."""
    for client in list(Client.instances.values()):
        if client.request.scope.get(SESSION_KEY) is session:
            for sid in list(client._socket_to_document_id):
                await core.sio.disconnect(sid)


def _guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler that hears only of pages of the socket's session."""

    async def guarded(sid: str, message: Any) -> Any:
        client = Client.instances.get(message.get("client_id", "")) if isinstance(message, dict) else None
        session = core.sio.get_environ(sid)["asgi.scope"].get(SESSION_KEY)
        if client is None or session is None or client.request.scope.get(SESSION_KEY) is not session:
            return False
        found = handler(sid, message)
        return await found if inspect.isawaitable(found) else found

    return guarded
