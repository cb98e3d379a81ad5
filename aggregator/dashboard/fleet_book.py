"""How many devices are in which state: counted at most once a second, for all pages that show it."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from aggregator.api.guard import ApiServices
from aggregator.store.operator_views import names_by_state

COUNT_EVERY_S = 0.5


class FleetBook:
    """See the module docstring; may be used by several threads.

    Args:
        services: of the API.
    """

    def __init__(self, services: ApiServices) -> None:
        self._services, self._lock = services, threading.Lock()
        self._known: Mapping[str, int] = {}
        self._counted_s = -COUNT_EVERY_S

    def states(self) -> Mapping[str, int]:
        """How many registered names are active, quarantined and revoked. Raises DatabaseError."""
        with self._lock:  # one counts, the others wait for what it finds
            if self._services.monotonic_s() - self._counted_s >= COUNT_EVERY_S:
                with self._services.store.database.reading() as connection:
                    self._known = names_by_state(connection)
                self._counted_s = self._services.monotonic_s()
            return self._known
