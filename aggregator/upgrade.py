"""Brings a database of an earlier version to this one's schema: with a backup, checked, and all of it or nothing.

Everything happens in one transaction of the database: that nothing else is at work is looked at, the backup is written
from that very view, the migrations run, and what came of them is compared with what was there. Both databases undo
changes of tables with their transaction (SQLite: "Transactions", PostgreSQL: "DDL in transactions"); so whatever fails,
a kill included, leaves the database as it was, and the backup is for what is found out later.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData, func, inspect, make_url, select
from sqlalchemy.exc import OperationalError

from aggregator.audit.export import verify_log
from aggregator.audit.log import AuditEvent, append
from aggregator.audit.verification import LogKeys, Verified
from aggregator.backup import BackedUp, backup_as_it_is, named_by_rows
from aggregator.errors import DatabaseError
from aggregator.shards import LEASE_S, LONGEST_S
from aggregator.store import schema
from aggregator.store.blobs import Blobs
from aggregator.store.database import Database
from aggregator.store.leases import STOPPED
from aggregator.store.migrations import Step, is_current, is_empty, migrate, of_revision, present_revision, steps_from
from fl_protocol.errors import CoveyError

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it is, and how much there is."""
_ROWS_TAKE = 3
"""Bytes that the rows of a backup need on the disk while it is made, for each byte of the database; see the tests."""

_LOCKS_WITHIN_S = 5
"""For whoever connects between the first look for other connections and the locks."""
_LOOKS, _LEAVES_WITHIN_S = 20, 2.0
"""How often it is looked for other connections, and how long one that was closed may take to be gone."""


class Planned(NamedTuple):
    """What an upgrade would do.

    Args:
        revision: the database's; None for one from before there were revisions, or without tables.
        steps: the migrations; none for a database that is up to date.
        empty: whether there is nothing in it to be lost.
    """

    revision: str | None
    steps: list[Step]
    empty: bool


class Upgraded(NamedTuple):
    """What was done: the backup, rows that were there before and after, and what the audit log was found to be."""

    backup: BackedUp
    rows: int
    log: Verified


def plan(database: Database) -> Planned:
    """What there is to do; writes nothing. Raises DatabaseError: it is from a newer version, or fails."""
    with database.reading() as connection:
        if is_current(connection):
            return Planned(present_revision(connection), [], empty=False)
        revision = present_revision(connection)
        return Planned(revision, steps_from(revision), is_empty(connection))


def upgrade(
    database: Database,
    blobs: Blobs,
    path: Path,
    *,
    keys: LogKeys,
    actor: str,
    now_s: float,
    progress: Progress = lambda _what, _done, _all: None,
) -> Upgraded:
    """Bring a database up to date, with a backup of what it was; all of it, or nothing.

    Args:
        database: opened as it is, of an earlier version and not empty.
        blobs: where its large values are.
        path: of the backup, a new file.
        keys: whom the audit log is verified against.
        actor: who does it, as the audit log names them.
        now_s: Unix seconds.
        progress: for people.

    Raises:
        DatabaseError: something else uses the database, the disk has too little room, or a step failed; the database
            is as it was.
    """
    before = plan(database).revision
    with _all_or_nothing(database, before, path):
        database.close()  # our own connections are nobody else's
        _refuse_open_file(database)
        with database.migrating() as connection:
            if present_revision(connection) != before:
                raise DatabaseError("another upgrade was quicker")
            _refuse_company(connection, now_s)
            _refuse_small_disk(connection, database, blobs, path.parent)
            counted, log = _counts(connection), verify_log(connection, keys, progress=partial(progress, "verifying"))
            done = backup_as_it_is(
                connection,
                blobs,
                path,
                revision=before or "0000",
                now_s=now_s,
                progress=partial(progress, "backing up"),
            )
            migrate(connection, blobs)
            _verify(connection, counted, log, keys, progress=partial(progress, "verifying"))
            after = present_revision(connection) or ""
            told: dict[str, str | int | float] = {"from": before or "", "to": after, "backup": path.name}
            append(connection, AuditEvent(now_s, actor, "database.upgraded", "", told))
    try:
        database.empty_log()  # what older versions kept is erased from it too
    except DatabaseError as error:
        raise DatabaseError(
            f"the database is upgraded and the backup {path} whole, and what older versions kept is still in the log "
            f"beside it, until a service starts: {error}"
        ) from error
    return Upgraded(done, sum(counted.values()), log)


@contextmanager
def _all_or_nothing(database: Database, revision: str | None, path: Path) -> Iterator[None]:
    """Whatever fails is one sentence, which says how the database is."""
    existed = os.path.exists(path)
    try:
        yield
    except Exception as error:
        cause = str(error) if isinstance(error, CoveyError) else f"{type(error).__name__}: {error}"
        kept = f", and the backup {path} is whole" if os.path.exists(path) and not existed else ""
        raise DatabaseError(f"{_as_it_is(database, revision)}{kept}: {cause}") from error


def _as_it_is(database: Database, before: str | None) -> str:
    """What is known of a database after an upgrade that failed; a connection may be lost at the very commit."""
    try:
        now = plan(database).revision
    except DatabaseError:
        return f"the upgrade did not end, and the database, which was {of_revision(before)}, cannot be read"
    if now != before:
        return f"the database is {of_revision(now)} now, but its answer was lost"
    return f"nothing was upgraded, and the database is as it was, {of_revision(before)}"


