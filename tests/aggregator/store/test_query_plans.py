"""What every commit asks the database goes by an index: a study of a million updates must not be looked through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event

from aggregator.store.database import Database
from aggregator.store.devices import find_devices
from aggregator.store.updates import Updates, accepted_updates, devices_that_counted, devices_that_sent

ASKED: dict[str, Callable[[Connection, Updates], object]] = {
    "accepted before": lambda connection, _: accepted_updates(connection, [b"1" * 16, b"2" * 16], tasks=["study"]),
    "sent in a round": lambda connection, _: devices_that_sent(connection, [("study", 1, "a"), ("study", 1, "b")]),
    "counted in a round": lambda connection, _: devices_that_counted(connection, [("study", 1, "a")]),
    "a round's count": lambda connection, updates: updates.counted(connection, "study", 1),
    "registered devices": lambda connection, _: find_devices(connection, ["a", "b"]),
}


def plan_of(database: Database, ask: Callable[[Connection, Updates], object]) -> list[str]:
    """How SQLite carries out what is asked."""
    told: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *_rest: object) -> None:
        told.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    with database.reading() as connection:
        ask(connection, Updates(database))
        event.remove(database.engine, "before_cursor_execute", note)
        rows = [
            row
            for statement, values in told
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)
        ]
    return [str(row[3]) for row in rows]


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_no_table_is_looked_through(tmp_path: Path, ask: Callable[[Connection, Updates], object]) -> None:
    plan = plan_of(Database(f"sqlite:///{tmp_path}/aggregator.db"), ask)
    assert any(step.startswith("SEARCH") for step in plan)
    assert not [step for step in plan if step.startswith("SCAN")]


def test_a_table_that_is_looked_through_is_noticed(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/aggregator.db")
    plan = plan_of(
        database,
        lambda connection, _: connection.exec_driver_sql("SELECT task FROM updates WHERE update_id IN (x'00')"),
    )
    assert [step for step in plan if step.startswith("SCAN")]
