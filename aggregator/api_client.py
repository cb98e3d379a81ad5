"""A thin client of the HTTP API, on the standard library: one method for each route, answers as the server's own types.

    with ApiClient("https://study.example:8443", token, ca=Path("ca.pem")) as api:
        task = api.task("exercises")
        api.pause("exercises", etag=task.etag)

It keeps one connection open, and may be used by one thread at a time.
"""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from aggregator.accounts.account_store import Account, Token
from aggregator.accounts.roles import Role, Scope
from aggregator.api import answers
from aggregator.audit.entries import AuditEntry
from aggregator.errors import AggregatorError
from aggregator.overview import Overview
from aggregator.store.presence import FleetCounts
from aggregator.task_report import OrderReport, RoundReport
from fl_protocol.errors import ConfigError

T = TypeVar("T")


class _Page(Protocol[T]):
    """A page of a list."""

    @property
    def items(self) -> list[T]: ...

    @property
    def next(self) -> str | int | None: ...


class ApiProblemError(AggregatorError):
    """The server did not carry a request out.

    Args:
        status: of HTTP.
        problem: what it said.
        retry_s: after how many seconds to come again, if it said so.
    """

    def __init__(self, status: int, problem: answers.Problem, retry_s: float | None) -> None:
        super().__init__(f"{problem.detail} ({status}, {problem.code})")
        self.status, self.problem, self.retry_s = status, problem, retry_s


