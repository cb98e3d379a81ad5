"""Accepted updates and the sums of them. A receipt may be sent once the transaction that added its update is durable.

What was accepted is looked up before a batch is opened; the table's constraints hold whatever was looked
up, so that two workers that were sent the same update cannot both count it, nor two of one device in the same round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Column, Connection, Select, bindparam, delete, func, insert, select, update

from aggregator.errors import ConflictError
from aggregator.store import schema
from aggregator.store.database import Database


class AcceptedUpdate(NamedTuple):
    """An update that is committed."""

    task: str
    update_id: bytes
    device: str
    round: int
    sealed_digest: bytes
    accepted_s: float


class NewUpdate(NamedTuple):
    """A row for an update that is about to be committed; the last three only where single updates are kept."""

    task: str
    update_id: bytes
    round: int
    counted_in: int
    device: str
    sealed_digest: bytes
    accepted_s: float
    bytes_up: int
    segment: str | None = None
    start: int | None = None
    length: int | None = None


class StoredPartial(NamedTuple):
    """A worker's sum of updates made for `round` and counted in another, or the same."""

    round: int
    worker: str
    blob: str
    num_updates: int


class KeptUpdate(NamedTuple):
    """Where a single update's sealed bytes are, and the header fields that they were sealed for."""

    update_id: bytes
    device: str
    round: int
    segment: str
    start: int
    length: int


_TABLE, _PARTIALS = schema.updates.c, schema.partials
# Statements of every commit, built once: building one anew takes longer than SQLite takes for it.
_ADD = insert(schema.updates)
_ADD_PARTIAL = insert(_PARTIALS)
_KEY = ("task", "counted_in", "round", "worker")
_REPLACE_PARTIAL = (
    update(_PARTIALS)
    .where(*(_PARTIALS.c[name] == bindparam(f"its_{name}") for name in _KEY), _PARTIALS.c.count == bindparam("before"))
    .values(blob=bindparam("blob"), count=bindparam("count"))
)
_COUNTED = select(func.coalesce(func.sum(_PARTIALS.c.count), 0)).where(
    _PARTIALS.c.task == bindparam("task"), _PARTIALS.c.counted_in == bindparam("counted_in")
)
_ACCEPTED = select(
    _TABLE.task, _TABLE.update_id, _TABLE.device, _TABLE.round, _TABLE.sealed_digest, _TABLE.accepted_s
).where(
    # The tasks are named so that the primary key finds the rows: an id alone would be looked for in all of them.
    _TABLE.task.in_(bindparam("tasks", expanding=True)),
    _TABLE.update_id.in_(bindparam("ids", expanding=True)),
)

_TASKS = select(schema.tasks.c.task)
_REVOKED = (  # from the few that were revoked to their updates, by the index
    select(_TABLE.device)
    .select_from(
        schema.revoked_certificates.join(schema.updates, schema.revoked_certificates.c.device == _TABLE.device)
    )
    .where(_TABLE.task == bindparam("task"), _TABLE.counted_in == bindparam("counted_in"))
    .order_by(_TABLE.device)
)


def _devices_of(number: Column[int]) -> Select[Any]:
    """Which devices have a row of a task and a number."""
    here = (_TABLE.task == bindparam("task"), number == bindparam("number"))
    return select(_TABLE.device).where(*here, _TABLE.device.in_(bindparam("devices", expanding=True)))


_SENT, _COUNTING = _devices_of(_TABLE.round), _devices_of(_TABLE.counted_in)


