"""How the fleet stands, counted beside whoever looks: with 10,000 devices that takes a tenth of a second and more.

So it is counted anew at most once a second, and no more than a tenth of the time, on a thread of its own; the first
time is waited for.
"""

from __future__ import annotations

import threading

from aggregator.api.guard import ApiServices
from aggregator.errors import AggregatorError
from aggregator.overview import fleet_counts
from aggregator.store.presence import FleetCounts

COUNT_EVERY_S = 1.0
MOST_SHARE = 0.1


class FleetBook:
    """See the module docstring; may be used by several threads.

    Args:
        services: of the API.
    """

    def __init__(self, services: ApiServices) -> None:
        self._services, self._lock = services, threading.Lock()
        self._known: FleetCounts | None = None
        self._due_s = 0.0
        self._is_counting = False

    def counts(self) -> FleetCounts:
        """How the fleet stood when it was last counted. Raises DatabaseError: the first count fails."""
        with self._lock:
            known = self._known
            if known is not None and not self._is_counting and self._services.monotonic_s() >= self._due_s:
                self._is_counting = True
                threading.Thread(target=self._count_again, name="fleet", daemon=True).start()
        return known if known is not None else self._count()

    def _count_again(self) -> None:
        try:
            self._count()
        except AggregatorError:  # whoever looks is told by the reading beside it
            with self._lock:
                self._is_counting = False

    def _count(self) -> FleetCounts:
        services = self._services
        began_s = services.monotonic_s()
        found = fleet_counts(services.store, now_s=services.now_s())
        ended_s = services.monotonic_s()
        with self._lock:
            self._known, self._is_counting = found, False
            self._due_s = ended_s + max(COUNT_EVERY_S, (ended_s - began_s) / MOST_SHARE)
        return found
