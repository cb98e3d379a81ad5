"""Who gets in, and for how long; and what a page may load."""

from __future__ import annotations

import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import TimeoutError as NothingSeen

from tests.browser.visits import Dashboard, Visitor

Serve = Callable[..., Dashboard]
GATE, SESSIONS, LIVE = (f"aggregator.dashboard.{one}" for one in ("gate", "sessions", "live_state"))


def check_the_cookie(dashboard: Dashboard) -> None:
    visitor = dashboard.visitor(dashboard.study.add_token("viewer-ann", life_s=600.0))
    cookie = visitor.page.context.cookies()[0]
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/dashboard"), cookie
    assert 0 < cookie["expires"] <= time.time() + 600, cookie
    assert "covey_" not in cookie["value"]


def check_sockets(dashboard: Dashboard) -> None:
    """A page's socket is its session's alone: with another's cookie, or none, or from another site, there is none."""
    one, other = dashboard.visitor(dashboard.study.tokens["admin"]), dashboard.visitor(dashboard.study.tokens["viewer"])
    page = one.page.evaluate("window.clientId")
    assert opens_socket(one, page)
    for who in (other, dashboard.visitor()):
        who.go()
        assert not opens_socket(who, page), "another's page"


def opens_socket(visitor: Visitor, page: str) -> bool:
    """Whether a page's socket is let in from this browser."""
    code = """([url, id]) => new Promise(done => {
        const path = "/dashboard/_nicegui_ws/socket.io/?EIO=4&transport=websocket";
        const socket = new WebSocket(`${url}${path}&client_id=${id}`);
        socket.onopen = () => { socket.close(); done(true); };
        socket.onerror = () => done(false);
    })"""
    url = visitor.dashboard.url.replace("http", "ws")
    if "sign-in" in visitor.page.url:  # whose policy lets it open nothing
        visitor.page.goto(f"{visitor.dashboard.url}/readyz")
        visitor.page.goto("about:blank")
    return bool(visitor.page.evaluate(code, [url, page]))


def check_revoked(dashboard: Dashboard) -> None:
    """An open page is left once its token is revoked."""
    token = dashboard.study.add_token("viewer-ann")
    visitor = dashboard.visitor(token)
    visitor.sees("of 16 updates")
    dashboard.study.revoke(token)
    visitor.page.wait_for_url("**/sign-in**", timeout=5_000)
    visitor.sees("the token was revoked")
    visitor.go()
    assert "/sign-in" in visitor.page.url


def test_a_session_is_a_cookie_that_scripts_and_other_sites_do_not_get_and_that_ends_with_the_token(
    dashboard: Dashboard,
) -> None:
    check_the_cookie(dashboard)


def test_sockets_belong_to_their_session(dashboard: Dashboard) -> None:
    check_sockets(dashboard)


def test_a_revoked_token_ends_what_is_open(dashboard: Dashboard) -> None:
    check_revoked(dashboard)


def test_a_guessed_token_is_told_so_and_gets_nothing(dashboard: Dashboard) -> None:
    visitor = dashboard.visitor()
    visitor.go("/audit")
    visitor.page.fill("#token", "covey_<script>alert(1)</script>")
    visitor.page.keyboard.press("Enter")
    visitor.sees("not one of this study's")
    assert visitor.page.context.cookies() == []


def test_who_signs_out_is_out_and_who_signs_in_is_where_they_wanted_to_be(dashboard: Dashboard) -> None:
    visitor = dashboard.visitor()
    visitor.go("/audit")
    visitor.page.fill("#token", dashboard.study.tokens["viewer"])
    visitor.page.click("text=Sign in >> nth=-1")
    visitor.page.wait_for_url("**/dashboard/audit")
    visitor.page.click("text=Sign out")
    visitor.sees("You have signed out")
    visitor.go("/audit")
    assert "/sign-in" in visitor.page.url


def test_nothing_is_loaded_from_elsewhere_and_the_policy_is_kept(dashboard: Dashboard) -> None:
    visitor = dashboard.visitor(dashboard.study.tokens["admin"])
    for path in ("/", "/fleet", "/curves", "/refusals", "/models", "/audit"):
        visitor.go(path)
        visitor.page.wait_for_load_state("networkidle")
    hosts = {urlsplit(one).netloc for one in visitor.requests if not one.startswith("data:")}
    assert hosts == {f"127.0.0.1:{dashboard.port}"}
    assert visitor.complaints == []


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (("aggregator.dashboard.sign_in", "max_age=max(", "max_age=None and max("), check_the_cookie),
        (("aggregator.dashboard.sign_in", "httponly=True,\n", "httponly=False,\n"), check_the_cookie),
        ((GATE, "or client.request.scope.get(SESSION_KEY) is not session", ""), check_sockets),
        ((LIVE, "self._sessions.end(session)", "over.pop(session.key)"), check_revoked),
    ],
)
def test_a_session_that_is_not_kept_to_itself_is_caught(
    serve: Serve, change: tuple[str, str, str], check: Callable[[Dashboard], None]
) -> None:
    dashboard = serve(change)
    with pytest.raises((AssertionError, NothingSeen)):
        check(dashboard)
