"""Removes blobs that no row names: what transactions that never came, rounds that closed and models pruned left.

A blob is written before the row that names it, so one without a row may be about to get one. It is removed only when
the store says that it is an hour old, and passes of the same sweeper have seen it without a row for ten minutes: no
clock that jumps can make a fresh blob look abandoned, and no transaction takes that long. After a pause in the passes,
such as an outage of the database, in which somebody may still be waiting to commit, the ten minutes begin anew.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Column, Connection, select

from aggregator.store import schema
from aggregator.store.blobs import Blobs
from aggregator.store.database import Database

OLD_S = 3600.0
"""Age from which a blob without a row is abandoned, by the store's clock."""

SEEN_S = 600.0
"""Time for which it has been seen without a row, by a clock that never jumps."""

LONGEST_PAUSE_S = 900.0
"""Passes further apart than this do not belong together."""

BLOB_COLUMNS: tuple[Column[str | None], ...] = (
    schema.tasks.c.bundle,
    schema.tasks.c.validation,
    schema.models.c.params,
    schema.models.c.optimiser,
    schema.models.c.control,
    schema.models.c.delta,
    schema.updates.c.segment,
    schema.partials.c.blob,
)
"""Every column that names a blob; an empty string names none."""


class Sweeper:
    """See the module docstring; one for the life of a process, which calls `sweep` every few minutes."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database, self._blobs = database, blobs
        self._unnamed: dict[str, float] = {}
        self._passed_s = float("-inf")

    def sweep(self, *, now_s: float, monotonic_s: float) -> int:
        """One pass; how many blobs it removed.

        Args:
            now_s: Unix seconds.
            monotonic_s: seconds of a clock that is never set.

        Raises:
            DatabaseError: the database or the blob store fails; the next pass does the rest.
        """
        # Listed first: what gets its row meanwhile is then seen to have one.
        stored = list(self._blobs.stored())
        named = named_blobs(self._database)
        known = self._unnamed if monotonic_s - self._passed_s <= LONGEST_PAUSE_S else {}
        unnamed = {blob.name: blob.written_s for blob in stored if blob.name not in named}
        self._unnamed = {name: known.get(name, monotonic_s) for name in unnamed}
        self._passed_s = monotonic_s
        abandoned = [
            name
            for name, written_s in unnamed.items()
            if now_s - written_s >= OLD_S and monotonic_s - self._unnamed[name] >= SEEN_S
        ]
        self._blobs.delete(abandoned)
        return len(abandoned)


def named_blobs(database: Database, columns: Iterable[Column[str | None]] = BLOB_COLUMNS) -> set[str]:
    """The blobs that any row names. Raises DatabaseError."""
    with database.reading() as connection:
        return blobs_named_in(connection, columns)


def blobs_named_in(connection: Connection, columns: Iterable[Column[str | None]]) -> set[str]:
    """The blobs that rows name in these columns, as of the caller's transaction."""
    return {
        name
        for column in columns
        for name in connection.execute(select(column).where(column.is_not(None)).distinct()).scalars()
        if name and isinstance(name, str)
    }
