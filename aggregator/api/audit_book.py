"""How far the audit log is proved: its newest checkpoint, who co-signed it and when, and the last verification.

A verification reads the whole log (a million entries take half a minute), so one runs at a time, for whoever asks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aggregator.api.answers import AuditState, Cosigned, LogVerified
from aggregator.audit.checkpoint_rows import newest_note
from aggregator.audit.checkpoints import CheckpointError, Note, cosigned_s, origin_of
from aggregator.audit.entries import AuditError
from aggregator.audit.export import verify_database
from aggregator.audit.log import log_size
from aggregator.audit.verification import LogKeys
from aggregator.errors import AggregatorError
from aggregator.store.database import Database

WITHOUT_KEY = (
    "the API does not know the aggregator's key: set aggregator_key in [api], or run covey-aggregator audit verify"
)


class AuditBook:
    """See the module docstring; may be used by several threads.

    Args:
        database: with the log.
        tenant: name on the wire.
        aggregator: who signs the log; None where the configuration does not say.
        helpers: who co-sign it, by name.
        now_s: Unix seconds.
    """

    def __init__(
        self,
        database: Database,
        *,
        tenant: str,
        aggregator: Ed25519PublicKey | None,
        helpers: Mapping[str, Ed25519PublicKey],
        now_s: Callable[[], float],
    ) -> None:
        self._database, self._now_s, self._helpers = database, now_s, helpers
        self._keys = None if aggregator is None else LogKeys(origin_of(tenant), aggregator, helpers)
        self._lock = threading.Lock()
        self._done, self._all, self._is_running = 0, 0, False
        self._verified: LogVerified | None = None

    def state(self) -> AuditState:
        """How far the log is proved. Raises DatabaseError."""
        with self._database.reading() as connection:
            entries = log_size(connection)
            try:
                note = newest_note(connection)
            except AuditError:  # a row that was changed: a verification says which
                note = None
        with self._lock:
            verified, done = self._verified, (self._done if self._is_running else None)
        return AuditState(
            entries=entries,
            checkpoint=None if note is None else note.checkpoint.size,
            cosigned=[] if note is None else self._cosigned(note),
            helpers=sorted(self._helpers),
            can_verify=self._keys is not None,
            verifying=done,
            verified=verified,
        )

    def verify(self) -> bool:
        """Begin to verify the whole log, beside whoever asks, if that is not being done; False if it cannot be."""
        keys = self._keys
        if keys is None:
            return False
        with self._lock:
            if self._is_running:
                return True
            self._is_running, self._done = True, 0
        threading.Thread(target=self._run, args=(keys,), name="audit", daemon=True).start()
        return True

    def _run(self, keys: LogKeys) -> None:
        """The verification."""
        entries = covered = 0
        outcome, detail = "unreadable", "the log could not be read to its end: the database did not answer"
        try:
            found = verify_database(self._database, keys, progress=self._tell)
            entries, covered, fault = found.entries, found.covered, found.fault
            outcome, detail = ("", "") if fault is None else (fault.outcome, fault.detail)
        except AggregatorError:
            pass
        finally:
            ended = LogVerified(ended_s=self._now_s(), entries=entries, covered=covered, outcome=outcome, detail=detail)
            with self._lock:
                self._is_running, self._verified = False, ended

    def _tell(self, done: int, _count: int) -> None:
        with self._lock:
            self._done = done

    def _cosigned(self, note: Note) -> list[Cosigned]:
        """Which helpers have co-signed a checkpoint, and when; a signature that is none is left out."""
        found = []
        for name, key in sorted(self._helpers.items()):
            try:
                at_s = cosigned_s(note, key)
            except CheckpointError:
                continue
            if at_s is not None:
                found.append(Cosigned(helper=name, at_s=at_s))
        return found
