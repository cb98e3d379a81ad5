"""Versions of a task's model: `/v1/tasks/{task}/models`. Rolling back is an order, beside the others."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

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
from aggregator.audit.log import append
from aggregator.lineage_privacy import lineage_of
from aggregator.model_report import model_of
from aggregator.store.operator_views import params_of, put_tag

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
    found, lineage = store.models.page(task, before=cursor, limit=limit + 1), lineage_of(store, task)
    items = [model_of(one, lineage) for one in found[:limit]]
    more = items[-1].version if len(found) > limit else None
    return answer(ModelPage(items=items, in_force=now.version, etag=etag, next=more), etag=etag)


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
        is_there, is_kept = params_of(connection, task, version)
        if not is_there:
            raise missing(f"version {version} of task {task}")
        if not is_kept:
            raise ProblemError(
                409, "pruned", f"the parameters of version {version} were pruned; choose another version"
            )
        put_tag(connection, task, tag, version)
        model = services.store.models.digest(connection, task, version).hex()
        told = actor_of(request).told("model.tagged", task, services.now_s(), tag=tag, version=version, model=model)
        append(connection, told)
    return _shown(request, task, version)


def _shown(request: Request, task: str, version: int) -> Response:
    """A version. Raises ProblemError: there is none."""
    store = services_of(request).store
    with store.database.reading() as connection:
        etag = models_etag(connection, task, existing(connection, task))
    found = store.models.page(task, before=version + 1, limit=1)
    if not found or found[0].version != version:
        raise missing(f"version {version} of task {task}")
    lineage = lineage_of(store, task)
    detail = ModelDetail(model=model_of(found[0], lineage), lineage=lineage.line(version)[:_LINE], etag=etag)
    return answer(detail, etag=etag)
