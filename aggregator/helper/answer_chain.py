"""The ledger of answers as a chain: each row's digest covers the row before it. Pure.

A row that was edited, removed, added or moved breaks the chain from there on. The helper's identity signs the newest
digest, so that whoever can write into the store, but does not have the identity, cannot make a chain of their own.
What a chain cannot show is a store put back as a whole to an earlier day: that one is as whole as it was then. Whoever
noted a digest elsewhere (the journal has each) finds it missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

BEGINNING = bytes(32)
"""What comes before the first row."""
_ROW, _HEAD = b"covey v1 helper ledger\0", b"covey v1 helper ledger head\0"


@dataclass(frozen=True)
class AnswerRecord:
    """One answered round.

    Args:
        tenant, task, round: which.
        manifest_digest: of the round.
        included_digest: of the list.
        count: how many updates.
        answered_s: Unix seconds.
        answer_digest: SHA-256 of the answer's bytes.
    """

    tenant: str
    task: str
    round: int
    manifest_digest: bytes
    included_digest: bytes
    count: int
    answered_s: float
    answer_digest: bytes


def chained(previous: bytes, record: AnswerRecord) -> bytes:
    """A row's digest, 32 bytes, after the one before it."""
    fields = msgspec.msgpack.encode(_fields(record))
    return hashlib.sha256(_ROW + previous + fields).digest()


def sign_head(head: bytes, identity: Ed25519PrivateKey) -> bytes:
    """Signature over the newest digest."""
    return identity.sign(_HEAD + head)


def chain_fault(
    rows: Iterable[tuple[AnswerRecord, bytes]], *, head_signature: bytes | None, identity: Ed25519PublicKey
) -> str:
    """What is wrong with a chain, in words; empty if nothing is.

    Args:
        rows: each with its digest, oldest first.
        head_signature: over the newest digest; None if there is none.
        identity: whose signature it must be.
    """
    head, number = BEGINNING, 0
    for number, (record, digest) in enumerate(rows, 1):
        if chained(head, record) != digest:
            return (
                f"row {number} ({record.tenant}/{record.task} round {record.round}) does not follow from the row "
                "before it: one of them was edited, or rows between them were removed"
            )
        head = digest
    return head_fault(number, head, signature=head_signature, identity=identity)


def head_fault(number: int, head: bytes, *, signature: bytes | None, identity: Ed25519PublicKey) -> str:
    """What is wrong with the end of a chain, in words; empty if nothing is.

    Args:
        number: of rows.
        head: the last one's digest; `BEGINNING` if there are none.
        signature: over the newest digest; None if there is none.
        identity: whose it must be.
    """
    if signature is None:
        return f"no signature over its end is left, and there are {number} rows" if number else ""
    try:
        identity.verify(signature, _HEAD + head)
    except InvalidSignature:
        return f"row {number} is not the last one that was signed: rows were removed, added or edited"
    return ""


def _fields(record: AnswerRecord) -> list[object]:
    """In the order of the class."""
    return [getattr(record, name) for name in AnswerRecord.__dataclass_fields__]
