"""What follows from a revocation at the broker: the list of revoked certificates, and the end of live connections.

A list alone lets a connection that is up go on for ever (measured on mosquitto 2.0: it is looked at when a client
connects). MQTT has one way to end another's connection that any broker knows: whoever connects with a client id takes
it over (MQTT 5, section 3.1.4, item 3). So the desk, which has the CA, makes itself a certificate of the device's name
that holds for some minutes, connects with it, and leaves. It does so after the list is in force, or the device could
come back.

What is not done yet is in the database; a desk that is killed in between does it again at its next start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from aggregator.certificates import KeyPair, issue, make_crl
from aggregator.enrolment.revocation import not_enforced, note_enforced, revoked_certificates
from aggregator.errors import AggregatorError
from aggregator.store.database import Database
from fl_protocol.adapters.files import write_atomic
from fl_protocol.adapters.journal import Journal

LOOK_EVERY_S = 0.25
"""How often it is looked whether somebody was revoked; an operator watches it happen."""
TAKEN_OVER_S = 300.0
"""How long a certificate is valid that a connection is taken over with."""


class Broker(Protocol):
    """What has to be done at a broker; each raises AggregatorError, and is tried again."""

    def reload(self) -> None:
        """Have it read its list of revoked certificates again."""

    def end_connection(self, name: str, identity: KeyPair) -> None:
        """Take a client's connection over, and leave; `identity` is a certificate of its name."""


class Enforcement:
    """See the module docstring.

    Args:
        database: says who was revoked.
        ca: signs the list.
        crl: the list's file, in the broker's folder.
        broker: is told.
        journal: where events are told.
        now_s: Unix seconds.
    """

    def __init__(
        self,
        database: Database,
        *,
        ca: KeyPair,
        crl: Path,
        broker: Broker,
        journal: Journal,
        now_s: Callable[[], float],
    ) -> None:
        self._database, self._ca, self._crl, self._broker = database, ca, crl, broker
        self._journal, self._now_s = journal, now_s
        self._failed = ""

    def look(self) -> int:
        """Enforce what was not enforced yet; how many certificates that were. Raises DatabaseError."""
        with self._database.reading() as connection:
            due = not_enforced(connection)
        if not due:
            return 0
        try:
            self.write_list()
            self._broker.reload()
            # A certificate that is not valid yet has let nobody in.
            self._end_connections([one.device for one in due if one.not_before_s <= self._now_s()])
        except (AggregatorError, OSError) as error:
            self._tell_failure(str(error))
            return 0
        with self._database.transaction() as connection:
            note_enforced(connection, (one.serial for one in due), now_s=self._now_s())
        self._failed = ""
        self._note("enforced", certificates=len(due), seconds=max(0.0, self._now_s() - due[0].revoked_s))
        return len(due)

    def write_list(self) -> None:
        """Write the list as it is to be now. Raises DatabaseError, OSError."""
        now_s = self._now_s()
        with self._database.reading() as connection:
            revoked = revoked_certificates(connection, now_s=now_s)
        listed = [(int(one.serial, 16), one.revoked_s) for one in revoked]
        write_atomic(self._crl, make_crl(self._ca, listed, now_s=now_s), mode=0o644)

    def _end_connections(self, names: Sequence[str]) -> None:
        """End whatever is connected under these names. Raises AggregatorError."""
        for name in dict.fromkeys(names):
            identity = issue(self._ca, name, now_s=self._now_s(), valid_s=TAKEN_OVER_S)
            self._broker.end_connection(name, identity)

    def _tell_failure(self, reason: str) -> None:
        """Say once what is wrong."""
        if reason != self._failed:
            self._note("not_enforced", reason=reason)
        self._failed = reason

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self._journal.write(f"revocation_{event}", at_s=self._now_s(), **fields)
