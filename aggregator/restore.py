"""Makes an empty database, and an empty place for large values, what they were when a backup was made.

Since then devices have gone on: they have seen rounds, got receipts and charged their budgets. So that a restored
service takes no step twice, it does not go on where the backup stopped:

- the round that was open then is given up; its key is in no backup, so that none of its updates can be read again;
- round numbers go on far above the backup's, because devices refuse rounds older than one they have seen as replays,
  and so that no update made for a round after the backup can count in another of the same number;
- receipts of before the backup are kept: what was accepted is not accepted twice;
- enrolment tokens that were unused are withdrawn, since nobody can know whether one was used after the backup;
- who was thrown out since is thrown out again, if the broker's last list of revoked certificates is given;
- sums that helpers were asked for since are counted into budgets at device level (`aggregator.lost_sums`);
- orders that were not carried out are dropped, and every task that was going on is paused until its operator resumes
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, insert, select

from aggregator.audit.log import AuditEvent, append
from aggregator.backup_file import TABLES, BackupFile
from aggregator.certificates import RevocationList
from aggregator.enrolment.revocation import RevokedAgain, revoke_again
from aggregator.errors import BlobError, DatabaseError
from aggregator.lost_sums import UNSAID, LostSums, insert_lost
from aggregator.store import schema
from aggregator.store.blobs import Blobs, checked_blob_name
from aggregator.store.database import Database
from aggregator.store.migrations import LOCK_KEY, newest_revision
from aggregator.store.sweep import BLOB_COLUMNS

ROUND_GAP = 1000
"""Rounds that may have been opened after the backup, if nobody knows better."""

_LARGEST_ROUND = 2**31 - 1
_ROWS_AT_ONCE = 500
Progress = Callable[[int, int], None]


class Restored(NamedTuple):
    """What was restored.

    Args:
        rows, blobs: how many rows and large values.
        created_s: when the backup was made, Unix seconds.
        numbers: of each task, that of its last round.
        revoked: who was thrown out again; None if no list was given.
        sums_lost: of each task, the sums that its account has for those asked for since.
        sums_unsaid: tasks that have an account and no budget, of which nobody has said how many there were.
    """

    rows: int
    blobs: int
    created_s: float
    numbers: dict[str, int]
    revoked: RevokedAgain | None
    sums_lost: dict[str, int]
    sums_unsaid: list[str]


def restore(
    path: Path,
    database: Database,
    blobs: Blobs,
    *,
    now_s: float,
    after_round: int | None = None,
    sums_lost: LostSums = UNSAID,
    actor: str = "aggregator",
    listed: RevocationList | None = None,
    progress: Progress = lambda _done, _all: None,
) -> Restored:
    """Restore a backup; all of it, or nothing.

    Args:
        path: of the file; it is read and checked whole before anything is written.
        database: without a single row.
        blobs: where large values go; they get new names.
        now_s: Unix seconds.
        after_round: number above which every task's rounds go on: the newest that any device may have seen. By default
            a thousand above the backup's.
        sums_lost: how many sums helpers were asked for since the backup, where somebody knows.
        actor: who restores it, as the audit log names them.
        listed: the revoked certificates that the broker had last; who is on it stays out.
        progress: for people; called with how many large values are done, and how many there are.

    Raises:
        DatabaseError: the backup is damaged or of another version, the database is not empty, one of them fails, or
            nobody has said how many sums of a task with a budget at device level were asked for since.
    """
    backup = BackupFile(path, revision=newest_revision())
    with database.reading() as connection:
        _refuse_rows(connection)
    names: dict[str, str | None] = dict.fromkeys(backup.manifest.pruned)
    count = sum(name.startswith("blobs/") for name in backup.manifest.members)
    settled = _Settled(backup.manifest.created_s, now_s, after_round, names, sums_lost)
    try:
        for done, (name, data) in enumerate(backup.blobs()):
            progress(done, count)
            names[name] = blobs.put(data, kind=checked_blob_name(name).partition("/")[0])
        progress(count, count)
        with database.transaction() as connection:
            if not database.is_sqlite:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")
            _refuse_rows(connection)
            rows = sum(_insert(connection, table, backup.rows(table), settled) for table in TABLES)
            settled.insert_lost_sums(connection, blobs)
            told = {"backup_s": backup.manifest.created_s, "rows": rows, "sums_lost": sum(settled.sums_lost.values())}
            append(connection, AuditEvent(now_s, actor, "database.restored", "", told))
            revoked = None
            if listed is not None:
                revoked = revoke_again(connection, listed, actor=actor, now_s=now_s)
    except BaseException:
        with suppress(BlobError, DatabaseError):
            # The commit may have got through and only its answer be lost: then the values are in use.
            with database.reading() as connection:
                _refuse_rows(connection)
            blobs.delete(name for name in names.values() if name is not None)
        raise
    return Restored(
        rows, count, backup.manifest.created_s, settled.numbers, revoked, settled.sums_lost, settled.sums_unsaid
    )


def _refuse_rows(connection: Connection) -> None:
    """Raise DatabaseError unless the database is empty."""
    for table in schema.metadata.sorted_tables:
        if connection.execute(select(table).limit(1)).first() is not None:
            raise DatabaseError(
                f"a backup is restored only into an empty database, and this one has rows in its table {table.name}; "
                "name a new database in the configuration"
            )


def _insert(connection: Connection, table: Table, rows: Iterable[dict[str, Any]], settled: _Settled) -> int:
    """Insert a table's rows, some at a time; how many."""
    count, rest = 0, (settled.row(table, row) for row in rows)
    while some := list(islice(rest, _ROWS_AT_ONCE)):
        connection.execute(insert(table), some)
        count += len(some)
    return count


