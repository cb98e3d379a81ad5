"""What became of a task's rounds, as curves: read anew once a round, for all pages that show them."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from aggregator.api.answers import Spent
from aggregator.api.guard import ApiServices
from aggregator.device_budget import TaskBudget
from aggregator.in_force import config_of
from aggregator.model_report import model_reports
from aggregator.overview import TaskOverview

MOST_ROUNDS = 5000
"""Newest rounds that are shown."""
MOST_REMEMBERED = 100
Points = list[tuple[int, float]]
"""Number of the round, and a value."""


@dataclass(frozen=True)
class History:
    """A task's curves.

    Args:
        accuracy: on the operator's validation set, 0 to 1; none without one.
        loss: the same.
        record_epsilon: of one record of a device that took part in every round behind a version.
        device_epsilon: of all that one device gave, against whom the budget is, or against the aggregator.
        spent: what everything so far has cost, with the budget line.
        bytes_up: of a round's updates.
        updates: that counted in a round.
    """

    accuracy: Points = field(default_factory=list)
    loss: Points = field(default_factory=list)
    record_epsilon: Points = field(default_factory=list)
    device_epsilon: Points = field(default_factory=list)
    spent: Spent | None = None
    bytes_up: Points = field(default_factory=list)
    updates: Points = field(default_factory=list)


class HistoryBook:
    """See the module docstring; may be used by several threads.

    Args:
        services: of the API.
    """

    def __init__(self, services: ApiServices) -> None:
        self._services, self._lock = services, threading.Lock()
        self._known: OrderedDict[str, tuple[object, History]] = OrderedDict()

    def of(self, task: TaskOverview) -> History:
        """The curves of a task as it stands. Raises DatabaseError."""
        as_of = stage_of(task)
        with self._lock:  # one reads, the others wait for what it finds
            known = self._known.get(task.name)
            if known is None or known[0] != as_of:
                known = self._known[task.name] = (as_of, self._read(task.name))
                while len(self._known) > MOST_REMEMBERED:
                    self._known.popitem(last=False)
        return known[1]

    def _read(self, task: str) -> History:
        store = self._services.store
        reports = self._services.rounds.reports(task, store.rounds.page(task, limit=MOST_ROUNDS))
        closed = [one for one in reversed(reports) if one.closed_s is not None]
        measured: dict[str, Points] = {name: [] for name in ("validation_accuracy", "validation_loss", "bytes_up")}
        for one in closed:
            for name, points in measured.items():
                value = one.metrics.get(name)
                if isinstance(value, (int, float)) and math.isfinite(value):
                    points.append((one.number, float(value)))
        versions = [one for one in model_reports(store, task) if one.round is not None]
        return History(
            accuracy=measured["validation_accuracy"],
            loss=measured["validation_loss"],
            record_epsilon=[
                (one.round, one.record_epsilon)
                for one in versions
                if one.round is not None and one.record_epsilon is not None
            ],
            device_epsilon=self._device_level(task),
            spent=self._services.privacy.spent(task),
            bytes_up=measured["bytes_up"],
            updates=[(one.number, float(one.arrived)) for one in closed],
        )

    def _device_level(self, task: str) -> Points:
        """What all that one device gave has cost, against whom the budget is."""
        stored = self._services.store.tasks.get(task)
        config = config_of(stored.spec, task) if stored.spec else None
        spent = self._services.privacy.spent(task)
        if config is None or config.secure is None or spent.device_aggregator is None:
            return []
        budget = TaskBudget(self._services.store, config, update_length=1)  # which only a round to come would need
        course = budget.course(spent.budget_against or "aggregator", delta=spent.device_delta)
        return [one for one in course if math.isfinite(one[1])]


def stage_of(task: TaskOverview) -> tuple[object, ...]:
    """Changes whenever a curve does."""
    return task.phase, task.round, task.committed, task.version