class ApiClient:
    """See the module docstring.

    Args:
        url: ``https://host:port``, or ``http://`` on loopback.
        token: access token.
        ca: PEM file of the CA that certified the server; None for those that the system trusts.
        timeout_s: longest wait for an answer.

    Raises:
        ConfigError: the URL cannot be used.
    """

    def __init__(self, url: str, token: str, *, ca: Path | None = None, timeout_s: float = 15.0) -> None:
        parsed = urlsplit(url)
        host, port = parsed.hostname, parsed.port
        if parsed.scheme not in {"http", "https"} or host is None:
            raise ConfigError(f"url: expected https://host:port, got {url!r}")
        # Security: a token that travels in the clear is everybody's.
        if parsed.scheme == "http" and host not in {"127.0.0.1", "::1", "localhost"}:
            raise ConfigError(f"url: expected https:// for {host}; http:// is for loopback alone")
        self._token = token
        self._connection: http.client.HTTPConnection
        if parsed.scheme == "http":
            self._connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        else:
            context = ssl.create_default_context(cafile=None if ca is None else str(ca))
            self._connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def whoami(self) -> answers.WhoAmI:
        """Whose token this is."""
        return self._get("/v1/whoami", answers.WhoAmI)

    def overview(self) -> Overview:
        """How the study stands."""
        return self._get("/v1/overview", Overview)

    def fleet(self) -> FleetCounts:
        """Devices by state, and by what keeps them from training."""
        return self._get("/v1/fleet", FleetCounts)

    def tasks(self, **query: str | int | None) -> answers.TaskPage:
        """A page of tasks; `cursor`, `limit`."""
        return self._get("/v1/tasks", answers.TaskPage, query)

    def task(self, task: str) -> answers.TaskDetail:
        """One task."""
        return self._get(f"/v1/tasks/{quote(task, safe='')}", answers.TaskDetail)

    def rounds(self, task: str, **query: str | int | None) -> answers.RoundPage:
        """A page of rounds, newest first; `cursor`, `limit`."""
        return self._get(f"/v1/tasks/{quote(task, safe='')}/rounds", answers.RoundPage, query)

    def round(self, task: str, number: int) -> RoundReport:
        """One round."""
        return self._get(f"/v1/tasks/{quote(task, safe='')}/rounds/{number}", RoundReport)

    def orders(self, task: str, **query: str | int | None) -> answers.OrderPage:
        """A page of orders, newest first; `cursor`, `limit`."""
        return self._get(f"/v1/tasks/{quote(task, safe='')}/orders", answers.OrderPage, query)

    def order(self, task: str, order: int) -> OrderReport:
        """One order."""
        return self._get(f"/v1/tasks/{quote(task, safe='')}/orders/{order}", OrderReport)

    def pause(self, task: str, *, now: bool = False, etag: str | None = None) -> answers.OrderAnswer:
        """Open no more rounds; with `etag` only if nobody decided anything since it was read."""
        return self._order(task, "pause", answers.PauseBody(now=now), etag)

    def resume(self, task: str, *, etag: str | None = None) -> answers.OrderAnswer:
        """Go on."""
        return self._order(task, "resume", None, etag)

    def abort(self, task: str, *, reason: str, etag: str | None = None) -> answers.OrderAnswer:
        """Give up for good."""
        return self._order(task, "abort", answers.AbortBody(reason=reason), etag)

    def rollback(self, task: str, version: int, *, etag: str | None = None) -> answers.OrderAnswer:
        """Go on from an earlier version."""
        return self._order(task, "rollback", answers.RollbackBody(version=version), etag)

    def devices(self, **query: str | int | None) -> answers.DevicePage:
        """A page of registered names; `cursor`, `limit`, `prefix`, `owner`, `state`."""
        return self._get("/v1/devices", answers.DevicePage, query)

    def device(self, device: str) -> answers.DeviceDetail:
        """One registered name."""
        return self._get(f"/v1/devices/{quote(device, safe='')}", answers.DeviceDetail)

    def remove_device(self, device: str) -> answers.Device:
        """Take no more updates under a name."""
        return self._ask("DELETE", f"/v1/devices/{quote(device, safe='')}", answers.Device)

    def put_device(
        self, device: str, action: Literal["quarantine", "restore", "revoke"], *, reason: str, etag: str | None = None
    ) -> answers.Device:
        """Put an enrolled device aside, take it back, or throw it out for good."""
        path = f"/v1/devices/{quote(device, safe='')}/{action}"
        return self._ask("POST", path, answers.Device, body={"reason": reason}, etag=etag)

    def models(self, task: str, **query: str | int | None) -> answers.ModelPage:
        """A page of versions, newest first; `cursor`, `limit`."""
        return self._get(f"/v1/tasks/{quote(task, safe='')}/models", answers.ModelPage, query)

    def model(self, task: str, version: int) -> answers.ModelDetail:
        """One version."""
        return self._get(f"/v1/tasks/{quote(task, safe='')}/models/{version}", answers.ModelDetail)

    def tag(self, task: str, version: int, tag: str, *, etag: str | None = None) -> answers.ModelDetail:
        """Put a tag on a version."""
        path = f"/v1/tasks/{quote(task, safe='')}/models/{version}/tags/{quote(tag, safe='')}"
        return self._ask("PUT", path, answers.ModelDetail, etag=etag)

    def approve(self, task: str, version: int, *, etag: str | None = None) -> answers.ModelDetail:
        """Agree that a version may be released."""
        path = f"/v1/tasks/{quote(task, safe='')}/models/{version}/approval"
        return self._ask("POST", path, answers.ModelDetail, etag=etag)

    def withdraw_approval(self, task: str, version: int, *, etag: str | None = None) -> answers.ModelDetail:
        """Take one's approval back."""
        path = f"/v1/tasks/{quote(task, safe='')}/models/{version}/approval"
        return self._ask("DELETE", path, answers.ModelDetail, etag=etag)

    def privacy(self, **query: str | int | None) -> answers.SpentPage:
        """A page of what tasks have cost; `cursor`, `limit`."""
        return self._get("/v1/privacy", answers.SpentPage, query)

    def spent(self, task: str) -> answers.Spent:
        """What a task has cost."""
        return self._get(f"/v1/tasks/{quote(task, safe='')}/privacy", answers.Spent)

    def audit(self, **query: str | int | None) -> answers.AuditPage:
        """A page of the audit log, newest first; `cursor`, `limit`, `actor`, `action`, `subject`."""
        return self._get("/v1/audit", answers.AuditPage, query)

    def entry(self, number: int) -> AuditEntry:
        """One entry of the audit log."""
        return self._get(f"/v1/audit/{number}", AuditEntry)

    def accounts(self, **query: str | int | None) -> answers.AccountPage:
        """A page of accounts; `cursor`, `limit`."""
        return self._get("/v1/accounts", answers.AccountPage, query)

    def account(self, account: str) -> Account:
        """One account."""
        return self._get(f"/v1/accounts/{quote(account, safe='')}", Account)

    def create_account(self, account: str, role: Role) -> Account:
        """Add an account."""
        return self._ask("POST", "/v1/accounts", Account, body=answers.AccountBody(account=account, role=role))

    def disable_account(self, account: str) -> Account:
        """Let an account do nothing more."""
        return self._ask("POST", f"/v1/accounts/{quote(account, safe='')}/disable", Account)

    def tokens(self, account: str, **query: str | int | None) -> answers.TokenPage:
        """A page of an account's tokens; `cursor`, `limit`."""
        return self._get(f"/v1/accounts/{quote(account, safe='')}/tokens", answers.TokenPage, query)

    def create_token(
        self, account: str, *, scopes: list[Scope] | None = None, days: float = 90.0, note: str = ""
    ) -> answers.NewToken:
        """Make a token; its secret is in the answer alone."""
        body = answers.TokenBody(scopes=scopes, days=days, note=note)
        return self._ask("POST", f"/v1/accounts/{quote(account, safe='')}/tokens", answers.NewToken, body=body)

    def revoke_token(self, token: str) -> Token:
        """Let a token do nothing more."""
        return self._ask("DELETE", f"/v1/tokens/{quote(token, safe='')}", Token)

    @staticmethod
    def every(page: Callable[..., _Page[T]], *arguments: str, **query: str | int | None) -> Iterator[T]:
        """Everything in a list, page after page: ``every(api.rounds, "exercises")``."""
        found = page(*arguments, **query)
        yield from found.items
        while found.next is not None:
            found = page(*arguments, **{**query, "cursor": found.next})
            yield from found.items

    def _order(self, task: str, name: str, body: object, etag: str | None) -> answers.OrderAnswer:
        path = f"/v1/tasks/{quote(task, safe='')}/{name}"
        return self._ask("POST", path, answers.OrderAnswer, body=body, etag=etag)

    def _get(self, path: str, kind: type[T], query: dict[str, str | int | None] | None = None) -> T:
        asked = urlencode({name: value for name, value in (query or {}).items() if value is not None})
        return self._ask("GET", f"{path}?{asked}" if asked else path, kind)

    def _ask(self, method: str, path: str, kind: type[T], *, body: object = None, etag: str | None = None) -> T:
        """One request. Raises ApiProblemError, or AggregatorError where no answer comes."""
        headers = {"Authorization": f"Bearer {self._token}", "Accept": "application/json"}
        if etag is not None:
            headers["If-Match"] = etag if etag == "*" else f'"{etag}"'
        if body is not None:
            headers["Content-Type"] = "application/json"
        encoded = None if body is None else msgspec.json.encode(body)
        try:
            self._connection.request(method, path, encoded, headers)
            response = self._connection.getresponse()
            status, retry, data = response.status, response.headers.get("Retry-After"), response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()  # the next request opens another
            raise AggregatorError(f"{method} {path}: no answer from the API ({error}); try again") from error
        try:
            if 200 <= status < 300:
                return msgspec.json.decode(data, type=kind)
            problem = msgspec.json.decode(data, type=answers.Problem)
        except msgspec.MsgspecError as error:
            raise AggregatorError(
                f"{method} {path}: expected an answer of Covey's API, got {status}: {error}"
            ) from error
        raise ApiProblemError(status, problem, float(retry) if retry is not None else None)
