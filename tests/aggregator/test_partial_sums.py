"""Partial sums as they are kept: unreadable without the round's secret, and of no use anywhere but in their place."""

from __future__ import annotations

import numpy as np
import pytest

from aggregator.errors import BlobError
from aggregator.exact_sum import ExactSum
from aggregator.partial_sums import open_sum, seal_sum
from tests.aggregator.desk import SeededEntropy
from tests.enrolments import broken_copy

PLACE = "watch 3 3 worker"
SECRET = bytes(range(32))


def a_sum(count: int = 2) -> ExactSum:
    total = ExactSum.zeros(50)
    for number in range(count):
        total.add(np.full(50, 0.125 + number, np.float32))
    return total


def sealed(partial: ExactSum | None = None, *, secret: bytes | None = SECRET, place: str = PLACE) -> bytes:
    return seal_sum(partial if partial is not None else a_sum(), secret, place=place, entropy=SeededEntropy("nonce"))


def test_what_was_sealed_is_opened_bit_for_bit_and_can_be_added_to() -> None:
    opened = open_sum(sealed(), SECRET, place=PLACE, count=2)
    assert opened.total.tobytes() == a_sum().total.tobytes()
    assert opened.count == 2
    opened.add(np.full(50, 2.125, np.float32))
    assert opened.total.tobytes() == a_sum(3).total.tobytes()


def test_nothing_of_the_sum_can_be_read_in_it() -> None:
    raw = sealed()
    plain = a_sum().total.tobytes()
    assert len(raw) == len(plain) + 28
    assert plain[:16] not in raw
    assert SECRET not in raw


@pytest.mark.parametrize(
    ("secret", "place", "count"),
    [
        (bytes(31) + b"\x01", PLACE, 2),
        (SECRET, "watch 3 3 another", 2),
        (SECRET, "watch 4 3 worker", 2),
        (SECRET, "watch 3 2 worker", 2),
        (SECRET, "other 3 3 worker", 2),
        (SECRET, PLACE, 3),
    ],
    ids=["another secret", "another worker", "another round", "another origin", "another task", "another count"],
)
def test_it_opens_in_its_place_alone(secret: bytes, place: str, count: int) -> None:
    with pytest.raises(BlobError, match=f"the stored sum of {place} is damaged"):
        open_sum(sealed(), secret, place=place, count=count)


@pytest.mark.parametrize("at", [0, 11, 12, 100, -1])
def test_a_damaged_one_is_an_error(at: int) -> None:
    raw = bytearray(sealed())
    raw[at] ^= 1
    with pytest.raises(BlobError, match="damaged"):
        open_sum(bytes(raw), SECRET, place=PLACE, count=2)


@pytest.mark.parametrize("length", [0, 5, 12, 27, 100])
def test_a_torn_one_is_an_error(length: int) -> None:
    with pytest.raises(BlobError, match="damaged"):
        open_sum(sealed()[:length], SECRET, place=PLACE, count=2)


def test_the_same_sum_is_never_encrypted_twice_under_one_nonce() -> None:
    entropy = SeededEntropy("nonces")
    nonces = {seal_sum(a_sum(), SECRET, place=PLACE, entropy=entropy)[:12] for _ in range(50)}
    assert len(nonces) == 50


def test_a_copy_that_binds_nothing_is_caught() -> None:
    loose = broken_copy("aggregator.partial_sums", ('return f"{place} {count}".encode()', 'return b""'))
    raw = loose.seal_sum(a_sum(), SECRET, place=PLACE, entropy=SeededEntropy("nonce"))
    assert loose.open_sum(raw, SECRET, place="watch 4 3 worker", count=7).count == 7
    with pytest.raises(BlobError):
        open_sum(raw, SECRET, place=PLACE, count=2)


@pytest.mark.parametrize("erased", [None, b""])
def test_nothing_is_sealed_or_opened_for_a_round_that_is_closed(erased: bytes | None) -> None:
    """Security: an empty secret would be one that everybody knows."""
    with pytest.raises(BlobError, match="its round is closed"):
        sealed(secret=erased)
    with pytest.raises(BlobError, match="its round is closed"):
        open_sum(sealed(), erased, place=PLACE, count=2)
