"""The aggregator's process: a loop that takes what the broker brings, commits it, and runs the rounds.

``covey-aggregator run`` has a coordinator and an ingest worker on one connection; ``covey-aggregator worker`` has only
the latter. Either may be killed at any instruction: what it has promised is in the database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from aggregator.batches import Commits
from aggregator.coordinator import Coordinator
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.worker import IngestWorker
from fl_protocol.adapters.journal import Journal
from fl_protocol.errors import CoveyError
from fl_protocol.transport import Connected, Disconnected, Received, Transport, TransportEvent

LONGEST_WAIT_S = 0.2
"""How long one poll may take, so that deadlines and stop requests are noticed soon."""
COMMIT_LOOK_S = 0.002
"""How often it is looked whether a batch that is committed beside this process is done."""
MOST_EVENTS = 100
MOST_EVENT_BYTES = 16 * 2**20
"""What is taken from the transport at once: enough for one look into the database to serve many, and little enough for
a process beside this one not to wait long for its next batch."""


class AggregatorService:
    """See the module docstring.

    Args:
        transport: the broker connection.
        store: the database, closed at the end.
        worker: takes uploads.
        coordinator: runs rounds; None in a process that only takes uploads.
        journal: where events are told.
        now_s: Unix seconds.
        commits: what commits, closed at the end.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        store: AggregatorStore,
        worker: IngestWorker,
        coordinator: Coordinator | None,
        journal: Journal,
        now_s: Callable[[], float],
        commits: Commits,
    ) -> None:
        self._commits = commits
        self.transport, self.store, self.worker, self.coordinator = transport, store, worker, coordinator
        self._journal, self._now_s = journal, now_s

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Serve until `should_stop`; an open round stays in the database and goes on at the next start."""
        self.start()
        while not should_stop():
            self.step()
        self.stop()

    def start(self) -> None:
        """Connect."""
        self._note("started", worker=self.worker.name, coordinates=self.coordinator is not None)
        self.worker.begin()
        self.transport.open()

    def step(self) -> None:
        """Wait for events, at most `LONGEST_WAIT_S`, and act on them."""
        events, more_wait = self._gather()
        if self.coordinator is not None:
            events = self.coordinator.take(events)
        committed = self.worker.handle(events, more_wait=more_wait)
        if self.coordinator is not None:
            self.coordinator.handle(events, arrived=committed > 0)
        else:
            self._note_connection(events)

    def stop(self) -> None:
        """Give leases back and disconnect."""
        try:
            self.worker.stop()
            if self.coordinator is not None:
                self.coordinator.stop()
        except CoveyError as error:
            self._note("stop_failed", reason=str(error))  # leases run out by themselves
        self.transport.close()
        self._commits.close()
        self.store.close()
        self._note("stopped")

    def _gather(self) -> tuple[list[TransportEvent], bool]:
        """What the transport has, and whether there may be more."""
        events: list[TransportEvent] = []
        num_bytes = 0
        wait_s = COMMIT_LOOK_S if self.worker.waits_for_commit else LONGEST_WAIT_S
        if self.worker.wants_to_commit:
            wait_s = 0.0
        while len(events) < MOST_EVENTS and num_bytes < MOST_EVENT_BYTES:
            event = self.transport.poll(wait_s if not events else 0.0)
            if event is None:
                return events, False
            events.append(event)
            num_bytes += len(event.payload) if isinstance(event, Received) else 0
        return events, True

    def _note_connection(self, events: Iterable[TransportEvent]) -> None:
        """A coordinator does so itself."""
        for event in events:
            match event:
                case Connected():
                    self._note("connected")
                case Disconnected():
                    self._note("disconnected", reason=event.reason)

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self._journal.write(event, at_s=self._now_s(), **fields)
