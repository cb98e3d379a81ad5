"""The study as a whole: overview, privacy, audit log, and who asks."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from aggregator.api.answers import AuditPage, AuditState, Spent, SpentPage, WhoAmI
from aggregator.api.audit_book import WITHOUT_KEY
from aggregator.api.guard import ANYONE, GuardedRoute, identity_of, needs, services_of
from aggregator.api.problems import ProblemError, missing
from aggregator.api.requests import Limit, NameCursor, NumberCursor, NumberInPath, TaskName, answer, existing
from aggregator.audit.entries import AuditEntry
from aggregator.audit.log import AuditLog
from aggregator.overview import Overview, fleet_counts, overview
from aggregator.store.operator_views import task_page
from aggregator.store.presence import FleetCounts

router = APIRouter(route_class=GuardedRoute, tags=["study"])
Text = Annotated[str | None, Query(pattern=r"^[\x20-\x7e]{1,200}$")]


@router.get("/v1/whoami", **needs(ANYONE, WhoAmI))
def whoami(request: Request) -> Response:
    """Whose token this is, and what it may do."""
    found = identity_of(request)
    return answer(
        WhoAmI(
            account=found.account,
            role=found.role,
            token=found.token,
            scopes=sorted(found.scopes),
            expires_s=found.expires_s,
        )
    )


@router.get("/v1/overview", **needs("tasks:read", Overview))
def show_overview(request: Request) -> Response:
    """Show all tasks and processes, what was refused, and what does not work as it should."""
    services = services_of(request)
    return answer(overview(services.store, tenant=services.tenant, now_s=services.now_s()))


@router.get("/v1/fleet", **needs("devices:read", FleetCounts))
def show_fleet(request: Request) -> Response:
    """Count devices by state, as they last said of themselves, and by what keeps them from training."""
    services = services_of(request)
    return answer(fleet_counts(services.store, now_s=services.now_s()))


@router.get("/v1/privacy", **needs("privacy:read", SpentPage))
def list_privacy(request: Request, cursor: NameCursor = None, limit: Limit = 50) -> Response:
    """What each task's rounds have cost, with budget lines, by name."""
    services = services_of(request)
    with services.store.database.reading() as connection:
        names = task_page(connection, after=cursor or "", limit=limit + 1)
    items = [services.privacy.spent(name) for name in names[:limit]]
    return answer(SpentPage(items=items, next=names[limit - 1] if len(names) > limit else None))


@router.get("/v1/tasks/{task}/privacy", tags=["tasks"], **needs("privacy:read", Spent, 404))
def show_privacy(request: Request, task: TaskName) -> Response:
    """What a task's rounds have cost, at record and at device level."""
    services = services_of(request)
    with services.store.database.reading() as connection:
        existing(connection, task)
    return answer(services.privacy.spent(task))


@router.get("/v1/audit", **needs("audit:read", AuditPage))
def list_audit(
    request: Request,
    *,
    cursor: NumberCursor = None,
    limit: Limit = 50,
    actor: Text = None,
    action: Text = None,
    subject: Text = None,
) -> Response:
    """List the audit log, newest first; an action that ends with a dot stands for all that begin so."""
    log = AuditLog(services_of(request).store.database)
    found = log.page(before=cursor, limit=limit + 1, actor=actor, action=action, subject=subject)
    items = found[:limit]
    return answer(AuditPage(items=items, next=items[-1].number if len(found) > limit else None))


@router.get("/v1/audit/state", **needs("audit:read", AuditState))
def show_audit_state(request: Request) -> Response:
    """How far the log is proved: its newest checkpoint, who co-signed it, and the last verification."""
    return answer(services_of(request).audit.state())


@router.post("/v1/audit/verify", **needs("audit:read", AuditState, 409))
def verify_audit(request: Request) -> Response:
    """Begin to verify the whole log; one verification runs at a time. GET /v1/audit/state tells what came of it."""
    audit = services_of(request).audit
    if not audit.verify():
        raise ProblemError(409, "no_key", WITHOUT_KEY)
    return answer(audit.state())


@router.get("/v1/audit/{number}", **needs("audit:read", AuditEntry, 404))
def show_entry(request: Request, number: NumberInPath) -> Response:
    """Show one entry of the audit log."""
    found = AuditLog(services_of(request).store.database).page(before=number + 1, limit=1)
    if not found or found[0].number != number:
        raise missing(f"entry {number} in the audit log")
    return answer(found[0])
