"""A database with rows of every kind, as the tests of backups have it, and an empty one to restore into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select

from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.store import schema
from aggregator.store.blobs import Blobs
from aggregator.store.database import Database
from aggregator.store.sweep import named_blobs
from tests.aggregator.store.rows import TASK, model_row, put_all_kinds, round_row, task_row, update_row
from tests.contracts.databases import new_url

NOW_S = 1_800_000_000.0
LATER_S = NOW_S + 86_400
SECRET = b"THE-SECRET-OF-A-ROUND-THAT-IS-OPEN"


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return LocalBlobs(tmp_path / "blobs")


@pytest.fixture
def full(database: Database, blobs: Blobs) -> Database:
    """A database with rows in every table: round 1 is open, and one worker has a sum and single updates of it."""
    put_all_kinds(database, blobs)
    with database.transaction() as connection:

        def add(table: Any, *rows: dict[str, object]) -> None:
            connection.execute(insert(table), list(rows))

        add(schema.devices, {"device": "watch-1", "public_key": bytes(range(32)), "added_s": 0.1})
        add(schema.device_periods, {"device": "watch-1", "not_before_s": 0.0, "not_after_s": 1e10 / 3})
        add(schema.tasks, task_row("done", phase="finished", number=9), task_row("new", phase="idle", number=0))
        add(schema.rounds, round_row(1, outcome="open", secret=SECRET, sums_secret=SECRET, closed_s=None))
        add(schema.rounds, *(round_row(number, task="done") for number in range(1, 10)))
        add(schema.models, model_row(1, params=blobs.put(b"version 1", kind="params"), metrics='{"ä":1e-07}'))
        add(schema.model_tags, {"task": TASK, "tag": "released", "version": 1})
        add(schema.updates, *(update_row(number, task="done") for number in range(1, 10)))
        asked = {"task": TASK, "argument": "", "asked_s": 5.0}
        add(schema.orders, {**asked, "name": "pause", "done_s": 6.0, "outcome": "done"})
        add(schema.orders, {**asked, "name": "abort", "done_s": None, "outcome": ""})
        add(schema.leases, {"name": "coordinator", "worker": "w", "until_s": 9.0})
        add(schema.workers, {"worker": "w", "started_s": 1.0, "seen_s": 2.0, "state": "serving", "detail": ""})
        add(schema.refusals, {"task": TASK, "reason": "malformed", "times": 3})
    return database


def rows(database: Database, table: Any) -> list[dict[str, Any]]:
    with database.reading() as connection:
        found = connection.execute(select(table).order_by(*table.primary_key.columns)).mappings()
        return [dict(row) for row in found]


def contents(database: Database, blobs: Blobs, table: Any) -> list[dict[str, Any]]:
    """Rows with large values in place of their names."""
    named = named_blobs(database)
    return [
        {key: blobs.get(value) if isinstance(value, str) and value in named else value for key, value in row.items()}
        for row in rows(database, table)
    ]


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Where a backup is restored to: each kind of database into each."""
    database = Database(new_url(request, tmp_path, str(request.param)))
    yield database
    database.close()
