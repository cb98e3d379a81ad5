"""One entry with all that proves it: its path in the tree, and a checkpoint that aggregator and helpers have signed.

Whoever gets such a file needs no database and no log, only the keys of those whom they believe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Meta
from sqlalchemy import select

from aggregator.audit.checkpoint_rows import best_note
from aggregator.audit.checkpoints import CheckpointError, Note, cosigned_s, parse_note, verify_note
from aggregator.audit.entries import AuditEntry, AuditError, decode_entry
from aggregator.audit.merkle import ProofError, inclusion_proof, leaf_hash, verify_inclusion
from aggregator.audit.tree_nodes import stored_nodes
from aggregator.store import schema
from aggregator.store.database import Database
from fl_protocol.signing import public_key_hex

ProofOutcome = Literal["malformed", "edited", "bad_checkpoint", "not_cosigned"]
_Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class EntryProof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file.

    Args:
        covey_audit_proof: its version.
        entry: the entry's bytes.
        path: RFC 9162, section 2.1.3.
        checkpoint: with its signatures.
    """

    covey_audit_proof: Literal[1]
    entry: str
    path: Annotated[list[_Hash], Meta(max_length=64)]
    checkpoint: str


class CheckedEntry(msgspec.Struct, frozen=True):
    """An entry that was proved.

    Args:
        entry: what was done.
        origin: of its log.
        size: of the log when it was signed.
        cosigned_s: when each helper co-signed that, by key, Unix seconds.
    """

    entry: AuditEntry
    origin: str
    size: int
    cosigned_s: dict[str, int]


class ProofRefusedError(AuditError):
    """A file proves nothing.

    Args:
        outcome: for programs.
        detail: for people.
    """

    def __init__(self, outcome: ProofOutcome, detail: str) -> None:
        super().__init__(f"{outcome}: {detail}")
        self.outcome, self.detail = outcome, detail


def prove_entry(database: Database, number: int) -> EntryProof:
    """The proof of an entry, under the newest of the checkpoints that most helpers co-signed.

    Args:
        database: with the log.
        number: of the entry.

    Raises:
        AuditError: there is no such entry, or no checkpoint that covers it.
        DatabaseError: the log cannot be read, or lacks entries.
    """
    table = schema.audit_entries.c
    with database.reading() as connection:
        data = connection.execute(select(table.entry).where(table.number == number)).scalar()
        if data is None:
            raise AuditError(f"the audit log has no entry {number}; see covey-aggregator audit list")
        note = best_note(connection, number)
        if note is None:
            raise AuditError(
                f"no checkpoint covers entry {number} yet; make one with covey-aggregator audit checkpoint"
            )
        path = inclusion_proof(number, note.checkpoint.size, stored_nodes(connection))
    return EntryProof(1, bytes(data).decode(), [one.hex() for one in path], note.text)


def check_entry(
    data: bytes, *, aggregator: Ed25519PublicKey | None, helpers: Sequence[Ed25519PublicKey]
) -> CheckedEntry:
    """Check a proof.

    Args:
        data: the file, untrusted.
        aggregator: whose signature is asked for as well; None to believe the helpers alone.
        helpers: all of whom must have co-signed.

    Raises:
        ProofRefusedError: it proves nothing.
    """
    if aggregator is None and not helpers:
        raise AuditError("expected the key of a helper or of the aggregator: a proof is worth what its signers are")
    proof, entry, note = _read(data)
    tree = note.checkpoint
    try:
        path = [bytes.fromhex(one) for one in proof.path]
        verify_inclusion(leaf_hash(proof.entry.encode()), entry.number, tree.size, path, tree.root)
    except ProofError as error:
        raise ProofRefusedError("edited", f"entry {entry.number} is not in this log: {error}") from error
    try:
        if aggregator is not None:
            verify_note(note, aggregator)
        when = {public_key_hex(key): cosigned_s(note, key) for key in helpers}
    except CheckpointError as error:
        raise ProofRefusedError("bad_checkpoint", str(error)) from error
    found = {key: at_s for key, at_s in when.items() if at_s is not None}
    missing = sorted(set(when) - set(found))
    if missing:
        raise ProofRefusedError(
            "not_cosigned", f"the checkpoint of {tree.size} entries is not co-signed with {' and '.join(missing)}"
        )
    return CheckedEntry(entry, tree.origin, tree.size, found)


def _read(data: bytes) -> tuple[EntryProof, AuditEntry, Note]:
    """A file's parts, none of them verified."""
    try:
        proof = msgspec.json.decode(data, type=EntryProof)
        return proof, decode_entry(proof.entry.encode()), parse_note(proof.checkpoint)
    except (msgspec.MsgspecError, UnicodeError, AuditError) as error:
        raise ProofRefusedError("malformed", f"expected what covey-aggregator audit prove writes; {error}") from error
