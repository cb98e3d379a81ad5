"""Listens to devices' presence, while its process coordinates, and writes it down a thousand names at a time.

There is one listener, the coordinator; another one takes over with the coordinator's lease, and is told of everybody
anew, since presence is retained. What comes is untrusted: what is malformed, too long or of nobody is counted by
reason and dropped. Memory is bounded by `MOST_WAITING` names; what does not fit while the database is away is asked
for again when it is back.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.presence import MOST_AT_ONCE, PresenceBook
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import PresenceMsg, decode
from fl_protocol.recency import happened_within
from fl_protocol.topics import is_state_topic, parse_state_topic, state_filter
from fl_protocol.transport import Connected, Disconnected, Received, Transport, TransportEvent

WRITE_EVERY_S = 2.0
"""How long at most something heard waits to be written with others."""
LONGEST_BYTES = 256
"""Of a presence: the longest well-formed one has 127."""
MOST_WAITING = 20_000
"""Names that were heard and are not written."""
EVERYBODY_WITHIN_S = 60.0
"""After how long the broker has told of everybody that it knows."""
TIDY_EVERY_S = 3600.0

Refusal = Literal["presence_malformed", "presence_oversized", "presence_misplaced", "presence_unknown"]


class FleetWatch:
    """See the module docstring; the coordinator feeds it events, and tells it whether it leads.

    Args:
        tenant: name on the wire.
        store: where it is written.
        transport: the broker connection.
        now_s: Unix seconds.

    Attributes:
        refused: what was not taken and is not stored yet, by reason.
    """

    def __init__(
        self, *, tenant: str, store: AggregatorStore, transport: Transport, now_s: Callable[[], float]
    ) -> None:
        self._tenant, self._store, self._transport, self._now_s = tenant, store, transport, now_s
        self._book = PresenceBook(store.database)
        self._waiting: dict[str, PresenceMsg | None] = {}
        self._state = _Listening()
        self.refused: Counter[Refusal] = Counter()

    def take(self, events: Sequence[TransportEvent]) -> list[TransportEvent]:
        """Take what devices say of themselves; the other events."""
        others: list[TransportEvent] = []
        for event in events:
            if isinstance(event, Received) and is_state_topic(event.topic, self._tenant):
                try:
                    self._hear(event)
                finally:
                    self._transport.acknowledge(event)
                continue
            if isinstance(event, Connected | Disconnected):
                self._state = _Listening(may_be_kept=isinstance(event, Connected) and event.session_present)
            others.append(event)
        return others

    def look_after(self, *, leads: bool) -> None:
        """Subscribe or leave, and write what waits if it is time; while connected. Raises DatabaseError."""
        now_s, state = self._now_s(), self._state
        if not leads:
            if state.since_s is not None or state.may_be_kept:
                self._transport.unsubscribe(state_filter(self._tenant))
                self._state = _Listening()
            self._waiting.clear()
            return
        if state.since_s is None:
            self._transport.subscribe(state_filter(self._tenant))
            state = self._state = _Listening(since_s=now_s, written_s=now_s, tidied_s=now_s - TIDY_EVERY_S)
        if len(self._waiting) >= MOST_AT_ONCE or not happened_within(WRITE_EVERY_S, state.written_s, now_s):
            self._write(now_s)
        self._tidy(now_s)

    def _hear(self, event: Received) -> None:
        """Take one message, or count it as refused."""
        if len(event.payload) > LONGEST_BYTES:
            self.refused["presence_oversized"] += 1
            return
        try:
            device = parse_state_topic(event.topic, self._tenant)
        except ProtocolError:
            self.refused["presence_misplaced"] += 1
            return
        if self._state.since_s is None:  # of an earlier subscription: whoever leads hears it
            return
        if device not in self._waiting and len(self._waiting) >= MOST_WAITING:
            self._state = self._state._replace(is_incomplete=True)
            return
        try:
            self._waiting[device] = decode(event.payload, PresenceMsg) if event.payload else None
        except ProtocolError:
            self.refused["presence_malformed"] += 1

    def _write(self, now_s: float) -> None:
        """Write what waits, at most a thousand names of it, and what was refused. Raises DatabaseError."""
        names = list(self._waiting)[:MOST_AT_ONCE]
        if names:
            self.refused["presence_unknown"] += self._book.write(
                {name: self._waiting[name] for name in names}, now_s=now_s
            )
            for name in names:
                del self._waiting[name]
        self._state = self._state._replace(written_s=now_s)
        if self._state.is_incomplete and not self._waiting:  # have the broker tell of everybody again
            self._transport.unsubscribe(state_filter(self._tenant))
            self._state = _Listening()
        if any(self.refused.values()):
            with self._store.database.transaction() as connection:
                self._store.count_refusals(connection, Counter({("", why): n for why, n in self.refused.items()}))
            self.refused.clear()

    def _tidy(self, now_s: float) -> None:
        """Note who has gone without a word, once the broker has told of everybody, and now and then. As above."""
        since_s, tidied_s = self._state.since_s, self._state.tidied_s
        if since_s is None or now_s < since_s + EVERYBODY_WITHIN_S or self._waiting:
            return
        if not happened_within(TIDY_EVERY_S, tidied_s, now_s):
            self._book.forget_unheard(since_s=since_s, now_s=now_s)
            self._state = self._state._replace(tidied_s=now_s)


class _Listening(NamedTuple):
    """Where the subscription stands.

    Args:
        since_s: when it was made; None while there is none.
        may_be_kept: whether the broker may still have one of an earlier connection.
        is_incomplete: whether something was dropped for want of room.
    """

    since_s: float | None = None
    written_s: float = -math.inf
    tidied_s: float = -math.inf
    may_be_kept: bool = False
    is_incomplete: bool = False
