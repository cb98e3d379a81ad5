"""Every table of the schema is in a backup and comes back as it was, or is in a list that says why not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Table, insert

from aggregator import backup as backing_up
from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.audit.log import AuditEvent, AuditLog, append
from aggregator.backup import backup
from aggregator.backup_file import TABLES
from aggregator.restore import restore
from aggregator.store import schema
from aggregator.store.blobs import Blobs
from aggregator.store.database import Database
from aggregator.store.sweep import named_blobs
from tests.aggregator.full_database import LATER_S, NOW_S, blobs, contents, empty, full, rows
from tests.aggregator.store.rows import TASK

__all__ = ["blobs", "empty", "full"]


UNCHANGED = {
    "access_tokens", "accounts", "approvals", "audit_checkpoints", "device_periods", "devices", "enrolment_names",
    "enrolments", "model_tags", "models", "owners", "presence", "refusals", "webhooks",
}  # fmt: skip
"""Tables that come back as they were."""
MAY_CHANGE = {
    "tasks": {"number", "phase", "pausing", "reason"},  # go on above the backup's number, and wait
    "rounds": {"outcome", "reason", "closed_s", "secret", "sums_secret"},  # one that was open is given up
    "updates": {"segment", "start", "length"},  # sealed under that round's key
    "orders": {"id", "done_s", "outcome"},  # those that waited are dropped
    "enrolment_tokens": {"withdrawn_s"},  # may have been used since
    "revoked_certificates": {"enforced_s"},  # the broker's list is written anew
}
"""Columns in which a restored row may differ; the tests below say how."""
GROWS = {"audit_entries", "audit_nodes"}
"""Tables that have every row, and more: the restore itself is told."""
LEFT_OUT = {"partials", "leases", "workers"}
"""Of the open round, and of processes."""


def check_every_table_is_in_one_list(tables: Iterable[str]) -> None:
    lists = [*UNCHANGED, *MAY_CHANGE, *GROWS, *LEFT_OUT]
    assert sorted(lists) == sorted(tables)


def test_every_table_is_compared_or_left_out_for_a_reason() -> None:
    check_every_table_is_in_one_list(schema.metadata.tables)
    assert {table.name for table in TABLES} == schema.metadata.tables.keys() - LEFT_OUT
    for name, columns in MAY_CHANGE.items():
        assert columns <= set(schema.metadata.tables[name].columns.keys())


def test_a_new_table_that_nobody_thought_of_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_every_table_is_in_one_list([*schema.metadata.tables, "forgotten"])


def made_up(table: Table, number: int) -> dict[str, object]:
    """A row with a value in every column."""
    values: dict[type, object] = {str: f"é{number}", int: number, float: number + 0.1, bytes: bytes([number]) * 32}
    values[bool] = bool(number % 2)
    return {column.name: values[column.type.python_type] for column in table.columns}


@pytest.fixture
def fullest(full: Database) -> Database:
    """The same with rows in every table, of the log too, and every column filled in those that had none."""
    for table in schema.metadata.sorted_tables:
        if table is not schema.audit_entries and not rows(full, table):
            with full.transaction() as connection:
                connection.execute(insert(table), [made_up(table, number) for number in (1, 2)])
    with full.transaction() as connection:
        for number in range(5):
            append(connection, AuditEvent(float(number), "local:anna", "task.paused", TASK, {"why": "lunch"}))
    assert all(rows(full, table) for table in schema.metadata.sorted_tables)
    return full


def check_tables(before: Database, after: Database, blobs: Blobs, there: Blobs) -> None:
    """Every table has every row, but for what may change."""
    for table in schema.metadata.sorted_tables:
        old, new = contents(before, blobs, table), contents(after, there, table)
        if table.name in LEFT_OUT:
            assert new == [], table.name
        elif table.name in GROWS:
            assert new[: len(old)] == old or all(row in new for row in old), table.name
        else:
            changes = MAY_CHANGE.get(table.name, set())
            kept = [[{key: row[key] for key in row if key not in changes} for row in found] for found in (old, new)]
            assert kept[0] == kept[1], table.name


def test_what_was_backed_up_comes_back_into_either_database(
    fullest: Database, blobs: Blobs, empty: Database, tmp_path: Path
) -> None:
    path, there = tmp_path / "covey.backup", LocalBlobs(tmp_path / "restored")
    done = backup(fullest, blobs, path, now_s=NOW_S)
    assert done.num_bytes == path.stat().st_size
    restored = restore(path, empty, there, now_s=LATER_S)
    assert (restored.rows, restored.blobs, restored.created_s) == (done.rows, done.blobs, NOW_S)
    check_tables(fullest, empty, blobs, there)
    # What was restored can be backed up and restored again.
    assert {blob.name for blob in there.stored()} == named_blobs(empty)
    again = backup(empty, there, tmp_path / "again.backup", now_s=LATER_S)
    assert (again.rows, again.blobs) == (done.rows + 1, done.blobs)
    # One more: the audit log says that it was.
    entry, *earlier = AuditLog(empty).page()
    assert (entry.action, entry.actor, entry.at_s) == ("database.restored", "aggregator", LATER_S)
    assert entry.detail == {"backup_s": NOW_S, "rows": done.rows, "sums_lost": 0}
    assert len(earlier) == 5


@pytest.mark.parametrize("table", sorted({*UNCHANGED, *MAY_CHANGE}))
def test_a_backup_that_forgets_a_row_of_any_table_is_caught(
    fullest: Database, blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    def forgets(connection: Any, wanted: Table) -> Iterator[dict[str, Any]]:
        yield from list(every(connection, wanted))[(1 if wanted.name == table else 0) :]

    every, there = backing_up._rows, LocalBlobs(tmp_path / "restored")
    monkeypatch.setattr(backing_up, "_rows", forgets)
    backup(fullest, blobs, tmp_path / "covey.backup", now_s=NOW_S)
    empty = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    restore(tmp_path / "covey.backup", empty, there, now_s=LATER_S)
    with pytest.raises(AssertionError, match=table):
        check_tables(fullest, empty, blobs, there)
    empty.close()
