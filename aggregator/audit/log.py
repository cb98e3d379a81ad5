"""The audit log in the database: entries are added within the transaction of what they tell of, and never changed.

Whoever adds an entry has the log to themselves until the end of their transaction, since the next entry names this one.
So add it last, and hold the transaction short: on SQLite everybody waits for the write lock anyhow, on PostgreSQL
writers queue at an advisory lock.
"""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, func, insert, select, text

from aggregator.audit.entries import (
    BEGINNING,
    AuditEntry,
    AuditError,
    AuditEvent,
    decode_entry,
    encode_entry,
    entry_of,
)
from aggregator.audit.merkle import leaf_hash
from aggregator.audit.tree_nodes import complete_nodes
from aggregator.store import schema
from aggregator.store.database import Database

__all__ = ["AuditError", "AuditEvent", "AuditLog", "append", "local_actor", "log_size", "stored_entries"]

LOCK_KEY = 0x6175646974
"""PostgreSQL's advisory lock of whoever adds an entry."""
MOST_LISTED = 1000
"""Entries on a page."""
_AT_ONCE = 2000
_TABLE = schema.audit_entries
_LAST = select(_TABLE.c.number, _TABLE.c.leaf).order_by(_TABLE.c.number.desc()).limit(1)


class StoredEntry(NamedTuple):
    """A row: what it is listed by, the entry's bytes, and their leaf hash. None of it is checked."""

    number: int
    at_s: float
    actor: str
    action: str
    subject: str
    entry: bytes
    leaf: bytes


def append(connection: Connection, entry: AuditEvent) -> int:
    """Add an entry, as part of the transaction of what it tells of; its number.

    Args:
        connection: with the transaction; it should not go on for long.
        entry: what was done.

    Raises:
        AuditError: the entry is too long, or has a number that JSON does not have.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
    last = connection.execute(_LAST).one_or_none()
    number, previous = (last.number + 1, last.leaf) if last is not None else (0, BEGINNING)
    made = entry_of(entry, number=number, previous=previous)
    data = encode_entry(made)
    listed = {"number": number, "at_s": made.at_s, "actor": made.actor, "action": made.action, "subject": made.subject}
    connection.execute(insert(_TABLE), {**listed, "entry": data, "leaf": leaf_hash(data)})
    complete_nodes(connection, number + 1)
    return number


def has_entry(connection: Connection, action: str, subject: str) -> bool:
    """Whether something was told before; part of a transaction."""
    query = select(_TABLE.c.number).where(_TABLE.c.subject == subject, _TABLE.c.action == action).limit(1)
    return connection.execute(query).first() is not None


def local_actor() -> str:
    """Who runs this command on this machine, as entries name them."""
    try:
        return f"local:{getpass.getuser()}"
    except (KeyError, OSError):  # an account that has no name
        return "local:unknown"


def log_size(connection: Connection) -> int:
    """How many entries the log has."""
    newest = connection.execute(select(func.max(_TABLE.c.number))).scalar()
    return 0 if newest is None else int(newest) + 1


def stored_entries(connection: Connection, *, begin: int = 0, end: int | None = None) -> Iterator[StoredEntry]:
    """Rows in the order of their numbers, some at a time in memory; not checked.

    Args:
        connection: with one view of the database for as long as it takes.
        begin: number of the first.
        end: number after the last; None for all.
    """
    while True:
        query = select(_TABLE).where(_TABLE.c.number >= begin).order_by(_TABLE.c.number).limit(_AT_ONCE)
        rows = connection.execute(query if end is None else query.where(_TABLE.c.number < end)).all()
        for row in rows:
            yield StoredEntry(*row)
        if len(rows) < _AT_ONCE:
            return
        begin = rows[-1].number + 1


class AuditLog:
    """What readers of the log ask. Every method is one transaction and raises DatabaseError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def size(self) -> int:
        """How many entries there are."""
        with self._database.reading() as connection:
            return log_size(connection)

    def page(
        self,
        *,
        before: int | None = None,
        limit: int = 100,
        actor: str | None = None,
        action: str | None = None,
        subject: str | None = None,
    ) -> list[AuditEntry]:
        """Entries, newest first.

        Args:
            before: only such with a lower number: the last one's of the page before; None for the newest.
            limit: at most so many, 1 to `MOST_LISTED`.
            actor: only this actor's.
            action: only these; one that ends with a dot stands for all that begin so, such as `task.`.
            subject: only about this.

        Raises:
            AuditError: the limit is out of range, or an entry cannot be read: see covey-aggregator audit verify.
        """
        if not 1 <= limit <= MOST_LISTED:
            raise AuditError(f"limit: expected 1 to {MOST_LISTED} entries, got {limit}")
        query = select(_TABLE.c.entry).order_by(_TABLE.c.number.desc()).limit(limit)
        for chosen in _conditions(before, actor, action, subject):
            query = query.where(chosen)
        return self._entries(query)

    def entry(self, number: int) -> AuditEntry:
        """One entry. Raises AuditError: there is none of this number, or it cannot be read."""
        found = self._entries(select(_TABLE.c.entry).where(_TABLE.c.number == number))
        if not found:
            raise AuditError(f"the audit log has no entry {number}; it has {self.size()}, from 0")
        return found[0]

    def _entries(self, query: Select[Any]) -> list[AuditEntry]:
        """Rows as entries."""
        with self._database.reading() as connection:
            return [decode_entry(data) for data in connection.execute(query).scalars()]


def _conditions(before: int | None, actor: str | None, action: str | None, subject: str | None) -> Iterator[Any]:
    """Which entries are on a page."""
    if before is not None:
        yield _TABLE.c.number < before
    if actor is not None:
        yield _TABLE.c.actor == actor
    if subject is not None:
        yield _TABLE.c.subject == subject
    if action is not None and action.endswith("."):
        yield _TABLE.c.action.startswith(action, autoescape=True)
    elif action is not None:
        yield _TABLE.c.action == action
