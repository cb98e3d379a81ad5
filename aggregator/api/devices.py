"""Registered names: `/v1/devices`."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from aggregator.api.answers import Counted, Device, DeviceDetail, DevicePage, StateBody
from aggregator.api.guard import GuardedRoute, actor_of, needs, services_of
from aggregator.api.problems import ProblemError, missing
from aggregator.api.requests import (
    DeviceName,
    IfMatch,
    Limit,
    NameCursor,
    answer,
    device_etag,
    fresh,
    told,
)
from aggregator.audit.log import append
from aggregator.enrolment.register import State as EnrolmentState
from aggregator.enrolment.revocation import StateError, change_state
from aggregator.store.operator_views import DeviceRow, counted_of, device_page, device_row, remove_device

router = APIRouter(route_class=GuardedRoute, tags=["devices"])
_LAST_ROUNDS = 50
_STATE = needs("devices:write", Device, 404, 409, 412, body=StateBody)
Some = Annotated[str | None, Query(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
State = Annotated[Literal["active", "quarantined", "revoked"] | None, Query(description="Only in this state.")]


@router.get("/v1/devices", **needs("devices:read", DevicePage))
def list_devices(
    request: Request,
    *,
    cursor: NameCursor = None,
    limit: Limit = 50,
    prefix: Some = None,
    owner: Some = None,
    state: State = None,
) -> Response:
    """List registered names in order; only those that begin with `prefix`, are an owner's, or are in a state."""
    with services_of(request).store.database.reading() as connection:
        found = device_page(connection, after=cursor or "", limit=limit + 1, prefix=prefix, owner=owner, state=state)
    items = [_device(one) for one in found[:limit]]
    return answer(DevicePage(items=items, next=items[-1].device if len(found) > limit else None))


@router.get("/v1/devices/{device}", **needs("devices:read", DeviceDetail, 404))
def show_device(request: Request, device: DeviceName) -> Response:
    """Show a registered name, and where it counted in the last 50 rounds of each task."""
    store = services_of(request).store
    tasks = store.tasks.all()
    with store.database.reading() as connection:
        found = device_row(connection, device)
        if found is None:
            raise missing(f"device {device}")
        rows = [
            row
            for task in tasks
            for row in counted_of(connection, task.name, device, newest=task.state.number, last=_LAST_ROUNDS)
        ]
    counted = [
        Counted(task=row.task, round=row.counted_in, accepted_s=row.accepted_s, bytes_up=row.bytes_up) for row in rows
    ]
    etag = device_etag(found)
    return answer(DeviceDetail(device=_device(found), counted=counted, etag=etag), etag=etag)


@router.delete("/v1/devices/{device}", **needs("devices:write", Device, 404, 409))
def remove(request: Request, device: DeviceName) -> Response:
    """Take no more updates under a name; what was accepted stays counted."""
    services = services_of(request)
    with services.store.database.transaction() as connection:
        found = device_row(connection, device)
        if found is None or not remove_device(connection, device):
            raise missing(f"device {device}")
        append(connection, actor_of(request).told("device.removed", device, services.now_s()))
    return answer(_device(found))


@router.post("/v1/devices/{device}/quarantine", **_STATE)
def quarantine(request: Request, device: DeviceName, if_match: IfMatch = None) -> Response:
    """Put an enrolled device aside: its updates are refused, it keeps them, and it can be restored."""
    return _put(request, device, "quarantined", if_match)


@router.post("/v1/devices/{device}/restore", **_STATE)
def restore(request: Request, device: DeviceName, if_match: IfMatch = None) -> Response:
    """Take a quarantined device back."""
    return _put(request, device, "active", if_match)


@router.post("/v1/devices/{device}/revoke", **_STATE)
def revoke(request: Request, device: DeviceName, if_match: IfMatch = None) -> Response:
    """Throw an enrolled device out for good, under all its names; its connection is ended within a second."""
    return _put(request, device, "revoked", if_match)


def _put(request: Request, device: str, state: EnrolmentState, expected: str | None) -> Response:
    """Put the enrolment that a name belongs to into another state, unless it has changed since that was decided."""
    services, actor = services_of(request), actor_of(request)
    reason = told(request, StateBody).reason
    with services.store.database.transaction() as connection:
        if device_row(connection, device) is None:
            raise missing(f"device {device}")
        try:
            before = change_state(
                connection,
                device,
                state,
                reason=reason,
                actor=actor.name,
                now_s=services.now_s(),
                token=actor.token,
            )
        except StateError as error:
            raise ProblemError(409, error.code, str(error)) from error
        fresh(expected, device_etag(before))  # as it was when the row was locked; what was changed is taken back
        found = device_row(connection, device)
    if found is None:
        raise missing(f"device {device}")
    return answer(_device(found))


def _device(row: DeviceRow) -> Device:
    """A row as it is answered."""
    return Device(
        device=row.device,
        public_key=bytes(row.public_key).hex(),
        added_s=row.added_s,
        state=row.state,
        owner=row.owner,
        enrolment=row.enrolment,
        not_before_s=row.not_before_s,
        not_after_s=row.not_after_s,
    )
