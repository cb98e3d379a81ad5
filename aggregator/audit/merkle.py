"""The Merkle tree of RFC 9162 (certificate transparency 2.0), section 2.1, over leaf hashes with SHA-256. Pure.

A tree of n leaves is a row of perfect subtrees, the largest first, one for each bit of n. So whoever has the hashes of
perfect subtrees can tell every root and make every proof. A perfect subtree is named by its level and its index: leaf i
is (0, i), and (level, index) covers the leaves from index * 2^level up to (index + 1) * 2^level. Where their hashes
come from is not this module's business (`NodeSource`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

NodeSource = Callable[[int, int], bytes]
"""The hash of a perfect subtree, 32 bytes, by its level and index; it is asked only for such as the tree has whole."""

EMPTY_ROOT = hashlib.sha256(b"").digest()
"""Of a tree without leaves."""
_sha256 = hashlib.sha256


class ProofError(ValueError):
    """A proof does not show what it should."""


def leaf_hash(entry: bytes) -> bytes:
    """Hash of a leaf, 32 bytes; it starts with another byte than a node, so that neither passes for the other."""
    return _sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of a node, 32 bytes, from those of its two children."""
    return _sha256(b"\1" + left + right).digest()


class CompactRange:
    """The least that a growing tree has to remember: one hash for each bit of its size.

    Args:
        size: leaves that there are already.
        hashes: of the perfect subtrees of a tree of that size, the largest first; see `subtrees`.

    Raises:
        ValueError: so many hashes do not belong to this size.
    """

    def __init__(self, size: int = 0, hashes: Iterable[bytes] = ()) -> None:
        self._size, self._hashes = size, list(hashes)
        if size < 0 or len(self._hashes) != size.bit_count():
            raise ValueError(
                f"expected a hash for each of the {max(size, 0).bit_count()} perfect subtrees of a tree of {size} "
                f"leaves, got {len(self._hashes)}"
            )

    @property
    def size(self) -> int:
        """How many leaves."""
        return self._size

    def append(self, leaf: bytes) -> None:
        """Add a leaf by its hash."""
        hashes, size = self._hashes, self._size
        hashes.append(leaf)
        self._size = size + 1
        while size & 1:  # each trailing one is a subtree as large as the one just made
            right = hashes.pop()
            hashes[-1] = _sha256(b"\1" + hashes[-1] + right).digest()
            size >>= 1

    def root(self) -> bytes:
        """The tree's hash, 32 bytes."""
        return folded(self._hashes)


def folded(hashes: Sequence[bytes]) -> bytes:
    """The root over a tree's perfect subtrees, the largest first."""
    if not hashes:
        return EMPTY_ROOT
    root = hashes[-1]
    for left in reversed(hashes[:-1]):
        root = node_hash(left, root)
    return root


def subtrees(begin: int, end: int) -> list[tuple[int, int]]:
    """The fewest perfect subtrees, level and index, that cover leaves from `begin` up to `end`, from left to right."""
    found = []
    while begin < end:
        level = (end - begin).bit_length() - 1
        if begin:
            level = min(level, (begin & -begin).bit_length() - 1)
        found.append((level, begin >> level))
        begin += 1 << level
    return found


def root_of(size: int, node: NodeSource) -> bytes:
    """The hash of the tree of the first `size` leaves, 32 bytes."""
    return _range_hash(0, size, node)


def inclusion_proof(number: int, size: int, node: NodeSource) -> list[bytes]:
    """What proves that a leaf is in a tree (RFC 9162, section 2.1.3.1): at most 64 hashes, from the leaf to the root.

    Args:
        number: of the leaf, from 0.
        size: of the tree.
        node: hashes of perfect subtrees.

    Raises:
        ValueError: the tree has no such leaf.
    """
    if not 0 <= number < size:
        raise ValueError(f"expected a leaf below the tree's size, {size}, got {number}")
    path: list[bytes] = []
    begin, end = 0, size
    while end - begin > 1:
        middle = begin + _split(end - begin)
        if number < middle:
            path.append(_range_hash(middle, end, node))
            end = middle
        else:
            path.append(_range_hash(begin, middle, node))
            begin = middle
    return path[::-1]


