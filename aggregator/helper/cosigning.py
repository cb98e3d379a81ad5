"""Whether a checkpoint of a study's audit log may be co-signed. Pure; docs/protocol.md, section 17.

A co-signature says: this is the largest tree that I have seen of this log, and it continues all that I had seen. So an
operator cannot rewrite what a helper has co-signed, nor show it one log and somebody else another. The order of checks:

1. the request is signed by the study's pinned aggregator, and asks this helper (else nothing is said)
2. its checkpoint is of this study's log, and signed by the same key
3. it is not smaller than the last one that was co-signed
4. the proof begins at that one, at its size
5. the proof shows that the checkpoint's tree continues the tree whose root *this helper* keeps

What comes out must be durable before it is said: a helper that forgot it could co-sign a fork after it was restarted.
"""

from __future__ import annotations

from typing import NamedTuple

from aggregator.audit.checkpoints import Checkpoint, CheckpointError, Note, origin_of, parse_note, verify_note
from aggregator.audit.merkle import EMPTY_ROOT, ProofError, verify_consistency
from aggregator.helper.answering import IgnoredError, Study
from fl_protocol.errors import ProtocolError
from fl_protocol.log_messages import LONGEST_REQUEST_BYTES, CosignRefusal, CosignRequestMsg
from fl_protocol.messages import SignedMsg, decode
from fl_protocol.signing import verify


class LastCosigned(NamedTuple):
    """The largest tree that this helper has co-signed of a log; the empty one if none."""

    size: int = 0
    root: bytes = EMPTY_ROOT


class CosignRefusedError(ProtocolError):
    """A checkpoint is not co-signed.

    Args:
        reason: for programs.
        detail: for people.
    """

    def __init__(self, reason: CosignRefusal, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason, self.detail = reason, detail


def named_cosign_request(data: bytes) -> CosignRequestMsg | None:
    """What a signed message asks, if that is to co-sign; nothing is verified."""
    if len(data) > LONGEST_REQUEST_BYTES:
        return None
    try:
        return decode(decode(data, SignedMsg).payload, CosignRequestMsg)
    except ProtocolError:
        return None


def read_cosign_request(data: bytes, study: Study, *, helper: str) -> CosignRequestMsg:
    """Check 1.

    Args:
        data: the signed `CosignRequestMsg`, untrusted.
        study: the one that it came for.
        helper: this helper's name.

    Raises:
        IgnoredError: the pinned aggregator has not signed it, or asks another helper or for another study.
    """
    try:
        request = verify(data, CosignRequestMsg, study.aggregator)
    except ProtocolError as error:
        raise IgnoredError(f"the request for {study.tenant}: {error}") from error
    # Security: the broker could bring what another helper was asked.
    if (request.tenant, request.helper) != (study.tenant, helper):
        raise IgnoredError(f"the request for {study.tenant} asks {request.helper} about {request.tenant}")
    return request


def checked_note(request: CosignRequestMsg, study: Study, last: LastCosigned) -> Note:
    """Checks 2 to 5: the checkpoint that may be co-signed, with the aggregator's signature.

    Args:
        request: of the pinned aggregator.
        study: the one that it came for.
        last: what this helper has co-signed last.

    Raises:
        CosignRefusedError: it may not.
    """
    note = _signed_note(request, study)
    tree = note.checkpoint
    if tree.size < last.size:
        raise CosignRefusedError(
            CosignRefusal.SMALLER,
            f"the log has {tree.size} entries, and had {last.size}: entries were removed, or the study's database was "
            "put back to an earlier day",
        )
    if request.start != last.size:
        raise CosignRefusedError(
            CosignRefusal.OTHER_START,
            f"the proof begins at {request.start} entries; expected it to begin at {last.size}",
        )
    try:
        verify_consistency(last.size, tree.size, request.proof, (last.root, tree.root))
    except ProofError as error:
        raise CosignRefusedError(CosignRefusal.FORKED, f"{error}; its checkpoint: {_short(tree)}") from error
    return note


def _signed_note(request: CosignRequestMsg, study: Study) -> Note:
    """Check 2."""
    try:
        note = parse_note(request.note)
        verify_note(note, study.aggregator)
    except CheckpointError as error:
        raise CosignRefusedError(CosignRefusal.BAD_CHECKPOINT, str(error)[:300]) from error
    if note.checkpoint.origin != origin_of(study.tenant):
        raise CosignRefusedError(
            CosignRefusal.BAD_CHECKPOINT,
            f"expected a checkpoint of {origin_of(study.tenant)}, got one of {note.checkpoint.origin[:100]}",
        )
    return note


def _short(tree: Checkpoint) -> str:
    """A checkpoint in a few words."""
    return f"{tree.size} entries, root {tree.root.hex()}"
