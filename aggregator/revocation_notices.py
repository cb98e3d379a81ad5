"""The coordinator's care that helpers know who was thrown out: told soon after it happens, again until they say so.

Only names whose certificates are valid at the moment are told: all of them at once would tell helpers which names to
come are one device's. A quarantined device is not told of, since it may come back, and its names would be tied together
by it. Nothing here is durable: after a restart helpers are told again, which changes nothing there.

What fails here is told, and keeps no round from going on: the aggregator leaves revoked devices out by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.enrolment.revocation import revoked_certificates
from aggregator.errors import DatabaseError
from aggregator.store.database import Database
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import SignedMsg, decode
from fl_protocol.recency import happened_within
from fl_protocol.revocation_messages import LONGEST_NOTICE_BYTES, MOST_REVOKED, RevocationsKeptMsg, RevokedDevicesMsg
from fl_protocol.secagg.terms import HelperIdentity
from fl_protocol.signing import sign, verify

LOOK_EVERY_S = 1.0
"""How often the database is asked who was thrown out."""
TELL_EVERY_S = 20.0
"""How long a helper's word is waited for before it is told again; also after a failure."""
ALL_ANEW_EVERY_S = 3600.0
"""How often all is told again."""


class NoticeLine(Protocol):
    """A way to all helpers."""

    def tell_of_revocations(self, helper: str, request: bytes) -> None:
        """Send a signed message; returns at once."""


@dataclass
class _Told:
    """What one helper was told, and what it keeps.

    Args:
        kept: names that it has made durable.
        waits: of those that it was told last.
        digest: of that message, SHA-256.
    """

    identity: HelperIdentity
    kept: set[str] = field(default_factory=set)
    waits: tuple[str, ...] = ()
    digest: bytes = b""
    told_s: float = float("-inf")


class RevocationNotices:
    """See the module docstring.

    Args:
        tenant: name on the wire.
        database: who was thrown out.
        signing_key: the aggregator's.
        helpers: that the configuration pins, by name.
        line: to them.
        note: tells the journal.
        now_s: Unix seconds.
    """

    def __init__(
        self,
        *,
        tenant: str,
        database: Database,
        signing_key: Ed25519PrivateKey,
        helpers: Mapping[str, HelperIdentity],
        line: NoticeLine,
        note: Callable[..., None],
        now_s: Callable[[], float],
    ) -> None:
        self._tenant, self._database, self._key = tenant, database, signing_key
        self._line, self._note, self._now_s = line, note, now_s
        self._told = {name: _Told(identity) for name, identity in helpers.items()}
        self._looked_s = self._failed_s = self._anew_s = float("-inf")

    def look_after(self) -> None:
        """Tell helpers what they do not know yet, when it is time."""
        now_s = self._now_s()
        if not self._told or happened_within(LOOK_EVERY_S, self._looked_s, now_s):
            return
        if happened_within(TELL_EVERY_S, self._failed_s, now_s):
            return
        self._looked_s = now_s
        try:
            revoked = self._revoked(now_s)
        except DatabaseError as error:
            self._failed_s = now_s
            self._note("revocations_not_told", reason=str(error))
            return
        if not happened_within(ALL_ANEW_EVERY_S, self._anew_s, now_s):
            self._anew_s = now_s
            for told in self._told.values():
                told.kept.clear()
        for name, told in self._told.items():
            self._tell(name, told, revoked, now_s)

    def hear(self, helper: HelperIdentity, data: bytes) -> bool:
        """Take what a helper says, if it is about devices that were thrown out; whether it was.

        Args:
            helper: who is said to say it.
            data: a signed message, untrusted.

        Raises:
            ProtocolError: it is about such, and not what was told, or not signed by this helper.
        """
        told = self._told.get(helper.name)
        if told is None or not _is_kept_msg(data):
            return False
        answer = verify(data, RevocationsKeptMsg, helper.key)
        said = (answer.tenant, answer.helper, answer.request_digest)
        if said != (self._tenant, helper.name, told.digest):
            raise ProtocolError("a word about devices that were thrown out which nobody has asked for")
        if told.waits:
            self._note("helper_knows_revocations", helper=helper.name, devices=len(told.waits))
        told.kept.update(told.waits)
        # The rest is told at the next look, without waiting.
        told.waits, told.told_s = (), float("-inf")
        return True

    def _revoked(self, now_s: float) -> list[str]:
        """Names that were thrown out and would be valid now, sorted. Raises DatabaseError."""
        with self._database.reading() as connection:
            found = revoked_certificates(connection, now_s=now_s)
        return sorted({one.device for one in found if one.not_before_s <= now_s})

    def _tell(self, name: str, told: _Told, revoked: list[str], now_s: float) -> None:
        """Tell one helper of the next few names; of others while it is silent only when it is told again."""
        names = tuple(one for one in revoked if one not in told.kept)[:MOST_REVOKED]
        if not names or (told.waits and happened_within(TELL_EVERY_S, told.told_s, now_s)):
            return
        message = sign(RevokedDevicesMsg(tenant=self._tenant, helper=name, devices=names), self._key)
        told.waits, told.digest, told.told_s = names, hashlib.sha256(message).digest(), now_s
        self._line.tell_of_revocations(name, message)


def _is_kept_msg(data: bytes) -> bool:
    """Whether a signed message is a `RevocationsKeptMsg`; nothing is verified."""
    if len(data) > LONGEST_NOTICE_BYTES:
        return False
    try:
        decode(decode(data, SignedMsg).payload, RevocationsKeptMsg)
    except ProtocolError:
        return False
    return True