def consistency_proof(first: int, second: int, node: NodeSource) -> list[bytes]:
    """What proves that a tree is the beginning of another one (RFC 9162, section 2.1.4.1).

    Args:
        first: size of the smaller tree; for 0 there is nothing to prove.
        second: size of the larger one.
        node: hashes of the larger one's perfect subtrees.

    Raises:
        ValueError: the first is not the smaller.
    """
    if not 0 <= first <= second:
        raise ValueError(f"expected a first size of at most the second, {second}, got {first}")
    if first in {0, second}:
        return []
    path: list[bytes] = []
    begin, end, is_whole = 0, second, True
    while end != first:
        middle = begin + _split(end - begin)
        if first <= middle:
            path.append(_range_hash(middle, end, node))
            end = middle
        else:
            path.append(_range_hash(begin, middle, node))
            begin, is_whole = middle, False
    if not is_whole:  # otherwise it is the smaller root itself, which whoever verifies has
        path.append(_range_hash(begin, end, node))
    return path[::-1]


def verify_inclusion(leaf: bytes, number: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """Check that a leaf is in a tree (RFC 9162, section 2.1.3.2).

    Args:
        leaf: its hash.
        number: of the leaf, from 0.
        size: of the tree.
        path: from `inclusion_proof`, untrusted.
        root: of the tree, which whoever asks trusts.

    Raises:
        ProofError: it is not shown.
    """
    if not 0 <= number < size:
        raise ProofError(f"expected a leaf below the tree's size, {size}, got {number}")
    place, last, found = number, size - 1, leaf
    for other in path:
        if not last:
            raise ProofError("the path is longer than the tree is high")
        if place & 1 or place == last:
            found = node_hash(other, found)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            found = node_hash(found, other)
        place, last = place >> 1, last >> 1
    if last:
        raise ProofError("the path is shorter than the tree is high")
    if found != root:
        raise ProofError(f"the path of leaf {number} does not lead to the root of the tree of {size}")


def verify_consistency(first: int, second: int, path: Sequence[bytes], roots: tuple[bytes, bytes]) -> None:
    """Check that a tree is the beginning of another one (RFC 9162, section 2.1.4.2).

    Args:
        first: size of the smaller tree; the empty one is the beginning of every tree.
        second: size of the larger one.
        path: from `consistency_proof`, untrusted.
        roots: of the smaller and of the larger tree; the smaller one's is trusted.

    Raises:
        ProofError: it is not shown.
    """
    if not 0 <= first <= second:
        raise ProofError(f"a tree of {first} leaves is not the beginning of one of {second}")
    if first in {0, second}:
        _verify_without_path(first, path, roots, is_same=first == second)
        return
    rest = list(path)
    if first & (first - 1) == 0:  # a perfect subtree of the larger tree: its root is where the path begins
        rest.insert(0, roots[0])
    place, last = first - 1, second - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    if not rest:
        raise ProofError("the path is empty")
    old = new = rest[0]
    for other in rest[1:]:
        if not last:
            raise ProofError("the path is longer than the tree is high")
        if place & 1 or place == last:
            old, new = node_hash(other, old), node_hash(other, new)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            new = node_hash(new, other)
        place, last = place >> 1, last >> 1
    if last:
        raise ProofError("the path is shorter than the tree is high")
    if (old, new) != roots:
        raise ProofError(f"the tree of {second} leaves does not continue the one of {first}")


def _verify_without_path(first: int, path: Sequence[bytes], roots: tuple[bytes, bytes], *, is_same: bool) -> None:
    """The two cases in which nothing is to be proved."""
    if path:
        raise ProofError("expected an empty path between a tree and itself, or after the empty tree")
    if first == 0 and roots[0] != EMPTY_ROOT:
        raise ProofError("the root of the empty tree is another one")
    if is_same and roots[0] != roots[1]:
        raise ProofError(f"two trees of {first} leaves have different roots")


def _split(size: int) -> int:
    """The largest power of two below a size of at least 2."""
    return 1 << ((size - 1).bit_length() - 1)


def _range_hash(begin: int, end: int, node: NodeSource) -> bytes:
    """The hash of the leaves of one of the tree's subtrees, or of its right edge."""
    return folded([node(level, index) for level, index in subtrees(begin, end)])
