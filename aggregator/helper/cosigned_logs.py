"""Which checkpoints of studies' audit logs this helper has co-signed last, in its store."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, insert, select, update

from aggregator.audit.checkpoints import Note
from aggregator.errors import ConflictError
from aggregator.helper import schema
from aggregator.helper.cosigning import LastCosigned
from aggregator.store.database import Database

_TABLE = schema.cosigned_logs


class CosignedLog(NamedTuple):
    """The newest checkpoint of a log that this helper has co-signed.

    Args:
        tenant: whose log.
        size: entries.
        root: of the tree.
        note: with the signatures of the aggregator and of this helper.
        cosigned_s: Unix seconds.
        given_up_s: when its helper's operator let the log begin anew, Unix seconds; None for the log in use.
    """

    tenant: str
    size: int
    root: bytes
    note: str
    cosigned_s: float
    given_up_s: float | None


class CosignedLogs:
    """See the module docstring. Every method is one transaction and raises DatabaseError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def last(self, tenant: str) -> LastCosigned:
        """The largest tree that was co-signed of a study's log."""
        with self._database.reading() as connection:
            return _last(connection, tenant)

    def advance(self, tenant: str, note: Note, *, before: LastCosigned, now_s: float) -> None:
        """Keep what is about to be co-signed; durable on return.

        Args:
            tenant: whose log.
            note: co-signed.
            before: what was co-signed last.
            now_s: Unix seconds.

        Raises:
            ConflictError: another process has co-signed meanwhile.
        """
        tree = note.checkpoint
        row = {"size": tree.size, "root": tree.root, "note": note.text, "cosigned_s": now_s}
        with self._database.transaction() as connection:
            if _last(connection, tenant) != before:
                raise ConflictError(f"another process has co-signed the log of {tenant}; try again")
            if not connection.execute(update(_TABLE).where(_in_use(tenant)).values(**row)).rowcount:
                connection.execute(insert(_TABLE).values(tenant=tenant, **row))

    def give_up(self, tenant: str, *, now_s: float) -> bool:
        """Let a study's log begin anew: its next checkpoint needs no proof. Whether there was one."""
        with self._database.transaction() as connection:
            return connection.execute(update(_TABLE).where(_in_use(tenant)).values(given_up_s=now_s)).rowcount > 0

    def all(self) -> list[CosignedLog]:
        """The logs in use and those that were given up, oldest first."""
        columns = [column for column in _TABLE.c if column.name != "number"]
        with self._database.reading() as connection:
            return [CosignedLog(*row) for row in connection.execute(select(*columns).order_by(_TABLE.c.number))]


def _last(connection: Connection, tenant: str) -> LastCosigned:
    """The largest tree that was co-signed, within a transaction."""
    row = connection.execute(select(_TABLE.c.size, _TABLE.c.root).where(_in_use(tenant))).one_or_none()
    return LastCosigned() if row is None else LastCosigned(row.size, bytes(row.root))


def _in_use(tenant: str) -> ColumnElement[bool]:
    """The condition on a row."""
    return (_TABLE.c.tenant == tenant) & _TABLE.c.given_up_s.is_(None)
