"""What aggregator and helpers say about checkpoints of the audit log (docs/protocol.md, section 17).

aggregator  -> helper       `CosignRequestMsg`, signed: a checkpoint, and a proof that it continues an earlier one
helper      -> aggregator   `CosignatureMsg`, signed: its signature over the checkpoint; or `CosignRefusalMsg`, signed:
why not, and where what it has co-signed ends
"""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta

from fl_protocol.message_base import Digest, Msg, Name

LogSize = Annotated[int, Meta(ge=0, le=2**62)]
LONGEST_REQUEST_BYTES = 32 * 1024


class CosignRefusal(str, enum.Enum):
    """Why a helper does not co-sign a checkpoint."""

    BAD_CHECKPOINT = "bad_checkpoint"
    OTHER_START = "other_start"
    SMALLER = "smaller"
    FORKED = "forked"


class CosignRequestMsg(Msg, frozen=True):
    """A checkpoint that a helper is asked to co-sign.

    Args:
        helper: who is asked.
        note: the checkpoint as the aggregator has signed it.
        start: size of the tree that the proof begins at: the last one that the helper has co-signed; 0 for none.
        proof: RFC 9162, section 2.1.4, from that tree to the checkpoint's.
    """

    tenant: Name
    helper: Name
    note: Annotated[bytes, Meta(max_length=16 * 1024)]
    start: LogSize
    proof: Annotated[tuple[Digest, ...], Meta(max_length=128)]


class CosignatureMsg(Msg, frozen=True):
    """A helper's signature over a checkpoint.

    Args:
        size: of the checkpoint.
        root: of the checkpoint.
        cosignature: Unix seconds, 8 bytes, the highest first, and an Ed25519 signature (c2sp.org/tlog-cosignature).
    """

    tenant: Name
    helper: Name
    size: LogSize
    root: Digest
    cosignature: Annotated[bytes, Meta(min_length=72, max_length=72)]


class CosignRefusalMsg(Msg, frozen=True):
    """Why a helper does not co-sign.

    Args:
        request_digest: SHA-256 of the signed request.
        last_size: of the tree that it co-signed last; 0 for none.
        detail: for people.
    """

    tenant: Name
    helper: Name
    request_digest: Digest
    last_size: LogSize
    reason: CosignRefusal
    detail: Annotated[str, Meta(max_length=400)]
