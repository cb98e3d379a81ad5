"""What tasks have cost, remembered until another sum or round is added: accounting hundreds of sums takes a while."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, defaultdict

from sqlalchemy import func, select

from aggregator.api.answers import Spent
from aggregator.device_budget import DELTA as DEVICE_DELTA
from aggregator.device_budget import TaskBudget
from aggregator.in_force import config_of
from aggregator.lineage_privacy import DELTA, spent_on
from aggregator.store import schema
from aggregator.store.aggregator_store import AggregatorStore

MOST_REMEMBERED = 1000
_Known = tuple[str, int, int]


class PrivacyBook:
    """See the module docstring; may be used by several threads.

    Args:
        store: the database.
    """

    def __init__(self, store: AggregatorStore) -> None:
        self._store = store
        self._known: OrderedDict[str, tuple[_Known, Spent]] = OrderedDict()
        self._lock = threading.Lock()
        self._accounting: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def spent(self, task: str) -> Spent:
        """What a task has cost so far; it must exist. Raises DatabaseError."""
        rounds, tasks = schema.rounds.c, schema.tasks.c
        with self._store.database.reading() as connection:
            row = connection.execute(select(tasks.spec, tasks.committed).where(tasks.task == task)).one()
            asked = select(func.count(), func.max(rounds.update_length)).where(
                rounds.task == task, rounds.asked_s.is_not(None)
            )
            sums, length = connection.execute(asked).one()
        as_of = (row.spec, row.committed, sums)
        with self._lock:
            alone = self._accounting[task]
        with alone:  # one accounts for a task, others that ask for it wait for what it finds
            found = self._remembered(task, as_of)
            if found is None:
                found = self._account(task, row.spec, row.committed, sums=sums, update_length=length or 1)
                self._remember(task, as_of, found)
        return found

    def _remembered(self, task: str, as_of: _Known) -> Spent | None:
        """What is known, if nothing has been added since."""
        with self._lock:
            known = self._known.get(task)
            return known[1] if known is not None and known[0] == as_of else None

    def _remember(self, task: str, as_of: _Known, found: Spent) -> None:
        """Keep it, and forget what was found longest ago."""
        with self._lock:
            self._known[task] = (as_of, found)
            self._known.move_to_end(task)
            while len(self._known) > MOST_REMEMBERED:
                forgotten, _ = self._known.popitem(last=False)
                self._accounting.pop(forgotten, None)

    def _account(self, task: str, spec: str, committed: int, *, sums: int, update_length: int) -> Spent:
        """Account everything that was committed or asked for."""
        config = config_of(spec, task) if spec else None
        who = f"one record of a device that took part in all {committed} committed rounds"
        record, words = spent_on([(config.plan_message() if config is not None else None, committed)], who=who)
        section = config.device_privacy if config is not None else None
        delta = section.delta if section is not None else DEVICE_DELTA
        device: dict[str, float | None] = {"aggregator": None, "model_release": None}
        if config is not None and config.secure is not None:
            budget = TaskBudget(self._store, config, update_length=update_length)
            device = {name: _finite(budget.epsilon(name, delta=delta)) for name in device}
        return Spent(
            task=task,
            committed=committed,
            record=record,
            record_delta=DELTA,
            record_words=words,
            sums=sums,
            device_aggregator=device["aggregator"],
            device_release=device["model_release"],
            device_delta=delta,
            budget=None if section is None else section.epsilon,
            budget_against=None if section is None else section.adversary,
        )


def _finite(epsilon: float) -> float | None:
    """None where there is no bound."""
    return epsilon if math.isfinite(epsilon) else None
