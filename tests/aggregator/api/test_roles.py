"""Who may do what: every route of the OpenAPI, with every kind of token, and exactly what is answered.

The table names every route; one that is added without a row fails. What is expected is written down here, and not
taken from what the routes declare.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fastapi import APIRouter

from aggregator.accounts import verification
from aggregator.accounts.account_store import Actor
from aggregator.accounts.roles import SCOPES
from aggregator.accounts.tokens import make_token
from aggregator.api import guard
from tests.aggregator.api.seeded_study import OPEN, SeededStudy
from tests.aggregator.api.served import Desk, Served, served
from tests.enrolments import broken_copy

METHODS = {"get", "put", "post", "delete", "patch", "head", "options"}


class Row(NamedTuple):
    """A route as it is asked here.

    Args:
        path: with values in it.
        least: role that may; empty for anybody without a token, `any` for any token.
        scope: that it needs.
        body: that it is told.
        success: status where it is allowed.
    """

    path: str
    least: str
    scope: str = ""
    body: Any = None
    success: int = 200


READS, RUNS, MANAGES = "viewer", "operator", "admin"
ROLES = (READS, RUNS, MANAGES)
# What is changed is changed once for each token that may, so each of them finds a thing of its own: N is its number.
TABLE = {
    ("get", "/healthz"): Row("/healthz", ""),
    ("get", "/readyz"): Row("/readyz", ""),
    ("get", "/v1/whoami"): Row("/v1/whoami", "any"),
    ("get", "/v1/overview"): Row("/v1/overview", READS, "tasks:read"),
    ("get", "/v1/fleet"): Row("/v1/fleet", READS, "devices:read"),
    ("get", "/v1/tasks"): Row("/v1/tasks", READS, "tasks:read"),
    ("get", "/v1/tasks/{task}"): Row(f"/v1/tasks/{OPEN}", READS, "tasks:read"),
    ("get", "/v1/tasks/{task}/rounds"): Row(f"/v1/tasks/{OPEN}/rounds", READS, "tasks:read"),
    ("get", "/v1/tasks/{task}/rounds/{number}"): Row(f"/v1/tasks/{OPEN}/rounds/3", READS, "tasks:read"),
    ("get", "/v1/tasks/{task}/orders"): Row(f"/v1/tasks/{OPEN}/orders", READS, "tasks:read"),
    ("get", "/v1/tasks/{task}/orders/{order}"): Row(f"/v1/tasks/{OPEN}/orders/1", READS, "tasks:read"),
    ("get", "/v1/tasks/{task}/privacy"): Row(f"/v1/tasks/{OPEN}/privacy", READS, "privacy:read"),
    ("get", "/v1/tasks/{task}/models"): Row(f"/v1/tasks/{OPEN}/models", READS, "models:read"),
    ("get", "/v1/tasks/{task}/models/{version}"): Row(f"/v1/tasks/{OPEN}/models/2", READS, "models:read"),
    ("get", "/v1/privacy"): Row("/v1/privacy?limit=1&cursor=masked", READS, "privacy:read"),
    ("get", "/v1/devices"): Row("/v1/devices", READS, "devices:read"),
    ("get", "/v1/devices/{device}"): Row("/v1/devices/w-00029", READS, "devices:read"),
    ("get", "/v1/audit"): Row("/v1/audit", READS, "audit:read"),
    ("get", "/v1/audit/state"): Row("/v1/audit/state", READS, "audit:read"),
    ("post", "/v1/audit/verify"): Row("/v1/audit/verify", READS, "audit:read"),
    ("get", "/v1/audit/{number}"): Row("/v1/audit/0", READS, "audit:read"),
    ("post", "/v1/tasks/{task}/pause"): Row("/v1/tasks/task-N/pause", RUNS, "tasks:write", {"now": True}),
    ("post", "/v1/tasks/{task}/resume"): Row("/v1/tasks/task-N/resume", RUNS, "tasks:write"),
    ("post", "/v1/tasks/{task}/abort"): Row("/v1/tasks/task-N/abort", RUNS, "tasks:write", {"reason": "the strap"}),
    ("post", "/v1/tasks/{task}/rollback"): Row("/v1/tasks/task-N/rollback", RUNS, "models:write", {"version": 1}),
    ("put", "/v1/tasks/{task}/models/{version}/tags/{tag}"): Row(
        f"/v1/tasks/{OPEN}/models/2/tags/good", RUNS, "models:write"
    ),
    ("post", "/v1/tasks/{task}/models/{version}/approval"): Row(
        "/v1/tasks/asks-N/models/1/approval", RUNS, "models:write"
    ),
    ("delete", "/v1/tasks/{task}/models/{version}/approval"): Row(
        "/v1/tasks/asks-N/models/1/approval", RUNS, "models:write"
    ),
    ("delete", "/v1/devices/{device}"): Row("/v1/devices/w-0000N", RUNS, "devices:write"),
    ("post", "/v1/devices/{device}/quarantine"): Row(
        "/v1/devices/here-N/quarantine", RUNS, "devices:write", {"reason": "odd"}
    ),
    ("post", "/v1/devices/{device}/restore"): Row(
        "/v1/devices/aside-N/restore", RUNS, "devices:write", {"reason": "fine"}
    ),
    ("post", "/v1/devices/{device}/revoke"): Row("/v1/devices/out-N/revoke", RUNS, "devices:write", {"reason": "lost"}),
    ("get", "/v1/accounts"): Row("/v1/accounts", MANAGES, "accounts:read"),
    ("post", "/v1/accounts"): Row(
        "/v1/accounts", MANAGES, "accounts:write", {"account": "new-N", "role": "viewer"}, 201
    ),
    ("get", "/v1/accounts/{account}"): Row("/v1/accounts/viewer", MANAGES, "accounts:read"),
    ("post", "/v1/accounts/{account}/disable"): Row("/v1/accounts/goes-N/disable", MANAGES, "accounts:write"),
    ("get", "/v1/accounts/{account}/tokens"): Row("/v1/accounts/viewer/tokens", MANAGES, "accounts:read"),
    ("post", "/v1/accounts/{account}/tokens"): Row(
        "/v1/accounts/admin/tokens", MANAGES, "accounts:write", {"scopes": ["accounts:write"]}, 201
    ),
    ("delete", "/v1/tokens/{token}"): Row("/v1/tokens/TOKEN-N", MANAGES, "accounts:write"),
}


class Matrix:
    """Tokens of every kind, and a server that they are shown to."""

    def __init__(self, server: Served) -> None:
        self.server, study = server, server.desk.study
        tokens, now_s = study.tokens, server.desk.now_s
        narrow = {f"admin with {scope}": study.add_token("admin", scopes=[scope]) for scope in SCOPES}
        ends = study.add_token("admin", life_s=1.0)
        revoked, gone = study.add_token("admin"), study.add_account("gone", "admin")
        study.accounts.revoke(revoked.split("_")[1], now_s=now_s, actor=Actor("local:root"))
        study.accounts.disable("gone", now_s=now_s, actor=Actor("local:root"))
        server.desk.now_s = now_s + 2.0
        public = tokens["admin"].split("_")[1]
        self.holding = {**tokens, **narrow}
        self.not_holding: dict[str, tuple[str | None, str]] = {
            "no token": (None, "no_token"),
            "another study's": (make_token(os.urandom).text, "unknown_token"),
            "a guess for a known id": (f"covey_{public}_{make_token(os.urandom).secret}", "unknown_token"),
            "no token at all": ("covey", "unknown_token"),
            "expired": (ends, "expired_token"),
            "revoked": (revoked, "revoked_token"),
            "of a disabled account": (gone, "disabled_account"),
        }
        for number in range(len(self.holding)):
            self._add_things(study, number)

    def _add_things(self, study: SeededStudy, number: int) -> None:
        """What is changed once."""
        study.add_task(f"task-{number}", 2)
        study.add_task(f"asks-{number}", 1, more="[release]\napprovals = 2\n")
        study.add_enrolled(f"here-{number}", "active")
        study.add_enrolled(f"aside-{number}", "quarantined")
        study.add_enrolled(f"out-{number}", "active")
        study.accounts.create(f"goes-{number}", "viewer", now_s=self.server.desk.now_s, actor=Actor("local:root"))

    def path(self, row: Row, number: int) -> str:
        if "TOKEN" in row.path:
            return row.path.replace("TOKEN-N", self.server.desk.study.add_token("viewer").split("_")[1])
        return row.path.replace("w-0000N", f"w-{number:05}").replace("N", str(number))

    def check(self) -> None:
        """Every route with every token."""
        status, _, document = self.server.ask("GET", "/v1/openapi.json")
        assert status == 200
        offered = {(method, path) for path, item in document["paths"].items() for method in item if method in METHODS}
        assert offered == set(TABLE)
        self.server.ask("POST", f"/v1/tasks/{OPEN}/pause", token=self.holding["admin"], body={})
        for (method, path), row in TABLE.items():
            assert document["paths"][path][method].get("x-covey-scope", "") == (row.scope or row.least)
            for who, (token, code) in self.not_holding.items():
                status, headers, found = self.ask(method, row, 0, token)
                expected = (row.success, None) if row.least == "" else (401, code)
                assert (status, found.get("code")) == expected, (method, path, who)
                assert row.least == "" or headers["www-authenticate"].startswith("Bearer")
            for number, (who, token) in enumerate(self.holding.items()):
                status, _, found = self.ask(method, row, number, token)
                expected = (row.success, None) if _may(who, row) else (403, "not_allowed")
                assert (status, found.get("code")) == expected, (method, path, who, found)

    def ask(self, method: str, row: Row, number: int, token: str | None) -> tuple[int, dict[str, str], Any]:
        body = row.body
        if isinstance(body, dict):
            body = {key: value.replace("N", str(number)) if key == "account" else value for key, value in body.items()}
        return self.server.ask(method.upper(), self.path(row, number), token=token, body=body)


def _may(who: str, row: Row) -> bool:
    role, _, scope = who.partition(" with ")
    if row.least in {"", "any"}:
        return True
    return ROLES.index(role) >= ROLES.index(row.least) and scope in {"", row.scope}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    study = SeededStudy(f"sqlite:///{tmp_path / 'study.db'}", masked_rounds=1)
    yield Desk(study)
    study.store.close()


def test_every_route_answers_every_token_as_the_table_says(desk: Desk) -> None:
    with served(desk) as server:
        Matrix(server).check()


def broken_api(change: tuple[str, str]) -> Any:
    """An application whose guard was broken on purpose."""
    broken = broken_copy("aggregator.api.guard", change)
    routers = ["tasks", "devices", "models", "study", "accounts"]
    imported = ("from aggregator.api.guard import", f"from {broken.__name__} import")
    copies = {one: broken_copy(f"aggregator.api.{one}", imported) for one in routers}
    whole = broken_copy("aggregator.api.application", imported)
    for name, copy in copies.items():
        setattr(whole, name, copy)
    return whole


@pytest.mark.parametrize(
    "change",
    [
        ("if needed not in {ANYONE, *identity.scopes}:", "if False:"),
        ("await identify(request, str(needed))", "await identify(request, ANYONE)"),
    ],
)
def test_a_scope_that_is_not_asked_for_is_caught(desk: Desk, change: tuple[str, str]) -> None:
    api = broken_api(change).make_api(desk.services)
    with served(desk, api) as server, pytest.raises(AssertionError, match="with"):
        Matrix(server).check()


def test_a_role_that_may_everything_is_caught(desk: Desk) -> None:
    broken = broken_copy("aggregator.accounts.verification", ("& ROLE_SCOPES[known.role]", "| ROLE_SCOPES['admin']"))
    use(desk, broken)
    with served(desk) as server, pytest.raises(AssertionError, match=r"'(viewer|operator|admin with .*)'"):
        Matrix(server).check()


@pytest.mark.parametrize(
    ("change", "who"),
    [
        (("& ROLE_SCOPES[known.role]", "| ROLE_SCOPES[known.role]"), "admin with"),
        (("not token.created_s <= now_s < token.expires_s", "False"), "expired"),
        (("token.revoked_s is not None", "False"), "revoked"),
        (("known.disabled_s is not None", "False"), "of a disabled account"),
        (("or not self._is_secret(text, presented.secret, known)", ""), "a guess for a known id"),
    ],
)
def test_a_token_that_is_not_checked_is_caught(desk: Desk, change: tuple[str, str], who: str) -> None:
    use(desk, broken_copy("aggregator.accounts.verification", change))
    with served(desk) as server, pytest.raises(AssertionError, match=who):
        Matrix(server).check()


def use(desk: Desk, broken: Any) -> None:
    """Have a broken verifier; its errors are the ones that the guard knows."""
    broken.RejectedTokenError, broken.BusyError = verification.RejectedTokenError, verification.BusyError
    verifier = broken.TokenVerifier(desk.study.accounts, now_s=lambda: desk.now_s, entropy=os.urandom)
    object.__setattr__(desk.services, "verifier", verifier)


def test_a_route_without_a_scope_cannot_be_made() -> None:
    router = APIRouter(route_class=guard.GuardedRoute)
    with pytest.raises(ValueError, match="x-covey-scope"):
        router.get("/v1/open")(lambda: None)
