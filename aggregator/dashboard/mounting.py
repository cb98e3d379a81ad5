"""Puts the dashboard into the API's application: its pages, its gate, and what keeps them up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from nicegui import app as pages
from nicegui import ui

from aggregator.api.guard import ApiServices
from aggregator.api.shield import Counted, Shield
from aggregator.dashboard.frame import Parts
from aggregator.dashboard.gate import ROOT, Gate, Nonces
from aggregator.dashboard.live_state import LiveStudy
from aggregator.dashboard.own_api import OwnApi
from aggregator.dashboard.pages import add_pages
from aggregator.dashboard.sessions import Session, Sessions
from aggregator.dashboard.sign_in import SignIn
from aggregator.dashboard.sockets import close_sockets_of, guard_messages
from aggregator.dashboard.style import add_style_to

_LEAVING_S = 1.0
"""What a page has to go to the sign-in by itself, before its connection is ended."""


def mount_dashboard(
    api: FastAPI, services: ApiServices, *, counted: Counted | None, joules_per_update: float | None
) -> None:
    """Add the dashboard to an API; once in a process, since NiceGUI has one application.

    Args:
        api: the application, with its routes.
        services: what they work with.
        counted: where requests are counted.
        joules_per_update: what an update costs a device, if the operator has said so.
    """
    own = OwnApi(Shield(api, counted=counted, monotonic_s=services.monotonic_s))
    sessions = Sessions(now_s=services.now_s, entropy=services.entropy)
    leaving: set[asyncio.Task[None]] = set()

    def leave(session: Session) -> None:
        task = asyncio.get_running_loop().create_task(_leave(session))
        leaving.add(task)
        task.add_done_callback(leaving.discard)

    live = LiveStudy(services, sessions, leave)
    sign_in = SignIn(sessions, own, tenant=services.tenant, now_s=services.now_s)
    sign_in.add_to(api)
    add_style_to(api)
    api.add_api_route("/", _to_dashboard, methods=["GET"], include_in_schema=False)
    add_pages(Parts(services, own, sessions, live, joules_per_update))
    pages.add_middleware(Nonces)
    # Nothing on a page has Tailwind's classes: its compiler would take longer than all the rest.
    ui.run_with(
        api,
        mount_path=ROOT,
        title="Covey",
        favicon="🫧",
        dark=None,
        language="en-US",
        tailwind=False,
        show_welcome_message=False,
        reconnect_timeout=10.0,
    )
    pages.config.socket_io_js_transports = ["websocket"]
    pages.add_middleware(Gate, admit=sign_in.admit, find=sessions.find)
    guard_messages()
    _run_beside(api, live)


async def _leave(session: Session) -> None:
    await asyncio.sleep(_LEAVING_S)
    await close_sockets_of(session)


async def _to_dashboard(_request: Request) -> Response:
    return RedirectResponse(f"{ROOT}/", status_code=307)


def _run_beside(api: FastAPI, live: LiveStudy) -> None:
    """Have the study read for as long as the API is served."""
    around = api.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        task = asyncio.get_running_loop().create_task(live.run())
        async with around(app) as state:
            yield state
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    api.router.lifespan_context = lifespan
