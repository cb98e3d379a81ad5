"""Everything about one task that an operator may want to know: settings, state, rounds, results, orders."""

from __future__ import annotations

from typing import Any

import msgspec

from aggregator.federated_results import FederatedResult, from_metrics
from aggregator.in_force import config_of
from aggregator.lineage_privacy import spent_on
from aggregator.overview import TaskOverview, task_overview
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.rounds import RoundRecord
from aggregator.store.tasks import Order
from aggregator.task_file import TaskConfig


class RoundReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a round.

    Args:
        outcome: open, closing, committed, aborted or rejected.
        version: of the model that it trained.
        arrived: updates that count in it.
        late: updates that came while it was open, too late for theirs.
        seconds: how long it was open; None while it is.
        result: of an evaluation or of statistics.
        metrics: what else the coordinator noted.
    """

    number: int
    outcome: str
    reason: str
    opened_s: float
    deadline_s: float
    closed_s: float | None
    seconds: float | None
    version: int
    probability: float
    arrived: int
    late: int
    metrics: dict[str, Any]
    result: FederatedResult | None = None


class OrderReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator asked for, and what came of it: `outcome` is empty while it waits."""

    id: int
    name: str
    argument: str
    asked_s: float
    done_s: float | None
    outcome: str


class TaskReport(msgspec.Struct, frozen=True, kw_only=True):
    """See the module docstring.

    Args:
        settings: those of its file, defaults left out.
        privacy: what all its committed rounds have cost a wearer who took part in each.
    """

    state: TaskOverview
    created_s: float
    settings: dict[str, Any]
    privacy: str
    rounds: list[RoundReport]
    orders: list[OrderReport]


def task_report(store: AggregatorStore, name: str, *, last: int | None = None) -> TaskReport:
    """Look at a task.

    Args:
        store: the database.
        name: of the task.
        last: how many of its newest rounds; all if not given.

    Raises:
        DatabaseError: there is none of this name, or the database fails.
    """
    task = store.tasks.get(name)
    config = config_of(task.spec, name) if task.spec else None
    committed = task.state.committed
    who = f"one record of a device that took part in all {committed} committed rounds"
    _, privacy = spent_on([(config.plan_message() if config is not None else None, committed)], who=who)
    return TaskReport(
        state=task_overview(task),
        created_s=task.created_s,
        settings=settings_of(config) if config is not None else {},
        privacy=privacy,
        rounds=[round_report(record) for record in store.rounds.history(name, last=last)],
        orders=[order_report(order) for order in store.tasks.orders(name)],
    )


def settings_of(config: TaskConfig) -> dict[str, Any]:
    """A task's settings, defaults left out."""
    settings: dict[str, Any] = msgspec.to_builtins(config)
    return settings


def flat(settings: dict[str, Any], *, under: str = "") -> list[tuple[str, str]]:
    """Nested settings as names with dots and their values."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            rows += flat(value, under=f"{under}{name}.")
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            for number, one in enumerate(value):
                rows += flat(one, under=f"{under}{name}.{number}.")
        else:
            plain = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            rows.append((f"{under}{name}", plain))
    return rows


def order_report(order: Order) -> OrderReport:
    """One order."""
    return OrderReport(
        id=order.id,
        name=order.name,
        argument=order.argument,
        asked_s=order.asked_s,
        done_s=order.done_s,
        outcome=order.outcome,
    )


def round_report(record: RoundRecord) -> RoundReport:
    """One round."""
    metrics = dict(record.metrics)
    result = metrics.pop("result", None)
    return RoundReport(
        number=record.number,
        outcome=record.outcome,
        reason=record.reason,
        opened_s=record.opened_s,
        deadline_s=record.deadline_s,
        closed_s=record.closed_s,
        seconds=round(record.closed_s - record.opened_s, 3) if record.closed_s is not None else None,
        version=record.version,
        probability=record.probability,
        arrived=record.arrived,
        late=record.late,
        metrics=metrics,
        result=from_metrics(result) if result is not None else None,
    )
