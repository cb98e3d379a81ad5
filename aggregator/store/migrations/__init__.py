"""Takes a database of any earlier version to `aggregator.store.schema` (Alembic), all in one transaction.

Whoever comes first migrates; others that start meanwhile wait, and then find nothing to do. A crash in the middle
leaves the database as it was, and blobs that no row names, which `aggregator.store.sweep` collects. A database from
before there were versions is one whose tables exist without Alembic's: revision 0001 creates only what is missing. An
empty one gets the newest schema at once, without the steps that led to it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect

from aggregator.errors import DatabaseError
from aggregator.store import schema
from aggregator.store.blobs import Blobs

LOCK_KEY = 0x436F766579
"""PostgreSQL's advisory lock of whoever changes the database as a whole."""

_IN_THIS_PROCESS = threading.Lock()  # Alembic keeps its context in module globals


def newest_revision() -> str:
    """The revision that this code is written for."""
    return str(_scripts().get_current_head())


def is_current(connection: Connection) -> bool:
    """Whether there is nothing to migrate.

    Raises:
        DatabaseError: the database is from a newer version of this software.
    """
    revision = present_revision(connection)
    scripts = _scripts()
    if revision is not None and revision not in {script.revision for script in scripts.walk_revisions()}:
        raise DatabaseError(
            f"the database is at revision {revision}, from a newer version of this software, which knows revisions up "
            f"to {scripts.get_current_head()}; update the software, or restore a backup into an empty database"
        )
    return revision == scripts.get_current_head()


class Step(NamedTuple):
    """A migration: the revision that it leads to, and what it does, for people."""

    revision: str
    what: str


def present_revision(connection: Connection) -> str | None:
    """The revision of a database; None for one from before there were any, or without a table."""
    return MigrationContext.configure(connection).get_current_revision()


def steps_from(revision: str | None) -> list[Step]:
    """What takes a database of this revision to the newest, in order."""
    found = reversed(list(_scripts().iterate_revisions("head", revision or "base")))
    return [Step(script.revision, script.doc) for script in found]


def is_empty(connection: Connection) -> bool:
    """Whether there is not a single table."""
    return not inspect(connection).get_table_names()


@contextmanager
def exclusively(engine: Engine) -> Iterator[Connection]:
    """A transaction in which nobody else migrates.

    Args:
        engine: whose transactions begin with SQLite's write lock.
    """
    with _IN_THIS_PROCESS, engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")
        yield connection


def upgrade(engine: Engine, blobs: Blobs | None = None, *, refuses_older: bool = False) -> None:
    """Bring a database up to date.

    Args:
        engine: whose transactions begin with SQLite's write lock.
        blobs: where large values go that older versions kept in the database.
        refuses_older: whether only an empty database gets the schema, and one of an earlier version is left alone.

    Raises:
        DatabaseError: it is from a newer version of this software, or has such values and `blobs` is None; or it is
            refused.
        SQLAlchemyError: the database fails.
    """
    with exclusively(engine) as connection:
        if is_current(connection):
            return
        if refuses_older:
            refuse_older(connection)
        migrate(connection, blobs)


def refuse_older(connection: Connection) -> None:
    """Raise DatabaseError if there are tables of an earlier version."""
    if not is_current(connection) and not is_empty(connection):
        revision = present_revision(connection)
        raise DatabaseError(
            f"the database is {of_revision(revision)}, and this software needs {newest_revision()}; stop every process "
            "that uses it and run covey-aggregator upgrade, which makes a backup first"
        )


def of_revision(revision: str | None) -> str:
    """A revision in words."""
    return "from before there were revisions" if revision is None else f"of revision {revision}"


def migrate(connection: Connection, blobs: Blobs | None) -> None:
    """Bring a database up to date, as part of a transaction of `exclusively`; see `upgrade`."""
    if is_empty(connection):
        schema.metadata.create_all(connection, checkfirst=False)
        MigrationContext.configure(connection).stamp(_scripts(), "head")
        return
    config = _config()
    config.attributes["connection"], config.attributes["blobs"] = connection, blobs
    command.upgrade(config, "head")


def _config() -> Config:
    """Alembic's configuration, without its file."""
    config = Config()
    config.set_main_option("script_location", "aggregator.store:migrations")
    config.set_main_option("path_separator", "os")
    return config


@cache
def _scripts() -> ScriptDirectory:
    """The revisions there are."""
    return ScriptDirectory.from_config(_config())
