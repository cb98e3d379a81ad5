"""What an operator has to hear of although nobody did it, as entries of the audit log: budgets that run out, devices
that stay away. Looked for whenever a round has closed; each is told once.

The device-level budget is a task's and is told at 80 %, and when it has no room for another round (`privacy.halted`,
which the task's own transition writes). At record level budgets are kept by the devices, each its own, and what is left
of them is told to nobody.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from aggregator.alerts.events import BUDGET_80, DROPOUT
from aggregator.audit.entries import AuditEvent, Detail
from aggregator.audit.log import append, has_entry
from aggregator.audit.task_entries import AGGREGATOR
from aggregator.device_budget import TaskBudget
from aggregator.errors import DatabaseError
from aggregator.in_force import config_of
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.rounds import RoundRecord
from fl_protocol.errors import CoveyError

WARN_AT = 0.8
"""Share of the budget."""
ROUNDS_BEFORE = 10
FEWEST_BEFORE = 5
"""Rounds that an expectation is taken from: the median of their updates."""
FEWEST_EXPECTED = 10
"""Updates below which half of them may be chance."""


class Alarms:
    """See the module docstring. Raises DatabaseError.

    Args:
        store: the database.
        now_s: Unix seconds.
    """

    def __init__(self, store: AggregatorStore, *, now_s: Callable[[], float]) -> None:
        self._store, self._now_s = store, now_s

    def look(self, tasks: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
        """Look at tasks of which a round has closed; what was found, for the journal."""
        found = []
        for task in tasks:
            found += self._budget(task)
            found += self._dropout(task)
        return found

    def _budget(self, task: str) -> list[tuple[str, dict[str, Any]]]:
        """Whether a task's budget is nearly spent."""
        share = budget_share(self._store, task)
        if share is None or share["epsilon"] < WARN_AT * share["budget"]:
            return []
        return self._once(BUDGET_80, task, share)

    def _dropout(self, task: str) -> list[tuple[str, dict[str, Any]]]:
        """Whether far fewer took part in the last round than in those before it."""
        history = self._store.rounds.history(task, last=ROUNDS_BEFORE + 2, only_seen=True)
        closed = [one for one in history if one.closed_s is not None]
        expected = expected_of(closed[:-1])
        if expected is None or 2 * closed[-1].arrived >= expected:
            return []
        before = expected_of(closed[:-2])
        if before is not None and 2 * closed[-2].arrived < before:
            return []  # as in the round before
        last = closed[-1]
        return self._once(DROPOUT, f"{task}/{last.number}", {"count": last.arrived, "expected": expected})

    def _once(self, action: str, subject: str, detail: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Add an entry unless there is one; what to tell the journal."""
        with self._store.database.transaction() as connection:
            if has_entry(connection, action, subject):
                return []
            told: dict[str, Detail] = detail
            append(connection, AuditEvent(self._now_s(), AGGREGATOR, action, subject, told))
        return [(action.replace(".", "_"), {"subject": subject, **detail})]


def expected_of(closed: list[RoundRecord]) -> float | None:
    """How many updates a round should have after these; None where too few rounds or updates tell nothing."""
    counts = [one.arrived for one in closed[-ROUNDS_BEFORE:]]
    if len(counts) < FEWEST_BEFORE:
        return None
    median = float(statistics.median(counts))
    return median if median >= FEWEST_EXPECTED else None


def budget_share(store: AggregatorStore, task: str) -> dict[str, Any] | None:
    """What a task's device-level budget is and what of it is spent; None without one, or where it cannot be said.

    Raises:
        DatabaseError: the database fails.
    """
    stored = store.tasks.get(task)
    config = config_of(stored.spec, task) if stored.spec else None
    if config is None or config.secure is None or config.device_privacy is None:
        return None
    section = config.device_privacy
    budget = TaskBudget(store, config, update_length=store.rounds.update_length(task))
    try:
        epsilon = budget.epsilon(section.adversary, delta=section.delta)
    except DatabaseError:
        raise
    except CoveyError:  # the next round says so, and does not open
        return None
    return {"epsilon": epsilon, "budget": section.epsilon, "against": section.adversary}