def _refuse_open_file(database: Database) -> None:
    """Raise DatabaseError if another process has the SQLite file open, be it only to read.

    Every connection in WAL mode holds a shared lock on the file for as long as it is open (sqlite.org/wal.html).
    `Database.migrating` would find out too, and say no more than that the database is locked.
    """
    name = make_url(database.url).database
    if not database.is_sqlite or not name:
        return
    with closing(sqlite3.connect(name, timeout=0.0, isolation_level=None)) as alone:
        try:
            alone.execute("PRAGMA locking_mode=EXCLUSIVE")
            alone.execute("BEGIN EXCLUSIVE")
            alone.execute("ROLLBACK")
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF not in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
                raise DatabaseError(
                    f"{name} cannot be written ({error}); is it this user's, and is there room?"
                ) from error
            raise DatabaseError(
                f"another process has {name} open ({error}); stop covey-aggregator run, worker, api, enrolment run and "
                "whatever else reads it, then run this again"
            ) from error


def _refuse_company(connection: Connection, now_s: float) -> None:
    """Raise DatabaseError if a process has a lease, was heard of just now, or has a connection to PostgreSQL."""
    tables = set(inspect(connection).get_table_names())
    is_postgresql = connection.dialect.name == "postgresql"
    if is_postgresql:
        _refuse_other_connections(connection)
        _lock(connection, sorted(tables))  # whoever comes now waits until it is over
    leases, workers, at_work = schema.leases.c, schema.workers.c, set[str]()
    if {"leases", "workers"} <= tables:
        held = (leases.until_s > now_s) & (leases.until_s <= now_s + LONGEST_S)
        at_work |= set(connection.execute(select(leases.worker).where(held)).scalars())
        heard = (workers.state != STOPPED) & (workers.seen_s > now_s - LEASE_S) & (workers.seen_s <= now_s + LONGEST_S)
        at_work |= set(connection.execute(select(workers.worker).where(heard)).scalars())
    if at_work:
        raise DatabaseError(
            f"{', '.join(sorted(at_work))} is at work on this database, or was until {LEASE_S:.0f} s ago; stop it, or "
            "if it was killed wait that long, then run this again"
        )
    if is_postgresql:
        _refuse_other_connections(connection)


def _lock(connection: Connection, tables: Sequence[str]) -> None:
    """Keep everybody else from PostgreSQL's tables. Raises DatabaseError: somebody does not let go of one."""
    before = connection.exec_driver_sql("SHOW lock_timeout").scalar_one()
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCKS_WITHIN_S}s'")
    for name in tables:
        try:
            connection.exec_driver_sql(f'LOCK TABLE "{name}" IN ACCESS EXCLUSIVE MODE')
        except OperationalError as error:
            raise DatabaseError(
                f"the table {name} cannot be had ({str(error.orig).strip()}): another connection is in a transaction; "
                "stop whatever reads this database, then run this again"
            ) from error
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{before}'")


def _refuse_other_connections(connection: Connection) -> None:
    """Raise DatabaseError if another client is connected to PostgreSQL's database."""
    if others := _other_connections(connection):
        raise DatabaseError(
            f"{others} other connections to this database are open; stop covey-aggregator run, worker, api, enrolment "
            "run and whatever else reads it, then run this again"
        )


def _other_connections(connection: Connection) -> int:
    """How many clients PostgreSQL has in this database beside this one; those that are just leaving are waited for."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND backend_type = 'client backend'"
    )
    for _ in range(_LOOKS):
        found = int(connection.exec_driver_sql(query).scalar_one())
        if not found:
            break
        time.sleep(_LEAVES_WITHIN_S / _LOOKS)
        connection.exec_driver_sql("SELECT pg_stat_clear_snapshot()")
    return found


def _refuse_small_disk(connection: Connection, database: Database, blobs: Blobs, folder: Path) -> None:
    """Raise DatabaseError if the backup, and what the migration writes beside it, cannot be expected to fit."""
    named = named_by_rows(connection)
    large = sum(one.num_bytes for one in blobs.stored() if one.name in named)
    size, name = _bytes_of(connection), make_url(database.url).database
    beside = database.is_sqlite and name and os.stat(name).st_dev == os.stat(folder).st_dev
    needed = large + (_ROWS_TAKE + bool(beside)) * size
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < needed:
        raise DatabaseError(
            f"the backup needs up to {needed / 1e6:.1f} MB in {folder}, and {free / 1e6:.1f} MB are free; name a file "
            "on another disk with --backup"
        )


def _bytes_of(connection: Connection) -> int:
    """How large the database is."""
    if connection.dialect.name == "postgresql":
        return int(connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one())
    pages, size = (connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("page_count", "page_size"))
    return int(pages) * int(size)


def _counts(connection: Connection) -> dict[str, int]:
    """Rows of every table."""
    found = MetaData()
    found.reflect(connection)
    return {
        name: connection.execute(select(func.count()).select_from(table)).scalar_one()
        for name, table in found.tables.items()
        if name != "alembic_version"
    }


def _verify(
    connection: Connection,
    before: dict[str, int],
    log: Verified,
    keys: LogKeys,
    *,
    progress: Callable[[int, int], None],
) -> None:
    """Raise DatabaseError unless the schema is the code's, no row is lost, and the audit log is what it was."""
    differences = compare_metadata(MigrationContext.configure(connection), schema.metadata)
    if differences:
        raise DatabaseError(f"the migrations led to another schema than this software's ({differences[0]!r:.200})")
    after = _counts(connection)
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            raise DatabaseError(f"the table {name} had {before[name]} rows and would have {after[name]}")
    if verify_log(connection, keys, progress=progress) != log:
        raise DatabaseError("the audit log would not be what it was")
