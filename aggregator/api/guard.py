"""Who may ask what: every route names a scope, and nothing of a request is looked at before its token holds.

Order: requests per address (429), the token (401; guesses are limited by address too, 429), its scope (403), requests
per token (429), and only then path, query and body (404, 422). A route without a scope cannot be made.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, cast, get_args

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute

from aggregator.accounts.account_store import Accounts, Actor
from aggregator.accounts.roles import Scope
from aggregator.accounts.verification import BusyError, Identity, RejectedTokenError, TokenVerifier
from aggregator.api.answers import Problem
from aggregator.api.audit_book import AuditBook
from aggregator.api.privacy_book import PrivacyBook
from aggregator.api.problems import PROBLEM_TYPE, STATUSES, ProblemError
from aggregator.api.round_book import RoundBook
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.throttle import Throttle
from fl_protocol.adapters.journal import Journal

ANYONE = "any"
"""In place of a scope: any token that holds."""
SCOPE_KEY = "x-covey-scope"
_SCOPES = {ANYONE, *get_args(Scope)}
_NO_BYTES = 2**62
_ALWAYS = (401, 403, 405, 413, 422, 429, 503)


class RequestLimits:
    """How many requests a minute; see `aggregator.config.ApiSection`. Used on the event loop alone."""

    def __init__(self, *, per_token: int, per_address: int, guesses: int) -> None:
        self._tokens, self._addresses, self._guesses = (
            Throttle(bytes_a_minute=_NO_BYTES, transfers_a_minute=most) for most in (per_token, per_address, guesses)
        )
        self._retry_s = [max(1, -(-60 // most)) for most in (per_token, per_address, guesses)]

    def of_token(self, token: str, now_s: float) -> None:
        """Charge a request to a token. Raises ProblemError."""
        self._charge(self._tokens, token, now_s, "with this token", self._retry_s[0])

    def of_address(self, address: str, now_s: float) -> None:
        """Charge a request to an address. Raises ProblemError."""
        self._charge(self._addresses, network_of(address), now_s, "from this address", self._retry_s[1])

    def of_guess(self, address: str, now_s: float) -> None:
        """Charge a token that was not seen lately, which costs a slow hash. Raises ProblemError."""
        self._charge(
            self._guesses, network_of(address), now_s, "with unknown tokens from this address", self._retry_s[2]
        )

    @staticmethod
    def _charge(throttle: Throttle, who: str, now_s: float, what: str, retry_s: int) -> None:
        if throttle.why_not(who, 0, begins=True, now_s=now_s):
            detail = f"too many requests {what}; come again in {retry_s} s"
            raise ProblemError(429, "too_many_requests", detail, retry_s=retry_s)


@dataclass(frozen=True)
class ApiServices:
    """What the routes work with.

    Args:
        store: the database.
        tenant: name on the wire.
        accounts: who may ask.
        verifier: of tokens.
        limits: of requests.
        privacy: what tasks have cost.
        rounds: what became of rounds.
        audit: how far the audit log is proved.
        journal: where what goes wrong is told.
        now_s: Unix seconds.
        monotonic_s: seconds that no clock setting moves.
        sleep: waits for so many seconds.
        entropy: gives so many random bytes.
        order_patience_s: how long an order's answer is waited for.
    """

    store: AggregatorStore
    tenant: str
    accounts: Accounts
    verifier: TokenVerifier
    limits: RequestLimits
    privacy: PrivacyBook
    rounds: RoundBook
    audit: AuditBook
    journal: Journal
    now_s: Callable[[], float]
    monotonic_s: Callable[[], float]
    sleep: Callable[[float], None]
    entropy: Callable[[int], bytes]
    order_patience_s: float = 2.0


class GuardedRoute(APIRoute):
    """A route that asks for a token with the scope that it names."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler behind the checks. Raises ValueError: the route says nothing about who may ask."""
        handler, needed = super().get_route_handler(), (self.openapi_extra or {}).get(SCOPE_KEY)
        # Security: such a route must not be served at all.
        if needed not in _SCOPES:
            raise ValueError(f"{self.path}: expected {SCOPE_KEY} to be one of {sorted(_SCOPES)}, got {needed!r}")

        async def guarded(request: Request) -> Response:
            request.state.identity = await identify(request, str(needed))
            return await handler(request)

        return guarded


async def identify(request: Request, needed: str) -> Identity:
    """Who asks, if they may. Raises ProblemError."""
    services, address = services_of(request), address_of(request)
    now_s = services.now_s()
    services.limits.of_address(address, now_s)
    kind, _, text = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not text:
        raise ProblemError(
            401, "no_token", "expected a header Authorization: Bearer covey_...; ask an admin for a token"
        )
    if not services.verifier.remembers(text):
        services.limits.of_guess(address, now_s)
    try:
        identity = await run_in_threadpool(services.verifier.verify, text, address=address)
    except RejectedTokenError as error:
        raise ProblemError(401, error.code, str(error)) from error
    except BusyError as error:
        raise ProblemError(503, "busy", str(error), retry_s=1) from error
    services.limits.of_token(identity.token, now_s)
    if needed not in {ANYONE, *identity.scopes}:
        detail = f"token {identity.token} of {identity.account}, a {identity.role}, may not do this: it needs {needed}"
        raise ProblemError(403, "not_allowed", detail)
    return identity


def identity_of(request: Request) -> Identity:
    """Who asks; the guard has checked."""
    return cast(Identity, request.state.identity)


def actor_of(request: Request) -> Actor:
    """Who asks, for the audit log."""
    identity = identity_of(request)
    return Actor(identity.account, identity.token)


def services_of(request: Request) -> ApiServices:
    """What the routes work with."""
    return cast(ApiServices, request.app.state.services)


def address_of(request: Request) -> str:
    """Where a request comes from."""
    return request.client.host if request.client is not None else "unknown"


def network_of(address: str) -> str:
    """What requests are counted by: an IPv4 address, or the /64 of an IPv6 one, all of which one party has."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False))


def needs(scope: Scope | str, answer: type, *also: int, success: int = 200, body: type | None = None) -> dict[str, Any]:
    """What a route declares.

    Args:
        scope: that it asks for, or `ANYONE`.
        answer: type of what it answers.
        also: statuses that it may answer beside `success` and those that every route may.
        success: its status.
        body: type of what it is told.
    """
    extra: dict[str, Any] = {SCOPE_KEY: scope, "security": [{"token": []}]}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": _content("application/json", body)}
    responses: dict[int | str, dict[str, Any]] = {success: declared(answer)}
    responses |= {status: declared_problem(status) for status in sorted({*_ALWAYS, *also})}
    return {"openapi_extra": extra, "responses": responses, "status_code": success, "response_class": Response}


def declared(answer: type) -> dict[str, Any]:
    """A success in the OpenAPI."""
    return {"description": (answer.__doc__ or "").partition("\n")[0], "content": _content("application/json", answer)}


def declared_problem(status: int) -> dict[str, Any]:
    """A status that is no success in the OpenAPI."""
    return {"description": STATUSES[status], "content": _content(PROBLEM_TYPE, Problem)}


def _content(media_type: str, kind: type) -> dict[str, Any]:
    return {media_type: {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
