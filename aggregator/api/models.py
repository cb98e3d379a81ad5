"""Versions of a task's model: `/v1/tasks/{task}/models`. Rolling back is an order, beside the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from sqlalchemy import Connection

from aggregator import releases
from aggregator.api.answers import ModelDetail, ModelPage
from aggregator.api.guard import GuardedRoute, actor_of, needs, services_of
from aggregator.api.problems import ProblemError, missing
from aggregator.api.requests import (
    IfMatch,
    Limit,
    NumberCursor,
    NumberInPath,
    TaskName,
    answer,
    existing,
    fresh,
    models_etag,
)
from aggregator.lineage_privacy import lineage_of
from aggregator.model_report import model_of
from aggregator.store.operator_views import params_of

router = APIRouter(route_class=GuardedRoute, tags=["models"])
_LINE = 200
Tag = Annotated[str, Path(pattern=r"^[a-z][a-z0-9_-]{0,63}$", description="A word such as released.")]


@router.get("/v1/tasks/{task}/models", **needs("models:read", ModelPage, 404))
def list_models(request: Request, task: TaskName, cursor: NumberCursor = None, limit: Limit = 50) -> Response:
    """List a task's versions, newest first, each with what it has cost a record at most."""
    store = services_of(request).store
    with store.database.reading() as connection:
        now = existing(connection, task)
        etag = models_etag(connection, task, now)
        needed, approved = releases.approved_versions(connection, task)
    found, lineage = store.models.page(task, before=cursor, limit=limit + 1), lineage_of(store, task)
    items = [model_of(one, lineage) for one in found[:limit]]
    more = items[-1].version if len(found) > limit else None
    page = ModelPage(
        items=items, in_force=now.version, approvals_needed=needed, approved=approved, etag=etag, next=more
    )
    return answer(page, etag=etag)


@router.get("/v1/tasks/{task}/models/{version}", **needs("models:read", ModelDetail, 404))
def show_model(request: Request, task: TaskName, version: NumberInPath) -> Response:
    """Show a version with its lineage and what it has cost."""
    return _shown(request, task, version)


@router.put("/v1/tasks/{task}/models/{version}/tags/{tag}", **needs("models:write", ModelDetail, 404, 409, 412))
def tag_model(request: Request, task: TaskName, version: NumberInPath, tag: Tag, if_match: IfMatch = None) -> Response:
    """Put a tag on a version, and take it from any other; tagged versions are never pruned."""
    services = services_of(request)
    with services.store.database.transaction() as connection:
        now = existing(connection, task, alone=True)
        fresh(if_match, models_etag(connection, task, now))
        _there(connection, task, version)
        with _as_problem():
            releases.tag(connection, task, tag, version, who=actor_of(request), now_s=services.now_s())
    return _shown(request, task, version)


@router.post("/v1/tasks/{task}/models/{version}/approval", **needs("models:write", ModelDetail, 404, 409, 412))
def approve_model(request: Request, task: TaskName, version: NumberInPath, if_match: IfMatch = None) -> Response:
    """Agree, as the token's account, that a version may be released; it stands for these very parameters."""
    return _decide(request, task, version, if_match, releases.approve)


@router.delete("/v1/tasks/{task}/models/{version}/approval", **needs("models:write", ModelDetail, 404, 409, 412))
def withdraw_approval(request: Request, task: TaskName, version: NumberInPath, if_match: IfMatch = None) -> Response:
    """Take the account's approval back; what was released with it stays released."""
    return _decide(request, task, version, if_match, releases.withdraw)


def _decide(request: Request, task: str, version: int, if_match: IfMatch, decision: Callable[..., None]) -> Response:
    """An account's word on a version."""
    services = services_of(request)
    with services.store.database.transaction() as connection:
        fresh(if_match, models_etag(connection, task, existing(connection, task, alone=True)))
        _there(connection, task, version)
        with _as_problem():
            decision(connection, task, version, who=actor_of(request), now_s=services.now_s())
    return _shown(request, task, version)


def _there(connection: Connection, task: str, version: int) -> None:
    """Raise ProblemError: there is no such version."""
    if not params_of(connection, task, version)[0]:
        raise missing(f"version {version} of task {task}")


@contextmanager
def _as_problem() -> Iterator[None]:
    """What keeps a version from being released, as an answer."""
    try:
        yield
    except releases.ReleaseError as error:
        raise ProblemError(409, error.code, str(error)) from error


def _shown(request: Request, task: str, version: int) -> Response:
    """A version. Raises ProblemError: there is none."""
    store = services_of(request).store
    with store.database.reading() as connection:
        etag = models_etag(connection, task, existing(connection, task))
        _there(connection, task, version)
        approvals = releases.approvals_of(connection, task, version)
    found = store.models.page(task, before=version + 1, limit=1)
    lineage = lineage_of(store, task)
    detail = ModelDetail(
        model=model_of(found[0], lineage), lineage=lineage.line(version)[:_LINE], approvals=approvals, etag=etag
    )
    return answer(detail, etag=etag)
