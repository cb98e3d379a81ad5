"""What the HTTP API reads and changes that no other part of the aggregator needs: pages of devices, orders, and locks.

Functions that take a `Connection` are part of a transaction; what they change goes with its audit entry.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, delete, func, insert, select

from aggregator.rounds import Phase
from aggregator.store import schema
from aggregator.store.tasks import Order, OrderName

ACTIVE = "active"
_OVER = {Phase.FINISHED.value, Phase.ABORTED.value}
_DEVICES, _PERIODS, _TASKS = schema.devices.c, schema.device_periods.c, schema.tasks.c
_NAMES, _ENROLMENTS, _ORDERS = schema.enrolment_names.c, schema.enrolments.c, schema.orders.c
_UPDATES, _TAGS = schema.updates.c, schema.model_tags.c


class DeviceRow(NamedTuple):
    """A registered name with what is known about it."""

    device: str
    public_key: bytes
    added_s: float
    not_before_s: float | None
    not_after_s: float | None
    enrolment: str | None
    owner: str | None
    state: str


_DEVICE: Select[Any] = select(
    _DEVICES.device,
    _DEVICES.public_key,
    _DEVICES.added_s,
    _PERIODS.not_before_s,
    _PERIODS.not_after_s,
    _ENROLMENTS.enrolment,
    _ENROLMENTS.owner,
    func.coalesce(_ENROLMENTS.state, ACTIVE).label("state"),
).select_from(
    schema.devices.outerjoin(schema.device_periods, _DEVICES.device == _PERIODS.device)
    .outerjoin(schema.enrolment_names, _DEVICES.device == _NAMES.device)
    .outerjoin(schema.enrolments, _NAMES.enrolment == _ENROLMENTS.enrolment)
)


class Standing(NamedTuple):
    """Where a task stands, as far as operators' orders go.

    Args:
        is_over: finished or aborted.
        is_paused: by an operator or by itself.
        last_order: id of the newest order; 0 for none.
    """

    is_over: bool
    is_paused: bool
    pausing: bool
    version: int
    last_order: int


def device_page(
    connection: Connection,
    *,
    after: str = "",
    limit: int,
    prefix: str | None = None,
    owner: str | None = None,
    state: str | None = None,
) -> list[DeviceRow]:
    """Registered names in order, those after one; only those that begin so, are this owner's, or in this state."""
    query = _DEVICE.where(_DEVICES.device > after).order_by(_DEVICES.device).limit(limit)
    if prefix is not None:
        query = query.where(_DEVICES.device.startswith(prefix, autoescape=True))
    if owner is not None:
        query = query.where(_ENROLMENTS.owner == owner)
    if state is not None:
        query = query.where(func.coalesce(_ENROLMENTS.state, ACTIVE) == state)
    return [DeviceRow(*row) for row in connection.execute(query)]


def device_row(connection: Connection, device: str) -> DeviceRow | None:
    """One registered name."""
    row = connection.execute(_DEVICE.where(_DEVICES.device == device)).one_or_none()
    return None if row is None else DeviceRow(*row)


def names_by_state(connection: Connection) -> dict[str, int]:
    """How many registered names are active, quarantined and revoked."""
    state = func.coalesce(_ENROLMENTS.state, ACTIVE)
    counted = _DEVICE.with_only_columns(state, func.count()).group_by(state)
    return {row[0]: row[1] for row in connection.execute(counted)}


def counted_of(connection: Connection, task: str, device: str, *, newest: int, last: int) -> list[Any]:
    """A device's updates among the last rounds of a task, newest first, found by the index."""
    numbers = list(range(max(1, newest - last + 1), newest + 1))
    query = (
        select(_UPDATES.task, _UPDATES.counted_in, _UPDATES.accepted_s, _UPDATES.bytes_up)
        .where(_UPDATES.task == task, _UPDATES.counted_in.in_(numbers), _UPDATES.device == device)
        .order_by(_UPDATES.counted_in.desc())
    )
    return list(connection.execute(query).all())


def remove_device(connection: Connection, device: str) -> bool:
    """Forget a device; whether it was registered."""
    connection.execute(delete(schema.device_periods).where(_PERIODS.device == device))
    return connection.execute(delete(schema.devices).where(_DEVICES.device == device)).rowcount > 0


def task_page(connection: Connection, *, after: str, limit: int) -> list[str]:
    """Names of tasks in order, those after one."""
    query = select(_TASKS.task).where(_TASKS.task > after).order_by(_TASKS.task).limit(limit)
    return list(connection.execute(query).scalars())


def standing(connection: Connection, task: str, *, alone: bool = False) -> Standing | None:
    """Where a task stands, None if there is none; `alone`: nobody else may change that until the transaction ends."""
    query = select(_TASKS.phase, _TASKS.pausing, _TASKS.version).where(_TASKS.task == task)
    row = connection.execute(query.with_for_update() if alone else query).one_or_none()
    if row is None:
        return None
    last = connection.execute(select(func.max(_ORDERS.id)).where(_ORDERS.task == task)).scalar()
    is_paused = row.phase == Phase.PAUSED.value
    return Standing(row.phase in _OVER, is_paused, row.pausing, row.version, last or 0)


def tags_of(connection: Connection, task: str) -> list[tuple[str, int]]:
    """A task's tags with their versions, in order."""
    query = select(_TAGS.tag, _TAGS.version).where(_TAGS.task == task).order_by(_TAGS.tag)
    return [(row.tag, row.version) for row in connection.execute(query)]


def put_tag(connection: Connection, task: str, tag: str, version: int) -> None:
    """Put a tag on a version, and take it from any other."""
    connection.execute(delete(schema.model_tags).where(_TAGS.task == task, _TAGS.tag == tag))
    connection.execute(insert(schema.model_tags).values(task=task, tag=tag, version=version))


def params_of(connection: Connection, task: str, version: int) -> tuple[bool, bool]:
    """Whether there is a version, and whether its parameters are kept."""
    models = schema.models.c
    query = select(models.params).where(models.task == task, models.version == version)
    row = connection.execute(query).one_or_none()
    return row is not None, row is not None and row.params is not None


def order_page(connection: Connection, task: str, *, before: int | None = None, limit: int) -> list[Order]:
    """A task's orders, newest first; only those before one if given."""
    query = select(schema.orders).where(_ORDERS.task == task).order_by(_ORDERS.id.desc()).limit(limit)
    rows = connection.execute(query if before is None else query.where(_ORDERS.id < before))
    return [Order(*row) for row in rows]


def waits(connection: Connection, task: str, name: OrderName, argument: str) -> int | None:
    """The id of the same order, if one has not been carried out."""
    same = (_ORDERS.task == task, _ORDERS.name == name, _ORDERS.argument == argument, _ORDERS.done_s.is_(None))
    found = connection.execute(select(func.max(_ORDERS.id)).where(*same)).scalar()
    return None if found is None else int(found)


def leave_order(connection: Connection, task: str, name: OrderName, argument: str, *, now_s: float) -> int:
    """Leave an order for the coordinator; its id."""
    row = {"task": task, "name": name, "argument": argument, "asked_s": now_s, "outcome": ""}
    return int(connection.execute(insert(schema.orders).values(row).returning(_ORDERS.id)).scalar_one())
