"""Who is registered, as of a moment ago: so that nothing is kept of senders that nobody knows.

Whether an update counts is decided from the database (`aggregator.committer`); this only spares it chunks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from aggregator.store.devices import Devices, RegisteredKey
from fl_protocol.recency import happened_within

KNOWN_FOR_S = 60.0
"""A device that was registered is taken for registered this long."""
UNKNOWN_FOR_S = 2.0
"""One that was not may be registered soon."""
MOST_NAMES = 200_000


class RegisterCache:
    """See the module docstring.

    Args:
        devices: the register.
    """

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._known: OrderedDict[str, tuple[RegisteredKey | None, float]] = OrderedDict()

    def look_up(self, names: Iterable[str], now_s: float) -> None:
        """Ask the database about all names that are not known, at once. Raises DatabaseError."""
        unknown = {name for name in names if not self._is_fresh(name, now_s)}
        if not unknown:
            return
        found = self._devices.find(unknown)
        for name in unknown:
            self._known[name] = (found.get(name), now_s)
            self._known.move_to_end(name)
        while len(self._known) > MOST_NAMES:
            self._known.popitem(last=False)

    def forget(self, now_s: float) -> None:
        """Forget names that would have to be looked up again in any case."""
        while self._known:
            name, (_, asked_s) = next(iter(self._known.items()))
            if now_s - asked_s < KNOWN_FOR_S:
                break
            del self._known[name]

    def is_registered(self, name: str, now_s: float) -> bool:
        """Whether a name that was looked up may send now."""
        key, _ = self._known.get(name, (None, 0.0))
        return key is not None and key.holds_at(now_s)

    def _is_fresh(self, name: str, now_s: float) -> bool:
        """Whether what is known of a name is young enough."""
        if name not in self._known:
            return False
        key, asked_s = self._known[name]
        return happened_within(UNKNOWN_FOR_S if key is None else KNOWN_FOR_S, asked_s, now_s)
