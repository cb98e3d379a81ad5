"""Tasks, their rounds and orders: `/v1/tasks`."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection

from aggregator.api.answers import (
    AbortBody,
    OrderAnswer,
    OrderPage,
    PauseBody,
    RollbackBody,
    RoundPage,
    TaskDetail,
    TaskPage,
)
from aggregator.api.guard import GuardedRoute, actor_of, needs, services_of
from aggregator.api.problems import ProblemError, missing
from aggregator.api.requests import (
    IfMatch,
    Limit,
    NameCursor,
    NumberCursor,
    NumberInPath,
    TaskName,
    answer,
    existing,
    fresh,
    models_etag,
    task_etag,
    told,
)
from aggregator.audit.log import append
from aggregator.in_force import config_of
from aggregator.operator_orders import answer_to
from aggregator.overview import task_overview
from aggregator.store.operator_views import Standing, leave_order, order_page, params_of, task_page, waits
from aggregator.store.tasks import OrderName
from aggregator.task_report import OrderReport, RoundReport, order_report, settings_of

router = APIRouter(route_class=GuardedRoute, tags=["tasks"])
_SHOWN_ORDERS = 20
_ORDER = needs("tasks:write", OrderAnswer, 404, 409, 412)


@router.get("/v1/tasks", **needs("tasks:read", TaskPage))
def list_tasks(request: Request, cursor: NameCursor = None, limit: Limit = 50) -> Response:
    """List tasks by name."""
    store = services_of(request).store
    with store.database.reading() as connection:
        names = task_page(connection, after=cursor or "", limit=limit + 1)
    found = [task_overview(store.tasks.get(name)) for name in names[:limit]]
    return answer(TaskPage(items=found, next=names[limit - 1] if len(names) > limit else None))


@router.get("/v1/tasks/{task}", **needs("tasks:read", TaskDetail, 404))
def show_task(request: Request, task: TaskName) -> Response:
    """Show a task with its settings and newest orders; its `ETag` is for orders."""
    services = services_of(request)
    with services.store.database.reading() as connection:
        now = existing(connection, task)
        orders = order_page(connection, task, limit=_SHOWN_ORDERS)
    stored, etag = services.store.tasks.get(task), task_etag(now)
    detail = TaskDetail(
        state=task_overview(stored),
        settings=settings_of(config_of(stored.spec, task)) if stored.spec else {},
        privacy=services.privacy.spent(task).record_words,
        etag=etag,
        orders=[order_report(one) for one in orders],
    )
    return answer(detail, etag=etag)


@router.get("/v1/tasks/{task}/rounds", **needs("tasks:read", RoundPage, 404))
def list_rounds(request: Request, task: TaskName, cursor: NumberCursor = None, limit: Limit = 50) -> Response:
    """List a task's rounds, newest first."""
    store = services_of(request).store
    with store.database.reading() as connection:
        existing(connection, task)
    found = store.rounds.page(task, before=cursor, limit=limit + 1)
    items = services_of(request).rounds.reports(task, found[:limit])
    return answer(RoundPage(items=items, next=items[-1].number if len(found) > limit else None))


@router.get("/v1/tasks/{task}/rounds/{number}", **needs("tasks:read", RoundReport, 404))
def show_round(request: Request, task: TaskName, number: NumberInPath) -> Response:
    """Show one round."""
    store = services_of(request).store
    with store.database.reading() as connection:
        existing(connection, task)
    found = store.rounds.page(task, before=number + 1, limit=1)
    if not found or found[0][0] != number:
        raise missing(f"round {number} of task {task}")
    return answer(services_of(request).rounds.reports(task, found)[0])


@router.get("/v1/tasks/{task}/orders", **needs("tasks:read", OrderPage, 404))
def list_orders(request: Request, task: TaskName, cursor: NumberCursor = None, limit: Limit = 50) -> Response:
    """List what operators asked of a task, newest first."""
    with services_of(request).store.database.reading() as connection:
        existing(connection, task)
        found = order_page(connection, task, before=cursor, limit=limit + 1)
    items = [order_report(one) for one in found[:limit]]
    return answer(OrderPage(items=items, next=items[-1].id if len(found) > limit else None))