class Updates:
    """All accepted updates. Methods without a `Connection` are one transaction; all raise DatabaseError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def accepted(self, ids: Iterable[bytes]) -> dict[tuple[str, bytes], AcceptedUpdate]:
        """Those of these update ids that are committed, by task and id, of the tasks that there are."""
        with self._database.reading() as connection:
            return accepted_updates(connection, ids, tasks=connection.execute(_TASKS).scalars().all())

    def add(self, connection: Connection, rows: Sequence[NewUpdate]) -> None:
        """Add a batch, as part of a transaction.

        Raises:
            ConflictError: one of them, or another of its device that was made for the same round or counts in the same,
                was committed in the meantime.
        """
        connection.execute(_ADD, [dict(zip(NewUpdate._fields, row, strict=True)) for row in rows])

    def put_partial(
        self, connection: Connection, task: str, *, counted_in: int, partial: StoredPartial, num_before: int
    ) -> None:
        """Replace a worker's sum by one with more updates in it, as part of a transaction.

        Args:
            connection: with the transaction.
            task: of the round.
            counted_in: the round.
            partial: the new sum.
            num_before: updates in the sum that it was made from; 0 if there was none.

        Raises:
            ConflictError: the sum has become another: a second process goes by this worker's name.
        """
        key = dict(zip(_KEY, (task, counted_in, partial.round, partial.worker), strict=True))
        values = {"blob": partial.blob, "count": partial.num_updates}
        if num_before == 0:
            connection.execute(_ADD_PARTIAL, {**key, **values})
            return
        # Security: a sum that replaced one it does not contain would lose updates whose devices have receipts.
        here = {f"its_{name}": value for name, value in key.items()}
        changed = connection.execute(_REPLACE_PARTIAL, {**here, **values, "before": num_before})
        if changed.rowcount != 1:
            raise ConflictError(f"the sum of worker {partial.worker} is not the one that was read")

    def partials(self, task: str, counted_in: int) -> list[StoredPartial]:
        """Every worker's sums for a round, in a fixed order."""
        table = schema.partials.c
        query = (
            select(table.round, table.worker, table.blob, table.count)
            .where(table.task == task, table.counted_in == counted_in)
            .order_by(table.round, table.worker)
        )
        with self._database.reading() as connection:
            return [StoredPartial(*row) for row in connection.execute(query)]

    def drop_partials(self, connection: Connection, task: str, counted_in: int) -> None:
        """Forget a round's sums, as part of the transaction that closes it."""
        table = schema.partials
        connection.execute(delete(table).where(table.c.task == task, table.c.counted_in == counted_in))

    def arrived(self, task: str, counted_in: int) -> int:
        """Updates that count in a round so far."""
        with self._database.reading() as connection:
            return self.counted(connection, task, counted_in)

    def counted(self, connection: Connection, task: str, counted_in: int) -> int:
        """As `arrived`; part of a transaction."""
        return int(connection.execute(_COUNTED, {"task": task, "counted_in": counted_in}).scalar_one())

    def counted_ids(self, connection: Connection, task: str, counted_in: int) -> list[bytes]:
        """Ids of the updates that count in a round; part of a transaction."""
        table = schema.updates.c
        query = select(table.update_id).where(table.task == task, table.counted_in == counted_in)
        return [bytes(one) for one in connection.execute(query).scalars()]

    def revoked(self, task: str, counted_in: int) -> list[str]:
        """Devices with an update that counts in a round, and that were revoked since."""
        with self._database.reading() as connection:
            return list(connection.execute(_REVOKED, {"task": task, "counted_in": counted_in}).scalars())

    def kept(self, task: str, counted_in: int) -> list[KeptUpdate]:
        """Where the single updates of a round are, in the order of their ids."""
        table = schema.updates.c
        query = (
            select(table.update_id, table.device, table.round, table.segment, table.start, table.length)
            .where(table.task == task, table.counted_in == counted_in, table.segment.is_not(None))
            .order_by(table.update_id)
        )
        with self._database.reading() as connection:
            return [KeptUpdate(*row) for row in connection.execute(query)]

    def drop_kept(self, connection: Connection, task: str, counted_in: int) -> None:
        """Forget where single updates are, as part of the transaction that closes their round."""
        table = schema.updates
        connection.execute(
            update(table)
            .where(table.c.task == task, table.c.counted_in == counted_in, table.c.segment.is_not(None))
            .values(segment=None, start=None, length=None)
        )

    def bytes_up(self, connection: Connection, task: str, counted_in: int) -> int:
        """Bytes of all accepted updates of a round, as they came; part of a transaction."""
        table = schema.updates.c
        query = select(func.coalesce(func.sum(table.bytes_up), 0)).where(
            table.task == task, table.counted_in == counted_in
        )
        return int(connection.execute(query).scalar_one())


def accepted_updates(
    connection: Connection, ids: Iterable[bytes], *, tasks: Iterable[str]
) -> dict[tuple[str, bytes], AcceptedUpdate]:
    """Those of these update ids that are committed, of these tasks, by task and id; part of a transaction."""
    rows = connection.execute(_ACCEPTED, {"ids": list(ids), "tasks": list(tasks)})
    return {(row.task, row.update_id): AcceptedUpdate(*row) for row in rows}


def devices_that_sent(connection: Connection, pairs: Iterable[tuple[str, int, str]]) -> set[tuple[str, int, str]]:
    """Those of these (task, round, device) for which an update is committed; part of a transaction."""
    return _devices(connection, pairs, _SENT)


def devices_that_counted(connection: Connection, pairs: Iterable[tuple[str, int, str]]) -> set[tuple[str, int, str]]:
    """Those of these (task, counted in, device) of which an update counts there; part of a transaction."""
    return _devices(connection, pairs, _COUNTING)


def _devices(
    connection: Connection, pairs: Iterable[tuple[str, int, str]], query: Select[Any]
) -> set[tuple[str, int, str]]:
    """Those of these (task, number, device) that a query of `_devices_of` finds."""
    asked, found = set(pairs), set()
    for task, number in sorted({(task, number) for task, number, _ in asked}):
        devices = [device for one, other, device in asked if (one, other) == (task, number)]
        rows = connection.execute(query, {"task": task, "number": number, "devices": devices})
        found |= {(task, number, device) for (device,) in rows}
    return found
