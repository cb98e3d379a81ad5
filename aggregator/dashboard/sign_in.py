"""Signing in with an access token, and out again: plain HTML, without a script."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable
from urllib.parse import parse_qs, urlencode

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from aggregator.api.answers import WhoAmI
from aggregator.api.guard import address_of
from aggregator.api.shield import BODY_KEY
from aggregator.api_client import ApiProblemError
from aggregator.dashboard.gate import OWN_REFERRER, ROOT, SIGN_IN, cookie_of, is_own_origin, to_sign_in
from aggregator.dashboard.own_api import OwnApi
from aggregator.dashboard.sessions import COOKIE, Session, Sessions
from aggregator.dashboard.style import STYLE_PATH

_NEXT = re.compile(rf"{ROOT}(/[a-z0-9_-]{{1,64}}){{0,3}}/?")
_WHY = {
    "over": "Your session is over. Sign in again.",
    "out": "You have signed out.",
    "expired_token": "Your session is over: the token has expired. Ask an admin for another.",
    "revoked_token": "Your session is over: the token was revoked. Ask an admin for another.",
    "disabled_account": "Your session is over: the account is disabled. Ask an admin.",
    "foreign": "Nothing was done: the request came from another site.",
}
_POLICY = (
    "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">{refresh}<title>{title} · Covey</title>
<link rel="icon" href="data:,"><link rel="stylesheet" href="{style}"></head>
<body class="cv-plain"><main><h1>{title}</h1>{body}</main></body></html>"""
_FORM = """<form method="post" action="{action}">{told}
<label for="token">Access token</label>
<input id="token" name="token" type="password" autocomplete="current-password" autofocus required maxlength="200"
 placeholder="covey_…" aria-describedby="hint">
<p id="hint" class="cv-quiet">An admin makes one: <code>covey-aggregator token create NAME</code>. The session ends
with it, after twelve hours at most.</p>
<button type="submit" class="cv-button cv-primary">Sign in</button></form>"""


class SignIn:
    """See the module docstring.

    Args:
        sessions: who is signed in.
        own: the API.
        tenant: the study's name.
        now_s: Unix seconds.
    """

    def __init__(self, sessions: Sessions, own: OwnApi, *, tenant: str, now_s: Callable[[], float]) -> None:
        self._sessions, self._own, self._tenant, self._now_s = sessions, own, tenant, now_s

    def add_to(self, api: FastAPI) -> None:
        """Add the routes, which are no part of the OpenAPI."""
        api.add_api_route(SIGN_IN, self._show, methods=["GET"], include_in_schema=False)
        api.add_api_route(SIGN_IN, self._sign_in, methods=["POST"], include_in_schema=False)
        api.add_api_route(f"{ROOT}/sign-out", self._sign_out, methods=["POST"], include_in_schema=False)

    async def admit(self, request: Request) -> Session | Response:
        """The session that a request for a page comes with, its token asked after; or what to answer instead."""
        session, path = self._sessions.find(cookie_of(request.scope)), request.scope["path"]
        if session is None:
            return to_sign_in(path, "over" if cookie_of(request.scope) else "")
        try:
            await self._own.get("/v1/whoami", WhoAmI, secret=session.secret, address=address_of(request))
        except ApiProblemError as error:
            if error.status == 401:
                self._sessions.end(session)
                return to_sign_in(path, error.problem.code)
            return trouble(error)
        return session

    async def _show(self, request: Request) -> Response:
        """The form."""
        told = _WHY.get(request.query_params.get("why", ""), "")
        return self._form(told, request.query_params.get("next", ""), status=200)

    async def _sign_in(self, request: Request) -> Response:
        """A token that was typed in."""
        given = parse_qs(request.scope[BODY_KEY].decode("utf-8", "replace"))
        secret, onwards = (given.get(name, [""])[0].strip() for name in ("token", "next"))
        secret = secret if secret.isascii() and secret.isprintable() and secret else "-"
        # Security: or another site could sign its visitor in as somebody else.
        if not is_own_origin(request.scope):
            return self._form(_WHY["foreign"], onwards, status=403)
        try:
            who = await self._own.get("/v1/whoami", WhoAmI, secret=secret, address=address_of(request))
        except ApiProblemError as error:
            return self._form(f"{error.problem.detail[:1].upper()}{error.problem.detail[1:]}.", onwards, error.status)
        cookie, session = self._sessions.begin(secret, who, address=address_of(request))
        response = RedirectResponse(onwards if _NEXT.fullmatch(onwards) else f"{ROOT}/", status_code=303)
        response.set_cookie(
            COOKIE,
            cookie,
            max_age=max(1, math.floor(session.ends_s - self._now_s())),
            path=ROOT,
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )
        return response

    async def _sign_out(self, request: Request) -> Response:
        """Out, with all pages of the session."""
        session = self._sessions.find(cookie_of(request.scope))
        if not is_own_origin(request.scope):
            return self._form(_WHY["foreign"], "", status=403)
        if session is not None:
            self._sessions.end(session)
        response = to_sign_in(f"{ROOT}/", "out")
        response.delete_cookie(COOKIE, path=ROOT, httponly=True, samesite="strict")
        return response

    def _form(self, told: str, onwards: str, status: int) -> Response:
        """The page that asks for a token."""
        query = urlencode({"next": onwards}) if _NEXT.fullmatch(onwards) else ""
        words = f'<p class="cv-told" role="alert">{html.escape(told)}</p>' if told else ""
        kept = f'<input type="hidden" name="next" value="{html.escape(onwards)}">' if query else ""
        body = _FORM.format(action=SIGN_IN, told=words + kept)
        return page(f"{self._tenant}: sign in", body, status=status)


def trouble(error: ApiProblemError) -> Response:
    """What is shown where no page can be: it comes again by itself."""
    body = (
        f'<p class="cv-told" role="alert">{html.escape(error.problem.detail)}</p>'
        '<p class="cv-quiet">This page tries again every five seconds. What is wrong is in the journal of '
        "<code>covey-aggregator api</code>.</p>"
    )
    return page("Not just now", body, status=error.status, refresh_s=5)


def page(title: str, body: str, *, status: int, refresh_s: int | None = None) -> Response:
    """A page without scripts; `body` is HTML, with everything foreign in it escaped."""
    refresh = "" if refresh_s is None else f'<meta http-equiv="refresh" content="{refresh_s}">'
    text = _PAGE.format(title=html.escape(title), body=body, refresh=refresh, style=STYLE_PATH)
    return HTMLResponse(text, status, headers={"Content-Security-Policy": _POLICY, "Referrer-Policy": OWN_REFERRER})
