"""One database for everything that is promised: transactions, and its errors as ours.

SQLite (in WAL mode, every commit synced, freed pages overwritten) for one machine, PostgreSQL for several. A
transaction that will write takes SQLite's write lock at its beginning, so that two processes wait for each other
instead of one failing half-way.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from aggregator.errors import ConflictError, DatabaseError
from aggregator.store.blobs import Blobs
from aggregator.store.migrations import exclusively, is_current, refuse_older, upgrade
from aggregator.store.postgresql import postgresql_engine

Older = Literal["migrate", "refuse", "leave"]
"""What is done with a database of an earlier version: it is brought up to date, refused, or opened as it is."""
_BUSY_TIMEOUT_MS = 10_000
_LOST_RACES = {"40P01", "40001"}
"""PostgreSQL's deadlock and serialization failure: of transactions that met, this one was taken back."""
_MIGRATION_S = 3600.0
"""Moving the models of years out of rows takes a while."""


class Database:
    """A connection pool. An empty database gets its schema at once.

    Args:
        url: SQLAlchemy URL.
        blobs: where large values go that older versions kept in the database; needed only for those.
        older: what is done with a database of an earlier version.
        answer_s: longest wait for an answer from PostgreSQL; one that is away for longer is a DatabaseError. SQLite
            waits up to ten seconds for another process' write.

    Raises:
        DatabaseError: from every method, when the database fails.
    """

    def __init__(
        self, url: str, *, blobs: Blobs | None = None, answer_s: float = 6.0, older: Older = "migrate"
    ) -> None:
        self.url = url
        with _translated("cannot be opened"):
            self.engine = _make_engine(url, answer_s)
        # The same pool of connections; options that every connection is asked for anew take longer than a small query.
        self._reader = self.engine.execution_options(**self._reads_only)
        if older == "leave":
            return
        try:
            self._migrate(blobs, refuses_older=older == "refuse")
        except DatabaseError:
            self.close()
            raise

    def _migrate(self, blobs: Blobs | None, *, refuses_older: bool) -> None:
        """Bring the schema up to date; that may take as long as it takes."""
        with self.reading() as connection:
            if is_current(connection):
                return
            if refuses_older:
                refuse_older(connection)
        with _translated("cannot be brought up to date"), self._patient_engine() as engine:
            upgrade(engine, blobs, refuses_older=refuses_older)
        self.empty_log()  # what older versions kept is erased from it too

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """One transaction in which nobody else migrates, and which may take an hour: all of it is durable, or none.

        SQLite's file is this connection's alone meanwhile: whoever else opens it is told that it is locked.
        """
        with (
            _translated("cannot be brought up to date"),
            self._patient_engine(alone=True) as engine,
            exclusively(engine) as connection,
        ):
            yield connection

    @contextmanager
    def _patient_engine(self, *, alone: bool = False) -> Iterator[Engine]:
        """An engine that waits for long statements, or one whose connection is alone with SQLite's file."""
        if self.is_sqlite and not alone:
            yield self.engine
            return
        engine = _make_engine(self.url, _MIGRATION_S, alone=alone)
        try:
            yield engine
        finally:
            engine.dispose()

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file of this machine."""
        return self.engine.dialect.name == "sqlite"

    @property
    def _reads_only(self) -> dict[str, Any]:
        """Options of a connection that writes nothing, and sees the database as of its first read."""
        if self.is_sqlite:
            return {"covey_reads_only": True}
        return {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction that may write: all of it is durable on exit, or none."""
        with _translated("does not take this change"), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One consistent view; writes nothing."""
        with _translated("cannot be read"), self._reader.begin() as connection:
            yield connection

    def empty_log(self) -> bool:
        """Empty SQLite's write-ahead log, where what a transaction erased lives on; False while somebody reads it."""
        if not self.is_sqlite:
            return True
        with _translated("cannot be checkpointed"), self.engine.connect() as connection:
            raw = connection.connection.cursor()  # without a transaction, in which nothing can be checkpointed
            raw.execute("PRAGMA busy_timeout=0")
            try:
                raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                busy, *_ = raw.fetchone() or (1,)
            except sqlite3.Error as error:  # SQLAlchemy did not see it
                raise DatabaseError(f"the database cannot be checkpointed: {error}") from error
            finally:
                raw.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
                raw.close()
        return not busy

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _make_engine(url: str, answer_s: float, *, alone: bool = False) -> Engine:
    """An engine whose every wait ends."""
    if make_url(url).get_backend_name() == "postgresql":
        return postgresql_engine(url, answer_s=answer_s)
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        _prepare_sqlite(engine, alone=alone)
    return engine


def _prepare_sqlite(engine: Engine, *, alone: bool) -> None:
    """WAL, full fsync, overwriting of freed pages, and the write lock at a transaction's beginning."""
    pragmas = ["journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"]
    # Alone before the log is first looked at, or others may look at it too (sqlite.org/wal.html), and without waiting:
    # whoever has the file open has it open for long.
    first = ["busy_timeout=0", "locking_mode=EXCLUSIVE"] if alone else [f"busy_timeout={_BUSY_TIMEOUT_MS}"]
    if engine.url.database not in {None, "", ":memory:"}:
        # Security: it holds open rounds' keys; the log beside it takes over its mode.
        Path(str(engine.url.database)).touch(mode=0o600)

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # or the driver would begin by itself, and only at the first write
        for pragma in (*first, *pragmas):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        reads_only = connection.get_execution_options().get("covey_reads_only", False)
        connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """SQLAlchemy's errors as ours."""
    try:
        yield
    except ImportError as error:
        raise DatabaseError(f"the database {what}: its driver is not installed ({error})") from error
    except OSError as error:
        raise DatabaseError(f"the database {what}: {error.strerror} ({error.filename})") from error
    except IntegrityError as error:
        raise ConflictError(f"the database {what}: another process was quicker ({error.orig})") from error
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        if getattr(cause, "sqlstate", None) in _LOST_RACES:
            raise ConflictError(f"the database {what}: another process was quicker ({cause})") from error
        raise DatabaseError(f"the database {what}: {cause}") from error