def _not_enforced(_row: dict[str, Any]) -> dict[str, Any]:
    """The list that the broker looks at is written anew, since on this machine there may be none."""
    return {"enforced_s": None}


class _Settled:
    """What becomes of rows, given that time went on since they were backed up."""

    def __init__(
        self,
        created_s: float,
        now_s: float,
        after_round: int | None,
        names: Mapping[str, str | None],
        lost: LostSums,
    ) -> None:
        self._created_s, self._now_s, self._after_round, self._names = created_s, now_s, after_round, names
        self._lost, self._with_lost, self._opened_s = lost, list[Mapping[str, Any]](), dict[str, float]()
        self._backup = f"the backup of {datetime.fromtimestamp(created_s, timezone.utc):%Y-%m-%d %H:%M} UTC"
        self.numbers: dict[str, int] = {}
        self.sums_lost: dict[str, int] = {}
        self.sums_unsaid: list[str] = []

    def row(self, table: Table, row: dict[str, Any]) -> dict[str, Any]:
        """A row as it is restored."""
        for column in BLOB_COLUMNS:
            if column.table is table and row[column.name]:
                row[column.name] = self._renamed(row[column.name])
        if table is schema.orders:
            del row["id"]  # PostgreSQL would give it to the next order too
        changes = {
            schema.tasks: self._task,
            schema.rounds: self._round,
            schema.orders: self._order,
            schema.enrolment_tokens: self._enrolment_token,
            schema.revoked_certificates: _not_enforced,
        }
        return {**row, **changes[table](row)} if table in changes else row

    def _renamed(self, name: str) -> str | None:
        """A large value's new name; none if it was pruned."""
        if name not in self._names:
            raise DatabaseError(f"the backup lacks {name}, which one of its rows names; use another backup")
        return self._names[name]

    def _task(self, row: dict[str, Any]) -> dict[str, Any]:
        """Numbers go on above what devices may have seen; nothing begins by itself."""
        lost = self._lost.of_task(row, after_round=self._after_round)
        if lost is None:
            self.sums_unsaid.append(row["task"])
            lost = 0
        # Those that were asked for are not all that were opened: the gap is for the others.
        number = row["number"] + lost + ROUND_GAP
        if self._after_round is not None:
            number = max(row["number"] + lost, self._after_round)
        if not 0 <= number < _LARGEST_ROUND:
            raise DatabaseError(f"rounds of task {row['task']} cannot go on after {number}: there is no larger number")
        self.numbers[row["task"]] = number
        if lost:
            self.sums_lost[row["task"]] = lost
            self._with_lost.append(dict(row))
        changes: dict[str, Any] = {"number": number}
        if row["phase"] in {"idle", "open", "unmasking"}:
            changes |= {
                "phase": "paused",
                "pausing": False,
                "reason": f"restored from {self._backup}; go on with covey-aggregator task resume",
            }
        return changes

    def insert_lost_sums(self, connection: Connection, blobs: Blobs) -> None:
        """Into the accounts of tasks; all other rows are there. Raises DatabaseError: a number is for no such task."""
        self._lost.check_names(self.numbers, self.sums_lost)
        for task in self._with_lost:
            name = task["task"]
            reason = (
                f"lost since {self._backup}: a sum that helpers were asked for, counted as one of the fewest updates"
            )
            # Devices may have been in the round that was open then since it opened.
            since_s = min(self._created_s, self._opened_s.get(name, self._created_s))
            count, now_s = self.sums_lost[name], self._now_s
            insert_lost(connection, blobs, task, count, reason=reason, since_s=since_s, now_s=now_s)

    def _round(self, row: dict[str, Any]) -> dict[str, Any]:
        """A round that was open is over."""
        if row["outcome"] not in {"open", "closing"}:
            return {}
        task = row["task"]
        self._opened_s[task] = min(row["opened_s"], self._opened_s.get(task, row["opened_s"]))
        reason = f"given up when {self._backup} was restored: no backup has its key or its updates"
        return {"outcome": "aborted", "reason": reason, "closed_s": self._now_s}

    def _order(self, row: dict[str, Any]) -> dict[str, Any]:
        """An order that was not carried out is not any more."""
        if row["done_s"] is not None:
            return {}
        return {
            "done_s": self._now_s,
            "outcome": f"dropped when {self._backup} was restored; ask again if it still holds",
        }

    def _enrolment_token(self, row: dict[str, Any]) -> dict[str, Any]:
        """Security: a token that was unused may have been used since, and would be good for a second device."""
        if row["used_s"] is not None or row["withdrawn_s"] is not None:
            return {}
        return {"withdrawn_s": self._now_s}
