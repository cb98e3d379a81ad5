"""The tree against the recursive definitions of RFC 9162, section 2.1, and RFC 6962's reference vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.audit import merkle
from aggregator.audit.merkle import (
    EMPTY_ROOT,
    CompactRange,
    NodeSource,
    ProofError,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    root_of,
    subtrees,
    verify_consistency,
    verify_inclusion,
)
from tests.enrolments import broken_copy

REFERENCE = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
"""Entries of the tests of the certificate-transparency reference implementation, and below its roots of the first n."""
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
Entries = Sequence[bytes]


def mth(entries: Entries) -> bytes:
    """Section 2.1.1, word for word."""
    if not entries:
        return hashlib.sha256(b"").digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    k = split(len(entries))
    return hashlib.sha256(b"\x01" + mth(entries[:k]) + mth(entries[k:])).digest()


def path_of(m: int, entries: Entries) -> list[bytes]:
    """Section 2.1.3.1, word for word."""
    if len(entries) == 1:
        return []
    k = split(len(entries))
    if m < k:
        return [*path_of(m, entries[:k]), mth(entries[k:])]
    return [*path_of(m - k, entries[k:]), mth(entries[:k])]


def subproof(m: int, entries: Entries, whole: bool = True) -> list[bytes]:
    """Section 2.1.4.1, word for word."""
    if m == len(entries):
        return [] if whole else [mth(entries)]
    k = split(len(entries))
    if m <= k:
        return [*subproof(m, entries[:k], whole), mth(entries[k:])]
    return [*subproof(m - k, entries[k:], False), mth(entries[:k])]


def split(n: int) -> int:
    k = 1
    while 2 * k < n:
        k *= 2
    return k


def nodes_of(entries: Entries) -> NodeSource:
    """Perfect subtrees, by the definition."""

    def node(level: int, index: int) -> bytes:
        begin, end = index << level, (index + 1) << level
        assert end <= len(entries), "a subtree that the tree does not have whole was asked for"
        return mth(entries[begin:end])

    return node


trees = st.lists(st.binary(max_size=3), max_size=70)


@given(trees)
def test_the_growing_tree_has_the_root_of_the_definition(entries: list[bytes]) -> None:
    grown = CompactRange()
    assert grown.root() == EMPTY_ROOT
    for size, entry in enumerate(entries, 1):
        grown.append(leaf_hash(entry))
        assert grown.size == size
        assert grown.root() == mth(entries[:size]) == root_of(size, nodes_of(entries))


@given(trees, st.data())
def test_a_growing_tree_goes_on_from_its_subtrees(entries: list[bytes], data: st.DataObject) -> None:
    begun = data.draw(st.integers(0, len(entries)))
    resumed = CompactRange(begun, [nodes_of(entries)(*one) for one in subtrees(0, begun)])
    for entry in entries[begun:]:
        resumed.append(leaf_hash(entry))
    assert resumed.root() == mth(entries)


@given(trees.filter(bool), st.data())
def test_inclusion_proofs_are_those_of_the_definition_and_verify(entries: list[bytes], data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(entries) - 1))
    proof = inclusion_proof(number, len(entries), nodes_of(entries))
    assert proof == path_of(number, entries)
    verify_inclusion(leaf_hash(entries[number]), number, len(entries), proof, mth(entries))


@given(trees.filter(bool), st.data())
def test_consistency_proofs_are_those_of_the_definition_and_verify(entries: list[bytes], data: st.DataObject) -> None:
    first = data.draw(st.integers(1, len(entries)))
    proof = consistency_proof(first, len(entries), nodes_of(entries))
    assert proof == subproof(first, entries)
    verify_consistency(first, len(entries), proof, (mth(entries[:first]), mth(entries)))


def _changed(data: st.DataObject, proof: list[bytes]) -> list[bytes]:
    """A proof with one hash flipped, left out, put in or moved."""
    place = data.draw(st.integers(0, max(len(proof) - 1, 0)))
    kind = data.draw(st.sampled_from(["flip", "drop", "add", "swap"] if proof else ["add"]))
    changed = list(proof)
    if kind == "flip":
        changed[place] = bytes([changed[place][0] ^ 1]) + changed[place][1:]
    elif kind == "drop":
        del changed[place]
    elif kind == "add":
        changed.insert(place, data.draw(st.binary(min_size=32, max_size=32)))
    else:
        changed = changed[place:] + changed[:place]
    return changed


# Different entries, so that no two subtrees have one hash.
different = st.integers(1, 70).map(lambda size: [bytes([number]) for number in range(size)])


@given(different, st.data())
def test_a_changed_inclusion_proof_shows_nothing(entries: list[bytes], data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(entries) - 1))
    proof = inclusion_proof(number, len(entries), nodes_of(entries))
    leaf, root, size = leaf_hash(entries[number]), mth(entries), len(entries)
    if (changed := _changed(data, proof)) != proof:
        with pytest.raises(ProofError):
            verify_inclusion(leaf, number, size, changed, root)
    with pytest.raises(ProofError):
        verify_inclusion(leaf_hash(b"another"), number, size, proof, root)
    with pytest.raises(ProofError):
        verify_inclusion(leaf, number, size, proof, bytes(32))


@given(different, st.data())
def test_a_changed_consistency_proof_shows_nothing(entries: list[bytes], data: st.DataObject) -> None:
    first = data.draw(st.integers(1, len(entries)))
    proof = consistency_proof(first, len(entries), nodes_of(entries))
    roots = mth(entries[:first]), mth(entries)
    if (changed := _changed(data, proof)) != proof:
        with pytest.raises(ProofError):
            verify_consistency(first, len(entries), changed, roots)
    with pytest.raises(ProofError):
        verify_consistency(first, len(entries), proof, (mth([*entries[: first - 1], b"another"]), roots[1]))


@given(different, st.data())
def test_a_leaf_is_proved_at_its_own_place_only(entries: list[bytes], data: st.DataObject) -> None:
    number, other = (data.draw(st.integers(0, len(entries) - 1)) for _ in range(2))
    proof = inclusion_proof(number, len(entries), nodes_of(entries))
    if other != number:
        with pytest.raises(ProofError):
            verify_inclusion(leaf_hash(entries[number]), other, len(entries), proof, mth(entries))


def test_the_reference_vectors_hold() -> None:
    grown = CompactRange()
    for entry, root in zip(REFERENCE, ROOTS, strict=True):
        grown.append(leaf_hash(entry))
        assert grown.root().hex() == root
    path = inclusion_proof(5, 8, nodes_of(REFERENCE))
    assert [one.hex() for one in path] == [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]
    path = consistency_proof(6, 8, nodes_of(REFERENCE))
    assert [one.hex() for one in path] == [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]


@pytest.mark.parametrize(("first", "second"), [(-1, 3), (4, 3)])
def test_no_tree_continues_a_larger_one(first: int, second: int) -> None:
    with pytest.raises(ProofError, match="not the beginning"):
        verify_consistency(first, second, [], (EMPTY_ROOT, EMPTY_ROOT))
    with pytest.raises(ValueError, match="at most the second"):
        consistency_proof(first, second, nodes_of(REFERENCE))


def test_nothing_but_an_empty_path_stands_between_a_tree_and_itself() -> None:
    root = mth(REFERENCE)
    verify_consistency(8, 8, [], (root, root))
    verify_consistency(0, 8, [], (EMPTY_ROOT, root))
    for first, path, roots in (
        (8, [root], (root, root)),
        (8, [], (root, EMPTY_ROOT)),
        (0, [root], (EMPTY_ROOT, root)),
        (0, [], (root, root)),
    ):
        with pytest.raises(ProofError):
            verify_consistency(first, 8, path, roots)


@pytest.mark.parametrize(("number", "size"), [(-1, 8), (8, 8), (0, 0)])
def test_a_leaf_outside_of_the_tree_has_no_proof(number: int, size: int) -> None:
    with pytest.raises(ValueError, match="below the tree's size"):
        inclusion_proof(number, size, nodes_of(REFERENCE))
    with pytest.raises(ProofError, match="below the tree's size"):
        verify_inclusion(bytes(32), number, size, [], bytes(32))


def test_a_growing_tree_refuses_hashes_of_another_size() -> None:
    with pytest.raises(ValueError, match="2 perfect subtrees of a tree of 6 leaves, got 1"):
        CompactRange(6, [bytes(32)])


def _vectors_hold(module: object) -> None:
    grown = module.CompactRange()  # type: ignore[attr-defined]
    for entry, root in zip(REFERENCE, ROOTS, strict=True):
        grown.append(module.leaf_hash(entry))  # type: ignore[attr-defined]
        assert grown.root().hex() == root


@pytest.mark.parametrize(
    "change",
    [
        ('_sha256(b"\\0" + entry)', '_sha256(b"\\1" + entry)'),
        ('_sha256(b"\\1" + hashes[-1] + right)', '_sha256(b"\\1" + right + hashes[-1])'),
        ("while size & 1:", "if size & 1:"),
    ],
)
def test_another_tree_is_caught(change: tuple[str, str]) -> None:
    _vectors_hold(broken_copy("aggregator.audit.merkle"))
    with pytest.raises((AssertionError, IndexError)):
        _vectors_hold(broken_copy("aggregator.audit.merkle", change))


def _forged_proofs_fail(module: object) -> None:
    """A path that is cut short or drawn out, and a fork, convince nobody."""
    node, root = nodes_of(REFERENCE), mth(REFERENCE)
    inner = node_hash(leaf_hash(REFERENCE[0]), leaf_hash(REFERENCE[1]))
    forged = [
        # A node in place of a leaf: the path is one hash too short.
        lambda: module.verify_inclusion(inner, 0, 8, inclusion_proof(0, 8, node)[1:], root),  # type: ignore[attr-defined]
        lambda: module.verify_inclusion(leaf_hash(b"x"), 3, 8, inclusion_proof(3, 8, node), root),  # type: ignore[attr-defined]
        lambda: module.verify_consistency(6, 8, consistency_proof(6, 8, node), (mth([b"x"] * 6), root)),  # type: ignore[attr-defined]
        lambda: module.verify_consistency(6, 8, consistency_proof(6, 8, node), (mth(REFERENCE[:6]), bytes(32))),  # type: ignore[attr-defined]
        lambda: module.verify_consistency(8, 8, [], (root, bytes(32))),  # type: ignore[attr-defined]
    ]
    for one in forged:
        try:
            one()
        except ValueError:
            continue
        raise AssertionError("a forged proof was believed")


@pytest.mark.parametrize(
    "change",
    [
        (
            '    if last:\n        raise ProofError("the path is shorter than the tree is high")\n    if found',
            "    if found",
        ),
        ("if found != root:", "if False:"),
        ("if (old, new) != roots:", "if new != roots[1]:"),
        ("if (old, new) != roots:", "if old != roots[0]:"),
        ("if is_same and roots[0] != roots[1]:", "if False:"),
    ],
)
def test_a_verifier_that_believes_forged_proofs_is_caught(change: tuple[str, str]) -> None:
    _forged_proofs_fail(merkle)
    _forged_proofs_fail(broken_copy("aggregator.audit.merkle"))
    with pytest.raises(AssertionError, match="was believed"):
        _forged_proofs_fail(broken_copy("aggregator.audit.merkle", change))
