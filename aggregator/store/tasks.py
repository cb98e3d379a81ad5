"""Tasks: what an operator asked for, and where each one stands; and the operator's orders to the coordinator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

from sqlalchemy import Connection, Row, func, insert, select, update

from aggregator.audit.log import AuditEvent, append
from aggregator.errors import ConflictError, DatabaseError
from aggregator.rounds import Phase, RoundState
from aggregator.store import schema
from aggregator.store.database import Database

OrderName = Literal["pause", "pause_now", "resume", "abort", "rollback"]
ORDERS: tuple[OrderName, ...] = get_args(OrderName)


class StoredTask(NamedTuple):
    """A task as the database has it.

    Args:
        spec: the task file; empty for a task from before there were such files.
        bundle: blob of the model bundle; empty with `spec`.
        validation: blob of the operator's validation set, if there is one.
        probability: participation probability of the next round.
        created_s: Unix seconds.
    """

    name: str
    spec: str
    bundle: str
    validation: str | None
    graph_digest: bytes
    state: RoundState
    probability: float
    created_s: float


class Order(NamedTuple):
    """What an operator asked for, and what came of it (`done_s` is None until then)."""

    id: int
    task: str
    name: OrderName
    argument: str
    asked_s: float
    done_s: float | None
    outcome: str


_SPECS = select(schema.tasks.c.task, schema.tasks.c.spec)  # built once, for every commit asks it


class Tasks:
    """All tasks of the database. Methods without a `Connection` are one transaction; all raise DatabaseError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        connection: Connection,
        name: str,
        *,
        spec: str,
        bundle: str,
        validation: str | None,
        graph_digest: bytes,
        probability: float,
        now_s: float,
    ) -> bool:
        """Add a task, or give its file to one from before there were files; part of a transaction.

        Returns:
            Whether it is new, and so needs its first model.

        Raises:
            DatabaseError: there is one of this name.
        """
        table = schema.tasks
        known = connection.execute(select(table.c.spec, table.c.graph_digest).where(table.c.task == name)).one_or_none()
        if known is None:
            fields = {"phase": Phase.IDLE.value, "number": 0, "committed": 0, "version": 0, "pausing": False}
            connection.execute(
                insert(table).values(
                    task=name,
                    spec=spec,
                    bundle=bundle,
                    validation=validation,
                    graph_digest=graph_digest,
                    failures=0,
                    reason="",
                    probability=probability,
                    created_s=now_s,
                    **fields,
                )
            )
            return True
        if known.spec:
            raise DatabaseError(f"there is a task {name} already; give the new one another name")
        if known.graph_digest != graph_digest:
            raise DatabaseError(f"task {name} was begun with another model graph; give the new one another name")
        connection.execute(
            update(table)
            .where(table.c.task == name)
            .values(spec=spec, bundle=bundle, validation=validation, probability=probability)
        )
        return False

    def all(self) -> list[StoredTask]:
        """Every task, by name, as the last transactions left it."""
        with self._database.reading() as connection:
            rows = connection.execute(select(schema.tasks).order_by(schema.tasks.c.task)).all()
            return [_task(connection, row) for row in rows]

    def specs(self) -> dict[str, str]:
        """Every task's file, by name."""
        with self._database.reading() as connection:
            return {task: spec for task, spec in connection.execute(_SPECS)}  # noqa: C416 - rows are no pairs

    def get(self, name: str) -> StoredTask:
        """One task. Raises DatabaseError also when there is none of this name."""
        with self._database.reading() as connection:
            row = connection.execute(select(schema.tasks).where(schema.tasks.c.task == name)).one_or_none()
            if row is None:
                raise DatabaseError(f"there is no task {name}; see covey-aggregator task list")
            return _task(connection, row)

    def save(
        self, connection: Connection, name: str, state: RoundState, *, before: RoundState, probability: float
    ) -> None:
        """Store where a task stands, as part of a transaction; the open round's own row is `Rounds`' business.

        Args:
            connection: of the transaction.
            name: of the task.
            state: where it stands now.
            before: where it stood.
            probability: participation probability of the next round.

        Raises:
            ConflictError: the task has moved on meanwhile: another coordinator believes that it leads.
        """
        table = schema.tasks.c
        unmoved = [
            table.task == name,
            table.phase == before.phase.value,
            table.number == before.number,
            table.committed == before.committed,
            table.version == before.version,
        ]
        changed = connection.execute(
            update(schema.tasks)
            .where(*unmoved)
            .values(
                phase=state.phase.value,
                number=state.number,
                committed=state.committed,
                version=state.version,
                pausing=state.pausing,
                failures=state.failures,
                reason=state.reason,
                probability=probability,
            )
        )
        if changed.rowcount != 1:
            raise ConflictError(f"task {name} is not where it was: another coordinator has moved it on")

    def ask(self, task: str, name: OrderName, *, argument: str = "", now_s: float, actor: str = "aggregator") -> int:
        """Leave an order of somebody's for the coordinator; its id."""
        with self._database.transaction() as connection:
            row = {"task": task, "name": name, "argument": argument, "asked_s": now_s, "outcome": ""}
            order = int(
                connection.execute(insert(schema.orders).values(row).returning(schema.orders.c.id)).scalar_one()
            )
            append(connection, AuditEvent(now_s, actor, f"order.{name}", task, {"order": order, "argument": argument}))
            return order

    def pending_orders(self) -> list[Order]:
        """Orders that were not carried out, oldest first."""
        table = schema.orders
        with self._database.reading() as connection:
            rows = connection.execute(select(table).where(table.c.done_s.is_(None)).order_by(table.c.id))
            return [Order(*row) for row in rows]

    def orders(self, task: str) -> list[Order]:
        """All orders for a task, oldest first."""
        table = schema.orders
        with self._database.reading() as connection:
            rows = connection.execute(select(table).where(table.c.task == task).order_by(table.c.id))
            return [Order(*row) for row in rows]

    def order_done(self, connection: Connection, order_id: int, *, outcome: str, now_s: float) -> None:
        """Note what came of an order, as part of the transaction that carries it out."""
        table = schema.orders
        connection.execute(update(table).where(table.c.id == order_id).values(done_s=now_s, outcome=outcome))


def _task(connection: Connection, row: Row[Any]) -> StoredTask:
    """A row, with what the open round's rows add to it."""
    state = RoundState(
        phase=Phase(row.phase),
        number=row.number,
        committed=row.committed,
        version=row.version,
        pausing=row.pausing,
        failures=row.failures,
        reason=row.reason,
    )
    if state.phase in {Phase.OPEN, Phase.UNMASKING}:
        rounds, partials = schema.rounds.c, schema.partials.c
        opened = connection.execute(
            select(rounds.opened_s, rounds.deadline_s).where(rounds.task == row.task, rounds.number == state.number)
        ).one()
        arrived = connection.execute(
            select(func.coalesce(func.sum(partials.count), 0)).where(
                partials.task == row.task, partials.counted_in == state.number
            )
        ).scalar_one()
        state = replace(state, arrived=int(arrived), opened_s=opened.opened_s, deadline_s=opened.deadline_s)
    return StoredTask(
        row.task, row.spec, row.bundle, row.validation, row.graph_digest, state, row.probability, row.created_s
    )
