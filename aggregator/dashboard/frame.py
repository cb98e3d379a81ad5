"""What every page has around it: name of the study, navigation, who is signed in, and what is wrong just now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlencode

from fastapi import Request
from nicegui import Client, ui
from nicegui.elements.mixins.text_element import TextElement

from aggregator.accounts.roles import Scope
from aggregator.api.guard import ApiServices, address_of
from aggregator.dashboard.gate import ROOT, SESSION_KEY, SIGN_IN
from aggregator.dashboard.live_state import LiveState, LiveStudy
from aggregator.dashboard.own_api import OwnApi
from aggregator.dashboard.sessions import Session, Sessions
from aggregator.dashboard.style import STYLE_PATH
from aggregator.dashboard.tags import box, text

T = TypeVar("T")
PAGES: tuple[tuple[str, str, Scope], ...] = (
    ("", "Live", "tasks:read"),
    ("fleet", "Fleet", "devices:read"),
    ("curves", "Curves", "tasks:read"),
    ("refusals", "Refusals", "tasks:read"),
    ("models", "Models", "models:read"),
    ("audit", "Audit log", "audit:read"),
)
"""Path, name, and the scope that it needs, in the order of the navigation."""


@dataclass(frozen=True)
class Parts:
    """What pages are made with.

    Args:
        services: of the API.
        own: the API's own routes.
        sessions: who is signed in.
        live: the study as it is now.
        joules_per_update: what an update costs a device, if the operator has said so.
    """

    services: ApiServices
    own: OwnApi
    sessions: Sessions
    live: LiveStudy
    joules_per_update: float | None


@dataclass(frozen=True)
class Visit:
    """One page that one person has open.

    Args:
        parts: what it is made with.
        session: whose page it is.
        address: where they are.
        client: NiceGUI's.
    """

    parts: Parts
    session: Session
    address: str
    client: Client

    async def get(self, path: str, kind: type[T], *, query: dict[str, str | int | None] | None = None) -> T:
        """What the API answers this user. Raises ApiProblemError."""
        return await self.parts.own.get(path, kind, secret=self.secret(), address=self.address, query=query)

    async def ask(self, method: str, path: str, kind: type[T], *, body: object = None, etag: str | None = None) -> T:
        """Have the API do something for this user, whose role it asks after. Raises ApiProblemError."""
        about: dict[str, Any] = {"secret": self.secret(), "address": self.address, "body": body, "etag": etag}
        return await self.parts.own.ask(method, path, kind, **about)

    def secret(self) -> str:
        """The session's token, as long as it goes on; nothing that the API takes afterwards."""
        return self.session.secret if self.parts.sessions.holds(self.session) else "over"

    def shows(self, update: Callable[[LiveState], None]) -> None:
        """Tell a part of the page of every reading, from now on."""
        self.client.storage.setdefault("covey.updates", []).append(update)


@contextmanager
def framed(parts: Parts, request: Request, *, at: str, title: str) -> Iterator[Visit | None]:
    """A page's frame, within which it is made; None where its user's token may not see it.

    Args:
        parts: what pages are made with.
        request: for the page; the gate has let it in.
        at: which of `PAGES`.
        title: of the page.
    """
    client, session = ui.context.client, request.scope[SESSION_KEY]
    visit = Visit(parts, session, address_of(request), client)
    needed = next(scope for path, _, scope in PAGES if path == at)
    client.title = f"{title} · {parts.services.tenant}"
    ui.add_head_html(f'<link rel="stylesheet" href="{STYLE_PATH}">')
    text("a", "Skip to the content", "cv-skip", href="#content")
    _header(visit, at)
    banner = text("p", "", "cv-banner", role="alert")
    banner.set_visibility(False)
    with box("div", "cv-main", id="content", tabindex="-1"):  # within the main that Quasar makes
        text("h1", title)
        if session.may(needed):
            yield visit
        else:
            _empty_for_lack_of(needed)
            yield None
    _keep_up(visit, banner)


def empty(title: str, what: str, command: str = "") -> None:
    """What stands in place of a list with nothing in it."""
    with box("section", "cv-empty"):
        text("h2", title)
        text("p", what)
        if command:
            text("code", command)


def _empty_for_lack_of(scope: Scope) -> None:
    empty(
        "Not for this token",
        f"This page needs {scope}, which the token that you signed in with does not have.",
        "covey-aggregator token create NAME --scope ...",
    )


def _header(visit: Visit, at: str) -> None:
    """Name, navigation, and who is signed in."""
    who = visit.session.who
    with box("header", "cv-header"):
        with box("div", "cv-brand"):
            text("strong", "Covey")
            text("span", visit.parts.services.tenant, "cv-quiet")
        with box("nav", "cv-nav", aria_label="Pages"):
            for path, name, scope in PAGES:
                if visit.session.may(scope):
                    here = {"aria_current": "page"} if path == at else {}
                    text("a", name, href=f"{ROOT}/{path}", **here)
        with box("form", "cv-who", method="post", action=f"{ROOT}/sign-out"):
            text("span", f"{who.account}, {who.role}", "cv-quiet")
            text("button", "Sign out", "cv-button", type="submit")


def _keep_up(visit: Visit, banner: TextElement) -> None:
    """Show every reading, until the page is closed or its session is over."""
    client, live = visit.client, visit.parts.live

    def shows(state: LiveState) -> None:
        banner.set_text(state.trouble)
        banner.set_visibility(bool(state.trouble))
        for update in client.storage.get("covey.updates", []):
            update(state)

    def ends(why: str) -> None:
        where = f"{SIGN_IN.removeprefix(ROOT)}?{urlencode({'why': why, 'next': str(client.request.url.path)})}"
        client.open(where)

    shows(live.now)
    # What goes wrong on one page is told in NiceGUI's log, and keeps no other from being shown.
    live.look(client.id, visit.session, lambda state: client.safe_invoke(lambda: shows(state)), ends)
    client.on_delete(lambda: live.leave(client.id))
