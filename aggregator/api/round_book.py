"""What became of rounds, remembered once they are closed: counting the updates of hundreds of rounds takes a while."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from aggregator.store.aggregator_store import AggregatorStore
from aggregator.task_report import RoundReport, round_report

MOST_REMEMBERED = 10_000


class RoundBook:
    """See the module docstring; may be used by several threads.

    Args:
        store: the database.
    """

    def __init__(self, store: AggregatorStore) -> None:
        self._store, self._lock = store, threading.Lock()
        self._closed: OrderedDict[tuple[str, int], RoundReport] = OrderedDict()

    def reports(self, task: str, rounds: Sequence[tuple[int, bool]]) -> list[RoundReport]:
        """Reports of rounds in the order given.

        Args:
            task: their task.
            rounds: number of each, and whether it is closed.

        Raises:
            DatabaseError: the database fails.
        """
        with self._lock:
            found = {number: self._closed.get((task, number)) for number, _ in rounds}
        unknown = [number for number, report in found.items() if report is None]
        if unknown:
            fresh = {one.number: round_report(one) for one in self._store.rounds.history(task, numbers=unknown)}
            found.update(fresh)
            closed = [one for one in fresh.values() if one.closed_s is not None]
            with self._lock:
                self._closed.update({(task, one.number): one for one in closed})
                while len(self._closed) > MOST_REMEMBERED:
                    self._closed.popitem(last=False)
        return [report for number, _ in rounds if (report := found[number]) is not None]
