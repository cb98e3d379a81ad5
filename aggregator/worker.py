"""An ingest worker: takes the uploads of the shards that it has leased, until it is stopped or dies.

All that it has promised is in the database. If it dies, its sums are there too; the coordinator adds them up, and other
workers take over its shards when its leases run out. If the database goes away, it keeps what is whole, says so, and
goes on when the database is back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from aggregator.committer import Committer
from aggregator.errors import DatabaseError
from aggregator.intake import Intake
from aggregator.outage import Outage
from aggregator.shards import ALL_SHARDS, LEASE_S, LeaseTerms, plan_shards
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.leases import INGEST, STOPPED
from fl_protocol.adapters.journal import Journal
from fl_protocol.recency import happened_within
from fl_protocol.topics import shard_filter
from fl_protocol.transport import Connected, Disconnected, Received, Transport, TransportEvent

LOOK_EVERY_S = 0.2
"""How often quiet transfers are looked for, and how long the broker may be quiet with messages held."""
NOT_CONNECTED = "not connected to the broker"
LONGEST_COMMIT_S = 10.0
"""How long whole updates wait for room in a batch, before the broker hears nothing any more."""


class IngestWorker:
    """See the module docstring; `AggregatorService` and the worker's own process feed it events.

    Args:
        name: unique among those that share the database.
        tenant: name on the wire.
        store: the database.
        intake: takes chunks and commits updates.
        committer: the intake's.
        transport: the broker connection.
        journal: where events are told.
        now_s: Unix seconds.
        terms: of its leases.
    """

    def __init__(
        self,
        *,
        name: str,
        tenant: str,
        store: AggregatorStore,
        intake: Intake,
        committer: Committer,
        transport: Transport,
        journal: Journal,
        now_s: Callable[[], float],
        terms: LeaseTerms = LeaseTerms(),  # noqa: B008 - frozen
    ) -> None:
        self._terms = terms
        self.name, self._tenant, self._store, self._intake = name, tenant, store, intake
        self._committer, self._transport, self._journal, self._now_s = committer, transport, journal, now_s
        self._connected = False
        self._started_s = now_s()
        self._shards: frozenset[str] = frozenset()
        self._renewed_s, self._looked_s = -math.inf, -math.inf
        self._outage = Outage(name, note=self._note, now_s=now_s)

    @property
    def failure(self) -> str:
        """What is wrong with the database, in words; empty when it is well."""
        return self._outage.reason

    @property
    def wants_to_commit(self) -> bool:
        """Whether a commit is due as soon as no more messages wait, or answers are."""
        return self._intake.has_answers or self._intake.batches.is_due(more_wait=False)

    @property
    def waits_for_commit(self) -> bool:
        """Whether a batch is gathered, or committed beside this process, and wants looking after soon."""
        return self._intake.batches.is_busy or self._intake.batches.is_gathering

    def begin(self) -> None:
        """Take leases before the first message, so that a lone worker serves at once."""
        self._look_after(quiet=False)

    def handle(self, events: Sequence[TransportEvent], *, more_wait: bool) -> int:
        """Take what the transport had, and commit unless more is waiting; how many new updates count now.

        Args:
            events: in the order in which they came.
            more_wait: whether the transport has more.
        """
        inbox = [event for event in events if isinstance(event, Received)]
        try:
            self._on_connection_events(events)
            committed = self._guarded(lambda: self._take_and_commit(inbox, more_wait=more_wait))
        finally:
            # Whatever kept the intake from them: a message that nobody is done with would narrow the broker's window
            # for as long as the connection lasts.
            self._intake.drop(inbox)
        self._look_after(quiet=not events)
        return committed

    def stop(self) -> None:
        """Give the leases back, so that others need not wait for them."""
        self._guarded(self._give_everything_back)

    def _on_connection_events(self, events: Iterable[TransportEvent]) -> None:
        """The connection came or went; operators should see it at once."""
        for event in events:
            match event:
                case Connected():
                    self._on_connected(event)
                    self._renewed_s = -math.inf
                case Disconnected():
                    self._connected, self._renewed_s = False, -math.inf

    def _take_and_commit(self, inbox: list[Received], *, more_wait: bool) -> int:
        """Chunks, then whole updates; what is left in the inbox was not taken."""
        intake, batches = self._intake, self._intake.batches
        if inbox:
            if not batches.make_room():  # the broker keeps the rest, until the first batch is done
                intake.collect(LONGEST_COMMIT_S)
            received = inbox.copy()
            inbox.clear()  # the intake's from here on, which drops what it cannot take
            intake.take(received)
        intake.collect()
        if batches.is_due(more_wait=more_wait):
            batches.hand_over()
            intake.collect()
        # After the next batch was begun: answering takes half as long as committing.
        return intake.answer()

    def _look_after(self, *, quiet: bool) -> None:
        """What time alone asks for."""
        now_s = self._now_s()
        if not happened_within(LOOK_EVERY_S, self._looked_s, now_s):
            self._looked_s = now_s
            self._intake.look_after_transfers()
            if quiet:
                self._intake.release_held()
        if not happened_within(self._terms.renew_every_s, self._renewed_s, now_s):
            self._renewed_s = now_s
            self._guarded(self._renew)

    def _renew(self) -> int:
        """Renew the leases, move towards a fair share, say that all is well, and store counts."""
        now_s, leases = self._now_s(), self._store.leases
        detail = "" if self._connected else NOT_CONNECTED
        leases.say(self.name, started_s=self._started_s, now_s=now_s, state=INGEST, detail=detail)
        alive = [one.worker for one in leases.workers() if one.state == INGEST and abs(now_s - one.seen_s) < LEASE_S]
        plan = plan_shards(leases.all(), self.name, workers=alive, now_s=now_s)
        if plan.give_back:
            leases.release(plan.give_back, self.name)
        self._serve(leases.take(plan.keep | plan.take, self.name, until_s=now_s + self._terms.lease_s, now_s=now_s))
        self._committer.store_counts()
        self._committer.keep_only({(one.task, one.number) for one in self._store.rounds.live()})
        return 0

    def _serve(self, shards: Iterable[str]) -> None:
        """Ask the broker for exactly these shards' uploads."""
        before, self._shards = self._shards, frozenset(shards)
        if before != self._shards:
            self._note("shards_changed", worker=self.name, shards=len(self._shards))
        if self._connected:
            self._subscribe(self._shards - before)
            self._unsubscribe(before - self._shards)

    def _on_connected(self, event: Connected) -> None:
        """Subscribe; a session that the broker kept may have shards of long ago."""
        self._connected = True
        if event.session_present:
            self._unsubscribe(set(ALL_SHARDS) - self._shards)
        self._subscribe(self._shards)

    def _subscribe(self, shards: Iterable[str]) -> None:
        for shard in sorted(shards):
            self._transport.subscribe(_filter(self._tenant, shard))

    def _unsubscribe(self, shards: Iterable[str]) -> None:
        for shard in sorted(shards):
            self._transport.unsubscribe(_filter(self._tenant, shard))

    def _give_everything_back(self) -> int:
        """Release every lease."""
        leases, now_s = self._store.leases, self._now_s()
        leases.release(self._shards, self.name)
        # Said before the record grows old, so that others take over at once.
        leases.say(self.name, started_s=self._started_s, now_s=now_s, state=STOPPED, detail="")
        self._serve(())
        self._committer.store_counts()
        return 0

    def _guarded(self, action: Callable[[], int]) -> int:
        """Do something that needs the database; when it fails, say so once and try again a little later."""
        if self._outage.must_wait:
            return 0
        try:
            if self._outage.reason:
                self._renew()  # the action may turn out to need no database, and would look as if that were back
            done = action()
        except DatabaseError as error:
            self._outage.failed(str(error))
            return 0
        self._outage.over()
        return done

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self._journal.write(event, at_s=self._now_s(), **fields)


def _filter(tenant: str, shard: str) -> str:
    """What a shard's lease is a subscription to."""
    return shard_filter(tenant, int(shard.removeprefix("shard-")))
