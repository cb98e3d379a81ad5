"""The log's checkpoints in the database: made by the aggregator, with what helpers have co-signed of them."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Row, insert, select, update

from aggregator.audit.checkpoints import Checkpoint, Note, NoteSignature, parse_note, sign_checkpoint, with_cosignatures
from aggregator.audit.entries import AuditError
from aggregator.audit.log import log_size
from aggregator.audit.merkle import ProofError, consistency_proof, root_of, verify_consistency
from aggregator.audit.tree_nodes import stored_nodes
from aggregator.store import schema
from aggregator.store.database import Database

_TABLE = schema.audit_checkpoints
_AT_ONCE = 500


class Checkpoints:
    """See the module docstring. Every method is one transaction and raises DatabaseError.

    Args:
        database: with the log.
        origin: of the log.
    """

    def __init__(self, database: Database, origin: str) -> None:
        self._database, self._origin = database, origin

    def make(self, key: Ed25519PrivateKey, *, now_s: float) -> Note | None:
        """Sign the log as it is; None if it has no entry that the newest checkpoint does not cover.

        Args:
            key: the aggregator's.
            now_s: Unix seconds.

        Raises:
            AuditError: the log does not continue the newest checkpoint; nothing is signed.
        """
        with self._database.transaction() as connection:
            size, newest, node = log_size(connection), newest_note(connection), stored_nodes(connection)
            if size == (newest.checkpoint.size if newest is not None else 0):
                return None
            tree = Checkpoint(self._origin, size, root_of(size, node))
            if newest is not None:
                last = newest.checkpoint
                # Security: two signed trees of which none continues the other would convict this aggregator.
                try:
                    path = consistency_proof(last.size, size, node) if last.size < size else ()
                    verify_consistency(last.size, size, path, (last.root, tree.root))
                except ProofError as error:
                    raise AuditError(
                        f"the audit log was changed since its checkpoint of {last.size} entries ({error}); see "
                        "covey-aggregator audit verify"
                    ) from error
            note = sign_checkpoint(tree, key)
            row = {"size": size, "root": tree.root, "signed_s": now_s, "note": note.text, "cosignatures": "{}"}
            connection.execute(insert(_TABLE), row)
        return note

    def newest(self) -> Note | None:
        """The newest checkpoint with its co-signatures; None if there is none."""
        with self._database.reading() as connection:
            return newest_note(connection)

    def proof(self, start: int, size: int) -> list[bytes]:
        """What proves that the log of `size` entries continues that of `start`."""
        with self._database.reading() as connection:
            return consistency_proof(start, size, stored_nodes(connection))

    def add_cosignature(self, size: int, helper: str, one: NoteSignature) -> None:
        """Keep a helper's co-signature, verified, of the checkpoint of this size; its first one stays."""
        with self._database.transaction() as connection:
            kept = connection.execute(select(_TABLE.c.cosignatures).where(_TABLE.c.size == size)).scalar()
            if kept is None:
                return
            lines = msgspec.json.decode(kept, type=dict[str, str])
            lines.setdefault(helper, one.line)
            encoded = msgspec.json.encode(lines, order="sorted").decode()
            connection.execute(update(_TABLE).where(_TABLE.c.size == size).values(cosignatures=encoded))


def stored_notes(connection: Connection) -> Iterator[Note]:
    """All checkpoints with their co-signatures, the smallest first, some at a time in memory; not verified.

    Raises:
        CheckpointError: a row cannot be read.
    """
    after = -1
    while True:
        query = select(_TABLE).where(_TABLE.c.size > after).order_by(_TABLE.c.size).limit(_AT_ONCE)
        rows = connection.execute(query).all()
        for row in rows:
            yield _note(row)
        if len(rows) < _AT_ONCE:
            return
        after = rows[-1].size


def newest_note(connection: Connection) -> Note | None:
    """The newest checkpoint, not verified; None if there is none. Raises CheckpointError."""
    row = connection.execute(select(_TABLE).order_by(_TABLE.c.size.desc()).limit(1)).one_or_none()
    return None if row is None else _note(row)


def best_note(connection: Connection, number: int) -> Note | None:
    """Of the checkpoints that cover an entry, the newest of those that most helpers co-signed; not verified."""
    query = select(_TABLE).where(_TABLE.c.size > number).order_by(_TABLE.c.size.desc()).limit(_AT_ONCE)
    found = [_note(row) for row in connection.execute(query)]
    return max(found, key=lambda note: (len(note.signatures), note.checkpoint.size), default=None)


def _note(row: Row[tuple[object, ...]]) -> Note:
    """A row as a note."""
    try:
        lines = msgspec.json.decode(row.cosignatures, type=dict[str, str])
    except msgspec.MsgspecError as error:
        raise AuditError(
            f"the co-signatures of the checkpoint of {row.size} entries cannot be read ({error})"
        ) from error
    note = parse_note(row.note)
    if not lines:
        return note
    whole = parse_note(note.checkpoint.text.decode() + "\n" + "".join(lines.values()))
    return with_cosignatures(note, whole.signatures)
