"""The helper's process: a loop that answers what its brokers bring, and keeps its keys fresh.

It may be killed at any instruction: what it has said is in its store, and what it has not said is asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from aggregator.errors import DatabaseError
from aggregator.helper.answerer import Answerer
from aggregator.helper.answering import Study
from aggregator.helper.connection import HelperParts, StudyConnection
from aggregator.helper.helper_store import HelperStore
from aggregator.helper.key_ring import Helper, KeyRing, KeyTerms
from aggregator.outage import Outage
from fl_protocol.adapters.journal import Journal
from fl_protocol.enrolment import DAY_S
from fl_protocol.integer_noise import Entropy
from fl_protocol.limits import MAX_TRANSFER_BYTES
from fl_protocol.recency import happened_within
from fl_protocol.transport import Transport

LONGEST_WAIT_S = 0.2
"""How long one wait for events may take, so that stop requests are noticed soon."""
UPKEEP_EVERY_S = 30.0
"""How often keys, old answers and half-received requests are looked after."""


@dataclass(frozen=True)
class HelperLimits:
    """What a helper's own configuration says, beside its keys.

    Args:
        minimum_cohort: fewest updates it ever adds up.
        answers_kept_s: after which an answer's bytes are dropped.
        request_bytes: most that half-received requests of one study take in memory.
    """

    minimum_cohort: int
    answers_kept_s: float = 30 * DAY_S
    request_bytes: int = 2 * MAX_TRANSFER_BYTES


class HelperService:
    """See the module docstring.

    Args:
        helper: who it is.
        studies: that it helps, by tenant.
        transports: broker connections by tenant; a study without one asks over HTTPS.
        store: closed at the end.
        journal: where events are told.
        entropy: cryptographic source, for keys and noise.
        now_s: Unix seconds.
        limits: of the configuration.
        key_terms: how long keys live.
        wait: waits so many seconds at most for events of any transport; in virtual time it does nothing.

    Raises:
        DatabaseError: the store cannot be read; as LedgerError, its ledger was changed.
    """

    def __init__(
        self,
        helper: Helper,
        *,
        studies: Sequence[Study],
        transports: Mapping[str, Transport],
        store: HelperStore,
        journal: Journal,
        entropy: Entropy,
        now_s: Callable[[], float],
        limits: HelperLimits,
        key_terms: KeyTerms,
        wait: Callable[[float], None],
    ) -> None:
        # Security: a row that was removed would be a round to answer anew.
        store.answers.check(helper.identity.public_key())
        self._helper, self._limits, self.store = helper, limits, store
        self._journal, self._now_s, self._wait = journal, now_s, wait
        self.keys = KeyRing(helper, terms=key_terms, store=store, entropy=entropy, now_s=now_s)
        self.answerer = Answerer(
            helper,
            studies={study.tenant: study for study in studies},
            minimum_cohort=limits.minimum_cohort,
            keys=self.keys,
            store=store,
            journal=journal,
            entropy=entropy,
            now_s=now_s,
        )
        parts = HelperParts(helper.name, self.answerer, self.keys, journal, now_s, limits.request_bytes)
        self._connections = [StudyConnection(tenant, transport, parts) for tenant, transport in transports.items()]
        self._outage = Outage(helper.name, note=self._note, now_s=now_s)
        self._looked_after_s: float | None = None

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Serve until `should_stop`."""
        self.start()
        while not should_stop():
            self.step()
        self.stop()

    def start(self) -> None:
        """Make a key where there is none, and connect."""
        self._note("started", helper=self._helper.name)
        self._upkeep()
        for connection in self._connections:
            connection.open()

    def step(self) -> None:
        """Act on what has come; if nothing has, wait a moment."""
        self._upkeep()
        handled = sum([connection.handle_pending() for connection in self._connections])
        if not handled:
            self._wait(LONGEST_WAIT_S)

    def stop(self) -> None:
        """Disconnect."""
        for connection in self._connections:
            connection.close()
        self.store.close()
        self._note("stopped")

    def _upkeep(self) -> None:
        """New keys, old keys, old answers; when it is time."""
        if self._outage.must_wait:
            return
        if not self._outage.reason and happened_within(UPKEEP_EVERY_S, self._looked_after_s, self._now_s()):
            return
        self._looked_after_s = self._now_s()
        for connection in self._connections:
            connection.tidy()
        try:
            self._keep_keys()
            self.store.answers.drop_bytes(self._now_s() - self._limits.answers_kept_s)
            self._outage.over()
        except DatabaseError as error:
            self._outage.failed(str(error))

    def _keep_keys(self) -> None:
        """Announce a new key when there is one; erase those that nobody can need."""
        if self.keys.refresh():
            self._note("key_current", not_after_s=self.keys.not_after_s)
            for connection in self._connections:
                connection.announce()
        erased = self.keys.erase()
        if erased:
            self._note("keys_erased", count=erased)

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self._journal.write(event, at_s=self._now_s(), **fields)
