"""The whole HTTP API as one application: routes, errors as answers, and the OpenAPI that declares both.

GET /healthz            the process is alive; no token
GET /readyz             the database answers, and has the schema of this version; no token
GET /v1/openapi.json    every route, what it is told and what it may answer; no token
/v1/...                 everything else, with a token (`aggregator.api.guard`)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

from aggregator.accounts.account_store import AccountError
from aggregator.api import accounts, answers, devices, models, study, tasks
from aggregator.api.answers import Fault, Health
from aggregator.api.guard import ApiServices, address_of, declared, declared_problem, services_of
from aggregator.api.problems import STATUSES, ProblemError, problem
from aggregator.api.requests import answer
from aggregator.api.shield import Counted, Shield
from aggregator.audit.entries import AuditEntry
from aggregator.errors import ConflictError
from aggregator.store.migrations import is_current
from aggregator.store.presence import FleetCounts
from aggregator.task_report import OrderReport, RoundReport
from aggregator.throttle import Repetitions
from fl_protocol.adapters.software import software_version
from fl_protocol.errors import CoveyError

TOLD_EVERY_S = 10.0
"""Refused uses that are alike are told in the journal at most this often."""
_HELD_BACK = {401, 403, 429, 503}
"""Statuses that the journal is told of."""
_REF = "#/components/schemas/{name}"
_TYPES: tuple[type, ...] = (
    *(one for one in vars(answers).values() if isinstance(one, type) and issubclass(one, msgspec.Struct)),
    AuditEntry,
    FleetCounts,
    RoundReport,
    OrderReport,
)


def make_api(
    services: ApiServices, *, counted: Counted | None = None, extend: Callable[[FastAPI], None] | None = None
) -> Shield:
    """The application, shielded.

    Args:
        services: what the routes work with.
        counted: where requests are counted.
        extend: adds further routers (of `GuardedRoute`) before the OpenAPI is made.
    """
    # Security: no pages that load scripts from elsewhere.
    api = FastAPI(
        title="Covey",
        version=software_version(),
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    api.state.services, api.state.repetitions = services, Repetitions(TOLD_EVERY_S)
    for router in (tasks.router, devices.router, models.router, study.router, accounts.router):
        api.include_router(router)
    if extend is not None:
        extend(api)
    _add_errors(api)
    _add_open_routes(api)
    return Shield(api, counted=counted, monotonic_s=services.monotonic_s)


def openapi_of(api: FastAPI) -> dict[str, Any]:
    """The OpenAPI of an application, with schemas made from the msgspec types."""
    document = get_openapi(
        title=api.title,
        version=api.version,
        description="Tasks, devices, models and privacy of one study. Unix seconds; tokens as `Authorization: Bearer`.",
        routes=api.routes,
    )
    _, schemas = msgspec.json.schema_components(_TYPES, ref_template=_REF)
    components = document.setdefault("components", {})
    components["schemas"] = {**schemas}
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path in document["paths"].values():
        for operation in path.values():
            _say_422(operation)
    return document


def _say_422(operation: dict[str, Any]) -> None:
    """FastAPI declares its own form of a 422 wherever a route has parameters; ours is another."""
    if "422" in operation["responses"]:
        operation["responses"]["422"] = declared_problem(422)


def _add_open_routes(api: FastAPI) -> None:
    """Routes without a token."""

    def charge(request: Request) -> None:
        services = services_of(request)
        services.limits.of_address(address_of(request), services.now_s())

    @api.get("/healthz", tags=["health"], responses={200: declared(Health), **_open(429)}, response_class=Response)
    async def healthz(request: Request) -> Response:
        """Whether the process is alive."""
        charge(request)
        return answer(Health(status="alive"))

    @api.get("/readyz", tags=["health"], responses={200: declared(Health), **_open(429, 503)}, response_class=Response)
    async def readyz(request: Request) -> Response:
        """Whether the database answers, and has the schema of this version."""
        charge(request)
        if not await run_in_threadpool(_is_ready, services_of(request)):
            raise ProblemError(503, "not_migrated", "the database has another version's schema; restart this process")
        return answer(Health(status="ready"))

    @api.get("/v1/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        charge(request)
        return answer(document)

    document = openapi_of(api)


def _open(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: declared_problem(status) for status in (405, 413, *statuses)}


def _is_ready(services: ApiServices) -> bool:
    """Raises DatabaseError."""
    with services.store.database.reading() as connection:
        return is_current(connection)


def _add_errors(api: FastAPI) -> None:
    """Every error as an answer, and what is held back in the journal."""

    async def ours(request: Request, error: Exception) -> Response:
        found = _problem_of(error)
        if found.status in _HELD_BACK:
            _tell(request, found, str(error))
        return problem(found)

    async def http(_request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        known = status if status in STATUSES else 422
        response = problem(
            ProblemError(known, {404: "not_found", 405: "not_here"}.get(known, "invalid"), STATUSES[known])
        )
        for name, value in (getattr(error, "headers", None) or {}).items():
            response.headers[name] = value
        return response

    async def invalid(_request: Request, error: Exception) -> Response:
        found = error.errors() if isinstance(error, RequestValidationError) else []
        faults = tuple(Fault(where=".".join(map(str, one["loc"])), what=str(one["msg"])) for one in found[:20])
        return problem(ProblemError(422, "invalid", "the request is not as described in the OpenAPI", faults=faults))

    api.add_exception_handler(CoveyError, ours)
    api.add_exception_handler(HTTPException, http)
    api.add_exception_handler(RequestValidationError, invalid)


def _problem_of(error: Exception) -> ProblemError:
    """An error of ours as an answer. Security: what a database says may name hosts and files; the journal has it."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, AccountError):
        return accounts.problem_of(error)
    if isinstance(error, ConflictError):
        return ProblemError(409, "conflict", "somebody else was quicker; look again")
    return ProblemError(503, "unavailable", "the database does not answer as it should; come again", retry_s=5)


def _tell(request: Request, found: ProblemError, text: str) -> None:
    """Tell the journal of a refused use, or of a database that fails; most of what is alike is only counted."""
    services = services_of(request)
    now_s, route = services.now_s(), getattr(request.scope.get("route"), "path", "none")
    fields = {"code": found.code, "route": route, "address": address_of(request), "reason": text}
    told = request.app.state.repetitions.tell((found.code, route), fields, now_s)
    if told is not None:
        services.journal.write("use_refused" if found.status != 503 else "degraded", at_s=math.floor(now_s), **told)
