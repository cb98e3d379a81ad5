"""Where the tree's hashes come from: every leaf is a row, and so is every perfect subtree of 256, 65,536, ... leaves.

With those few rows (4 to a thousand entries) a hash of any perfect subtree takes at most 128 rows, and a proof over a
million entries at most three times 255; so nothing in between is stored.
"""

from __future__ import annotations

from sqlalchemy import Connection, insert, select

from aggregator.audit.merkle import NodeSource, node_hash
from aggregator.errors import DatabaseError
from aggregator.store import schema

STRIDE = 8
"""Levels between stored ones, as in C2SP's tlog-tiles."""
_LEAVES, _NODES = schema.audit_entries.c, schema.audit_nodes.c


def complete_nodes(connection: Connection, size: int) -> None:
    """Store the hashes of the perfect subtrees that the newest leaf has made whole; part of its transaction.

    Args:
        connection: with the transaction.
        size: leaves, with the newest.
    """
    level = STRIDE
    while size and size % (1 << level) == 0:
        position = (size >> level) - 1
        try:
            found = _subtree(_stored(connection, level - STRIDE, position << STRIDE, 1 << STRIDE))
        except DatabaseError:
            return  # entries were removed; that is told by whoever makes a proof, and keeps nobody from working
        connection.execute(insert(schema.audit_nodes), {"level": level, "position": position, "hash": found})
        level += STRIDE


def stored_nodes(connection: Connection) -> NodeSource:
    """Hashes of the log's perfect subtrees, read as they are asked for.

    Args:
        connection: with one view of the database, for as long as it is asked.
    """

    def node(level: int, index: int) -> bytes:
        above = level % STRIDE
        return _subtree(_stored(connection, level - above, index << above, 1 << above))

    return node


def _stored(connection: Connection, level: int, begin: int, count: int) -> list[bytes]:
    """So many stored hashes in a row. Raises DatabaseError: one is missing."""
    if level:
        at = _NODES.position
        query = select(_NODES.hash).where(_NODES.level == level)
    else:
        at = _LEAVES.number
        query = select(_LEAVES.leaf)
    query = query.where(at >= begin, at < begin + count).order_by(at)
    found = [bytes(one) for one in connection.execute(query).scalars()]
    if len(found) != count:
        raise DatabaseError(
            f"the audit log lacks a hash of level {level} from {begin} on: entries were removed; see covey-aggregator "
            "audit verify"
        )
    return found


def _subtree(hashes: list[bytes]) -> bytes:
    """The hash over a power of two of hashes."""
    while len(hashes) > 1:
        hashes = [node_hash(left, right) for left, right in zip(hashes[::2], hashes[1::2], strict=True)]
    return hashes[0]
