"""Everything the aggregator keeps, in one hand: the database's tables and the blobs beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress

from sqlalchemy import Connection, insert, select, update

from aggregator.audit.log import AuditLog
from aggregator.errors import BlobError
from aggregator.store import schema
from aggregator.store.blobs import Blobs
from aggregator.store.database import Database
from aggregator.store.devices import Devices
from aggregator.store.leases import Leases
from aggregator.store.models import Models
from aggregator.store.rounds import Rounds
from aggregator.store.tasks import Tasks
from aggregator.store.updates import Updates

RefusalCounts = Counter[tuple[str, str]]
"""Refusals by task (empty where none is known) and reason: of a `RefusalReason`, or why presence was refused."""


class AggregatorStore:
    """See the module docstring.

    Args:
        database: with the present schema.
        blobs: where its large values are.
    """

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self.database, self.blobs = database, blobs
        self.devices, self.tasks, self.leases = Devices(database), Tasks(database), Leases(database)
        self.rounds, self.updates, self.models = Rounds(database), Updates(database), Models(database, blobs)
        self.audit = AuditLog(database)

    def discard(self, names: Iterable[str]) -> None:
        """Remove blobs that nothing names any more; what fails is left to the sweep."""
        with suppress(BlobError):
            self.blobs.delete(names)

    def count_refusals(self, connection: Connection, counts: RefusalCounts) -> None:
        """Add to the counts of refusals, as part of a transaction."""
        table = schema.refusals
        for (task, reason), times in sorted(counts.items()):
            here = (table.c.task == task) & (table.c.reason == reason)
            changed = connection.execute(update(table).where(here).values(times=table.c.times + times))
            if changed.rowcount == 0:
                connection.execute(insert(table).values(task=task, reason=reason, times=times))

    def refusals(self, task: str) -> dict[str, int]:
        """Refusals so far, by reason."""
        with self.database.reading() as connection:
            rows = connection.execute(select(schema.refusals).where(schema.refusals.c.task == task))
            return {row.reason: row.times for row in rows}

    def refusals_by_task(self) -> dict[str, dict[str, int]]:
        """Refusals so far, by task (empty where none is known) and reason."""
        found: dict[str, dict[str, int]] = {}
        with self.database.reading() as connection:
            for row in connection.execute(select(schema.refusals)):
                found.setdefault(row.task, {})[row.reason] = row.times
        return found

    def close(self) -> None:
        """Close all connections."""
        self.database.close()
