"""Rounds: their keys while an update of theirs can count, and what became of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import Connection, ScalarSelect, Table, bindparam, func, insert, select, update

from aggregator.errors import ConflictError
from aggregator.store import schema
from aggregator.store.database import Database
from fl_protocol.sealing import RoundKey

Outcome = Literal["open", "closing", "committed", "aborted", "rejected"]
"""A closing round takes no more updates; it is being combined."""


class LiveRound(NamedTuple):
    """A round whose updates can still be opened: the open one, or for asynchronous tasks one shortly before.

    Args:
        number: of the round.
        version: of the model that it trains.
        model_digest: of that model.
        update_length: numbers in an update.
        outcome: where it stands.
        key: that its updates are sealed to.
        sums_secret: under which its sums are stored; None once it is closed.
        manifest: that contributions are bound to, encoded; None where updates are not masked, or before it was first
            published.
    """

    task: str
    number: int
    version: int
    model_digest: bytes
    update_length: int
    outcome: Outcome
    key: RoundKey
    sums_secret: bytes | None
    manifest: bytes | None = None


class AskedRound(NamedTuple):
    """A secure round whose helpers were asked for the sum of their masks: with that the sum may be known.

    Args:
        manifest: encoded; None of a round that was lost with the database (`aggregator.lost_sums`).
        opened_s: Unix seconds, by the clock as it was when its helpers were asked.
        asked_s: Unix seconds.
        arrived: updates in the sum; 0 of a lost round.
        update_length: numbers in an update.
    """

    number: int
    manifest: bytes | None
    opened_s: float
    asked_s: float
    arrived: int
    update_length: int


class RoundRecord(NamedTuple):
    """What became of a round, for people; `metrics` as the coordinator noted them."""

    number: int
    outcome: Outcome
    reason: str
    opened_s: float
    deadline_s: float
    closed_s: float | None
    version: int
    probability: float
    arrived: int
    late: int
    metrics: dict[str, Any]


_TABLE = schema.rounds.c
# Built once, for every commit asks them.
_LIVE = select(schema.rounds).where(_TABLE.secret.is_not(None))
_OUTCOME = {
    shared: select(_TABLE.outcome)
    .where(_TABLE.task == bindparam("task"), _TABLE.number == bindparam("number"))
    .with_for_update(read=shared)
    for shared in (False, True)
}


class Rounds:
    """All rounds of all tasks. Methods without a `Connection` are one transaction; all raise DatabaseError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def live(self) -> list[LiveRound]:
        """Every round whose updates can still be opened."""
        with self._database.reading() as connection:
            rows = connection.execute(_LIVE).all()
        return [
            LiveRound(
                row.task,
                row.number,
                row.version,
                row.model_digest,
                row.update_length,
                row.outcome,
                RoundKey(row.kem, row.secret),
                row.sums_secret,
                row.manifest,
            )
            for row in rows
        ]

    def open(
        self,
        connection: Connection,
        task: str,
        number: int,
        *,
        opened_s: float,
        deadline_s: float,
        key: RoundKey,
        sums_secret: bytes,
        version: int,
        model_digest: bytes,
        update_length: int,
        probability: float,
    ) -> None:
        """Add an open round with its private key and its sums' secret, as part of a transaction."""
        connection.execute(
            insert(schema.rounds).values(
                task=task,
                number=number,
                outcome="open",
                reason="",
                opened_s=opened_s,
                deadline_s=deadline_s,
                kem=key.kem,
                secret=key.secret,
                sums_secret=sums_secret,
                version=version,
                model_digest=model_digest,
                update_length=update_length,
                probability=probability,
                late=0,
                metrics="{}",
            )
        )

    def set_manifest(self, connection: Connection, task: str, number: int, manifest: bytes) -> None:
        """Keep the manifest that a round's contributions are bound to; part of a transaction before it is published.

        Raises:
            ConflictError: it has one already.
        """
        changed = connection.execute(
            _round(task, number).where(schema.rounds.c.manifest.is_(None)).values(manifest=manifest)
        )
        # Security: devices that acted on two manifests of one round would be in no list together.
        if changed.rowcount != 1:
            raise ConflictError(f"round {number} of {task} has a manifest already: another coordinator runs")

    def ask(self, connection: Connection, task: str, number: int, *, opened_s: float, asked_s: float) -> None:
        """Note that a round's helpers are about to be asked; part of the transaction that closes it to updates.

        Args:
            connection: with the transaction.
            task: of the round.
            number: of the round.
            opened_s: when it opened, by a clock that may have been set since, Unix seconds.
            asked_s: Unix seconds.
        """
        not_yet = _round(task, number).where(schema.rounds.c.asked_s.is_(None))
        connection.execute(not_yet.values(opened_s=opened_s, asked_s=asked_s))

    def asked(self, task: str) -> list[AskedRound]:
        """Every round of a task whose helpers were asked, whatever came of it, in order."""
        table = schema.rounds
        query = (
            select(
                *(table.c.number, table.c.manifest, table.c.opened_s, table.c.asked_s),
                *(_arrived(table), table.c.update_length),
            )
            .where(table.c.task == task, table.c.asked_s.is_not(None))
            .order_by(table.c.number)
        )
        with self._database.reading() as connection:
            return [AskedRound(*row) for row in connection.execute(query)]

    def update_length(self, task: str) -> int:
        """Numbers in the longest update that helpers were asked for; 1 before that."""
        table = schema.rounds.c
        query = select(func.max(table.update_length)).where(table.task == task, table.asked_s.is_not(None))
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar() or 1)

    def last_metric(self, task: str, name: str) -> float | None:
        """A number that the newest committed round's metrics have; None if it has none, or there is no such round."""
        table = schema.rounds.c
        query = (
            select(table.metrics)
            .where(table.task == task, table.outcome == "committed")
            .order_by(table.number.desc())
            .limit(1)
        )
        with self._database.reading() as connection:
            metrics = connection.execute(query).scalar()
        found = msgspec.json.decode(metrics).get(name) if metrics else None
        return None if found is None else float(found)

    def extend(self, connection: Connection, task: str, number: int, deadline_s: float) -> None:
        """Move an open round's deadline, as part of a transaction."""
        connection.execute(_round(task, number).values(deadline_s=deadline_s))

    def mark(self, connection: Connection, task: str, number: int, outcome: Literal["open", "closing"]) -> None:
        """Stop taking updates, or take them again; part of a transaction."""
        connection.execute(_round(task, number).values(outcome=outcome))

    def is_open(self, connection: Connection, task: str, number: int, *, alone: bool = False) -> bool:
        """Whether a round takes updates; that stays so until the end of this transaction.

        Args:
            connection: with the transaction.
            task: of the round.
            number: of the round.
            alone: whether nobody else may look meanwhile, because this transaction counts late updates in it (of two
                that looked, each would wait for the other to let it write) or depends on what others count in it.
        """
        return self.outcome(connection, task, number, shared=not alone) == "open"

    def outcome(self, connection: Connection, task: str, number: int, *, shared: bool = False) -> str | None:
        """Where a round stands, until the end of this transaction; `shared`: others may look meanwhile, too."""
        return connection.execute(_OUTCOME[shared], {"task": task, "number": number}).scalar()

    def close(
        self,
        connection: Connection,
        task: str,
        number: int,
        *,
        outcome: Outcome,
        reason: str,
        metrics: dict[str, Any],
        now_s: float,
    ) -> None:
        """Say what became of a round, and erase its sums' secret; part of a transaction."""
        described = msgspec.json.encode(metrics).decode()
        closed = {"outcome": outcome, "reason": reason, "metrics": described, "closed_s": now_s}
        # Security: from here on the sums of few updates each, in copies of the blobs too, can be opened by nobody.
        connection.execute(_round(task, number).values(**closed, sums_secret=None))

    def erase_keys(self, connection: Connection, task: str, *, up_to: int) -> None:
        """Erase the private keys of rounds up to this number: their updates can never be opened again."""
        table = schema.rounds
        here = (table.c.task == task) & (table.c.number <= up_to) & table.c.secret.is_not(None)
        connection.execute(update(table).where(here).values(secret=None))

    def count_late(self, connection: Connection, late: Mapping[tuple[str, int], int]) -> None:
        """Add to the counts of updates that came, too late for theirs, while a round, (task, number), was open."""
        for (task, number), count in sorted(late.items()):
            connection.execute(_round(task, number).values(late=schema.rounds.c.late + count))

    def late(self, connection: Connection, task: str, number: int) -> int:
        """Updates that came too late for theirs while a round was open; part of a transaction."""
        table = schema.rounds.c
        query = select(table.late).where(table.task == task, table.number == number)
        return int(connection.execute(query).scalar() or 0)

    def page(self, task: str, *, before: int | None = None, limit: int) -> list[tuple[int, bool]]:
        """Numbers of a task's rounds, newest first, and whether each is closed: nothing of it changes any more."""
        table = schema.rounds.c
        query = select(table.number, table.closed_s).where(table.task == task).order_by(table.number.desc())
        query = query if before is None else query.where(table.number < before)
        with self._database.reading() as connection:
            return [(row.number, row.closed_s is not None) for row in connection.execute(query.limit(limit))]

    def history(
        self, task: str, *, last: int | None = None, numbers: Collection[int] | None = None, only_seen: bool = False
    ) -> list[RoundRecord]:
        """What became of a task's rounds, oldest first.

        Args:
            task: that they are of.
            last: only so many, the newest.
            numbers: only those with these numbers.
            only_seen: without those that were lost with a database (`aggregator.lost_sums`): who was in them?
        """
        table = schema.rounds
        query = (
            select(table, _arrived(table).label("arrived")).where(table.c.task == task).order_by(table.c.number.desc())
        )
        if numbers is not None:
            query = query.where(table.c.number.in_(list(numbers)))
        if only_seen:
            query = query.where(table.c.kem != "")
        with self._database.reading() as connection:
            rows = connection.execute(query.limit(last) if last is not None else query).all()
        return [
            RoundRecord(
                row.number,
                row.outcome,
                row.reason,
                row.opened_s,
                row.deadline_s,
                row.closed_s,
                row.version,
                row.probability,
                row.arrived,
                row.late,
                msgspec.json.decode(row.metrics),
            )
            for row in reversed(rows)
        ]


def _arrived(table: Table) -> ScalarSelect[int]:
    """How many updates count in each round."""
    updates = schema.updates.c
    return (
        select(func.count()).where(updates.task == table.c.task, updates.counted_in == table.c.number).scalar_subquery()
    )


def _round(task: str, number: int) -> Any:
    """An update of one round's row."""
    return update(schema.rounds).where(schema.rounds.c.task == task, schema.rounds.c.number == number)
