"""How routes read requests and give answers: names, pages, bodies, versions that a page saw."""

from __future__ import annotations

import hashlib
from typing import Annotated, TypeVar

import msgspec
from fastapi import Header, Path, Query, Request, Response
from sqlalchemy import Connection

from aggregator.api.answers import MOST_INTEGER, MOST_LISTED, Fault
from aggregator.api.problems import ProblemError, missing
from aggregator.api.shield import BODY_KEY
from aggregator.enrolment.register import EnrolmentRecord
from aggregator.store.operator_views import DeviceRow, Standing, standing, tags_of

_NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
TaskName = Annotated[str, Path(pattern=_NAME, description="Name of the task.")]
DeviceName = Annotated[str, Path(pattern=_NAME, description="A registered name.")]
AccountName = Annotated[str, Path(pattern=_NAME, description="Name of the account.")]
TokenId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", description="Public id of the token.")]
NumberInPath = Annotated[int, Path(ge=0, le=MOST_INTEGER)]
Limit = Annotated[int, Query(ge=1, le=MOST_LISTED, description="Items on a page.")]
NameCursor = Annotated[str | None, Query(pattern=_NAME, description="`next` of the page before.")]
NumberCursor = Annotated[int | None, Query(ge=0, le=MOST_INTEGER, description="`next` of the page before.")]
IfMatch = Annotated[str | None, Header(description="`etag` as it was when the decision was made.", max_length=200)]

B = TypeVar("B")


def answer(value: object, *, status: int = 200, etag: str | None = None) -> Response:
    """A value as JSON."""
    headers = {} if etag is None else {"ETag": f'"{etag}"'}
    return Response(msgspec.json.encode(value), status, headers=headers, media_type="application/json")


def told(request: Request, kind: type[B]) -> B:
    """A request's body. Raises ProblemError: it is not what the route is told."""
    try:
        return msgspec.json.decode(request.scope[BODY_KEY], type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        faults = (Fault(where="body", what=str(error)[:300]),)
        raise ProblemError(422, "invalid", "the body is not as described in the OpenAPI", faults=faults) from error


def fresh(expected: str | None, etag: str) -> None:
    """Check that nothing has changed since a decision. Raises ProblemError."""
    if expected is not None and expected.strip() not in {"*", f'"{etag}"', etag}:
        detail = "somebody has changed it since you looked; look again, and decide anew"
        raise ProblemError(412, "stale", detail)


def existing(connection: Connection, task: str, *, alone: bool = False) -> Standing:
    """Where a task stands. Raises ProblemError: there is none."""
    found = standing(connection, task, alone=alone)
    if found is None:
        raise missing(f"task {task}")
    return found


def task_etag(now: Standing) -> str:
    """Changes with every order, and when the task pauses, goes on or ends."""
    return _digest(now.is_over, now.is_paused, now.pausing, now.last_order)


def models_etag(connection: Connection, task: str, now: Standing) -> str:
    """Changes with every order, with the version in force, and with every tag."""
    return _digest(now.is_over, now.version, now.last_order, *tags_of(connection, task))


def device_etag(row: DeviceRow | EnrolmentRecord) -> str:
    """Changes when the device is put aside, taken back or thrown out, and when it enrols."""
    return _digest(row.enrolment, row.state)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
