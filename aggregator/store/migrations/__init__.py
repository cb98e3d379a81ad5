"""Takes a database of any earlier version to `aggregator.store.schema` (Alembic), all in one transaction.

Whoever comes first migrates; others that start meanwhile wait, and then find nothing to do. A crash in the middle
leaves the database as it was, and blobs that no row names, which `aggregator.store.sweep` collects. A database from
before there were versions is one whose tables exist without Alembic's: revision 0001 creates only what is missing. An
empty one gets the newest schema at once, without the steps that led to it.
"""

from __future__ import annotations

import threading
from functools import cache

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
    revision = MigrationContext.configure(connection).get_current_revision()
    scripts = _scripts()
    if revision is not None and revision not in {script.revision for script in scripts.walk_revisions()}:
        raise DatabaseError(
            f"the database is at revision {revision}, from a newer version of this software, which knows revisions up "
            f"to {scripts.get_current_head()}; update the software, or restore a backup into an empty database"
        )
    return revision == scripts.get_current_head()


def upgrade(engine: Engine, blobs: Blobs | None = None) -> None:
    """Bring a database up to date.

    Args:
        engine: whose transactions begin with SQLite's write lock.
        blobs: where large values go that older versions kept in the database.

    Raises:
        DatabaseError: it is from a newer version of this software, or has such values and `blobs` is None.
        SQLAlchemyError: the database fails.
    """
    with _IN_THIS_PROCESS, engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")
        if is_current(connection):
            return
        if not inspect(connection).get_table_names():
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
