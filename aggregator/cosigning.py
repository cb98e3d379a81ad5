"""The coordinator's care for the audit log's checkpoints: signed after each round, and co-signed by helpers.

A helper proves nothing to itself: it is asked with a proof from the last tree that it has co-signed. Which one that is,
it says itself when the proof begins elsewhere; so nothing is kept here but what it has signed, in the database. Helpers
that are away are asked again, for the newest checkpoint alone.

What fails here is told, and keeps no round from going on.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.audit.checkpoint_rows import Checkpoints
from aggregator.audit.checkpoints import (
    Checkpoint,
    Note,
    NoteSignature,
    cosigner_key_id,
    cosigner_name,
    verify_cosignature,
)
from aggregator.audit.entries import AuditError
from aggregator.errors import DatabaseError
from fl_protocol.errors import ProtocolError
from fl_protocol.log_messages import (
    LONGEST_REQUEST_BYTES,
    CosignatureMsg,
    CosignRefusal,
    CosignRefusalMsg,
    CosignRequestMsg,
)
from fl_protocol.messages import SignedMsg, decode
from fl_protocol.recency import happened_within
from fl_protocol.secagg.terms import HelperIdentity
from fl_protocol.signing import sign, verify

CHECKPOINT_EVERY_S = 600.0
"""How often new entries get a checkpoint, if no round closes meanwhile."""
ASK_EVERY_S = 60.0
"""How long a co-signature is waited for before the helper is asked again; also after a failure."""
_REMEMBERED = 16
"""Requests whose answers are still taken: rounds may close faster than a helper answers."""
Tell = Callable[..., None]


class CosignLine(Protocol):
    """A way to all helpers."""

    def ask_to_cosign(self, helper: str, request: bytes) -> None:
        """Send a signed request; returns at once."""


@dataclass
class _Request:
    """One that was made, of the tree of a checkpoint: whether it was answered, and where its proof begins."""

    tree: Checkpoint
    start: int
    data: bytes
    is_done: bool = False


@dataclass
class _Asked:
    """What one helper was asked, the newest last, and where the log ends that it has co-signed."""

    identity: HelperIdentity
    start: int = 0
    requests: deque[_Request] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    asked_s: float = float("-inf")
    begins_elsewhere: bool = False

    @property
    def last(self) -> _Request | None:
        """The newest."""
        return self.requests[-1] if self.requests else None


class Cosigning:
    """See the module docstring.

    Args:
        tenant: name on the wire.
        checkpoints: of the log.
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
        checkpoints: Checkpoints,
        signing_key: Ed25519PrivateKey,
        helpers: Mapping[str, HelperIdentity],
        line: CosignLine,
        note: Tell,
        now_s: Callable[[], float],
    ) -> None:
        self._tenant, self._checkpoints, self._key = tenant, checkpoints, signing_key
        self._line, self._note, self._now_s = line, note, now_s
        self._asked = {name: _Asked(identity) for name, identity in helpers.items()}
        self._newest: Note | None = None
        self._made_s = self._failed_s = float("-inf")

    def look_after(self, *, round_closed: bool) -> None:
        """Make a checkpoint when it is time, and ask for what is missing of it."""
        now_s = self._now_s()
        if happened_within(ASK_EVERY_S, self._failed_s, now_s):
            return
        try:
            if round_closed or not happened_within(CHECKPOINT_EVERY_S, self._made_s, now_s):
                self._make(now_s)
            for name, asked in self._asked.items():
                self._ask(name, asked, now_s)
        except (DatabaseError, AuditError) as error:
            self._failed_s = now_s
            self._note("checkpoint_failed", reason=str(error))

    def hear(self, helper: HelperIdentity, data: bytes) -> bool:
        """Take what a helper says, if it is about a checkpoint; whether it was.

        Args:
            helper: who is said to say it.
            data: a signed message, untrusted.

        Raises:
            ProtocolError: it is about a checkpoint, and not what was asked, or not signed by this helper.
        """
        asked = self._asked.get(helper.name)
        kind = _kind_of(data)
        if kind is None or asked is None:
            return False
        if kind is CosignatureMsg:
            self._hear_cosignature(asked, verify(data, CosignatureMsg, helper.key))
        else:
            self._hear_refusal(asked, verify(data, CosignRefusalMsg, helper.key))
        return True

    def _make(self, now_s: float) -> None:
        """A checkpoint of what is new, if anything is."""
        made = self._checkpoints.make(self._key, now_s=now_s)
        self._made_s = now_s
        self._newest = made or self._checkpoints.newest()  # which a command may have made
        if made is not None:
            self._note("checkpoint_made", size=made.checkpoint.size, root=made.checkpoint.root.hex())

    def _ask(self, name: str, asked: _Asked, now_s: float) -> None:
        """Ask a helper for the newest checkpoint, or ask again."""
        if self._newest is None:
            return
        last, tree = asked.last, self._newest.checkpoint
        if last is None or last.tree.size != tree.size or asked.begins_elsewhere:
            last = self._request(name, asked, self._newest)
            asked.requests.append(last)
            asked.begins_elsewhere, asked.asked_s = False, float("-inf")
        if not last.is_done and not happened_within(ASK_EVERY_S, asked.asked_s, now_s):
            asked.asked_s = now_s
            self._line.ask_to_cosign(name, last.data)

    def _request(self, name: str, asked: _Asked, note: Note) -> _Request:
        """A signed request; to a helper that has co-signed more than there is, it has no proof, and will be refused."""
        size = note.checkpoint.size
        start = asked.start if asked.start <= size else 0
        request = CosignRequestMsg(
            tenant=self._tenant,
            helper=name,
            note=note._replace(signatures=note.signatures[:1]).text.encode(),
            start=start,
            proof=tuple(self._checkpoints.proof(start, size)),
        )
        return _Request(note.checkpoint, start, sign(request, self._key))

    def _hear_cosignature(self, asked: _Asked, answer: CosignatureMsg) -> None:
        """A co-signature, be it late. Raises ProtocolError: of a checkpoint that was not asked for, or wrong."""
        self._check_about(asked, answer.tenant, answer.helper)
        found = next((one for one in reversed(asked.requests) if _is_of(answer, one.tree)), None)
        if found is None:
            raise ProtocolError(f"a co-signature of a checkpoint of {answer.size} entries was not asked for")
        name = cosigner_name(asked.identity.operator, asked.identity.name)
        one = NoteSignature(name, cosigner_key_id(name, asked.identity.key), answer.cosignature)
        try:
            verify_cosignature(found.tree, one, asked.identity.key)
        except AuditError as error:
            raise ProtocolError(str(error)) from error
        if found.is_done:
            return
        self._checkpoints.add_cosignature(answer.size, answer.helper, one)
        found.is_done, asked.start = True, max(asked.start, answer.size)
        self._note("checkpoint_cosigned", helper=answer.helper, size=answer.size)

    def _hear_refusal(self, asked: _Asked, refusal: CosignRefusalMsg) -> None:
        """A refusal. Raises ProtocolError: of nothing that was asked."""
        self._check_about(asked, refusal.tenant, refusal.helper)
        digest = refusal.request_digest
        found = next((one for one in asked.requests if hashlib.sha256(one.data).digest() == digest), None)
        if found is None or found.is_done:
            raise ProtocolError("a refusal of a request to co-sign that was not made")
        found.is_done = True  # until there is another checkpoint
        is_last = found is asked.last
        if is_last:
            asked.start = refusal.last_size
        if refusal.reason is CosignRefusal.OTHER_START and refusal.last_size != found.start:
            asked.begins_elsewhere = is_last  # asked again at once, from there; a newer one has an answer of its own
            return
        detail = {"reason": refusal.reason.value, "detail": refusal.detail, "last_size": refusal.last_size}
        self._note("checkpoint_refused", helper=refusal.helper, **detail)

    def _check_about(self, asked: _Asked, tenant: str, helper: str) -> None:
        """Raise ProtocolError unless a message is about this study and of this helper."""
        if (tenant, helper) != (self._tenant, asked.identity.name):
            raise ProtocolError(f"expected an answer of {asked.identity.name} about {self._tenant}")


def _is_of(answer: CosignatureMsg, tree: Checkpoint) -> bool:
    """Whether a co-signature says that it is of this tree."""
    return (answer.size, answer.root) == (tree.size, tree.root)


def _kind_of(data: bytes) -> type[CosignatureMsg] | type[CosignRefusalMsg] | None:
    """Which of the two a signed message is, if either; nothing is verified."""
    if len(data) > LONGEST_REQUEST_BYTES:
        return None
    for kind in (CosignatureMsg, CosignRefusalMsg):
        try:
            decode(decode(data, SignedMsg).payload, kind)
        except ProtocolError:
            continue
        return kind
    return None