@router.get("/v1/tasks/{task}/orders/{order}", **needs("tasks:read", OrderReport, 404))
def show_order(request: Request, task: TaskName, order: NumberInPath) -> Response:
    """Show what came of an order; `outcome` is empty while it waits."""
    with services_of(request).store.database.reading() as connection:
        existing(connection, task)
        found = order_page(connection, task, before=order + 1, limit=1)
    if not found or found[0].id != order:
        raise missing(f"order {order} of task {task}")
    return answer(order_report(found[0]))


@router.post("/v1/tasks/{task}/pause", **needs("tasks:write", OrderAnswer, 404, 409, 412, body=PauseBody))
def pause(request: Request, task: TaskName, if_match: IfMatch = None) -> Response:
    """Open no more rounds until resumed; the open one is finished first, or with `now` given up."""
    how = told(request, PauseBody)
    return _give(request, task, "pause_now" if how.now else "pause", if_match)


@router.post("/v1/tasks/{task}/resume", **_ORDER)
def resume(request: Request, task: TaskName, if_match: IfMatch = None) -> Response:
    """Go on after a pause, an operator's or the task's own."""
    return _give(request, task, "resume", if_match)


@router.post("/v1/tasks/{task}/abort", **needs("tasks:write", OrderAnswer, 404, 409, 412, body=AbortBody))
def abort(request: Request, task: TaskName, if_match: IfMatch = None) -> Response:
    """Give a task up for good; the models stay."""
    return _give(request, task, "abort", if_match, argument=told(request, AbortBody).reason)


@router.post(
    "/v1/tasks/{task}/rollback", tags=["models"], **needs("models:write", OrderAnswer, 404, 409, 412, body=RollbackBody)
)
def rollback(request: Request, task: TaskName, if_match: IfMatch = None) -> Response:
    """Go on from an earlier version; the open round is given up. `If-Match` takes the `etag` of the list of models."""
    version = told(request, RollbackBody).version

    def check(connection: Connection, now: Standing) -> str:
        is_there, is_kept = params_of(connection, task, version)
        if not is_there:
            raise missing(f"version {version} of task {task}")
        if not is_kept:
            raise ProblemError(
                409, "pruned", f"the parameters of version {version} were pruned; choose another version"
            )
        return models_etag(connection, task, now)

    return _give(request, task, "rollback", if_match, argument=str(version), check=check)


def _give(
    request: Request,
    task: str,
    name: OrderName,
    expected: str | None,
    *,
    argument: str = "",
    check: Callable[[Connection, Standing], str] = lambda _connection, now: task_etag(now),
) -> Response:
    """Leave an order, unless things have changed since it was decided, and tell what came of it."""
    services, now_s = services_of(request), services_of(request).now_s()
    with services.store.database.transaction() as connection:
        now = existing(connection, task, alone=True)
        fresh(expected, check(connection, now))
        if now.is_over:
            raise ProblemError(409, "task_is_over", f"task {task} is over: it takes no orders any more")
        same = waits(connection, task, name, argument)
        if same is not None:
            raise ProblemError(409, "already_asked", f"the same was asked already, and waits as order {same}")
        order = leave_order(connection, task, name, argument, now_s=now_s)
        append(connection, actor_of(request).told(f"order.{name}", task, now_s, order=order, argument=argument))
    found = answer_to(
        services.store,
        order,
        task,
        name,
        now_s=services.now_s,
        monotonic_s=services.monotonic_s,
        sleep=services.sleep,
        patience_s=services.order_patience_s,
    )
    if found.state == "refused":
        raise ProblemError(409, "refused", f"order {order} was refused: {found.reason}")
    return answer(OrderAnswer(order=order, task=task, name=name, state=found.state, reason=found.reason))
