"""Transfers cut and put together: whatever the order, under caps, and never a byte that was not sent."""

from __future__ import annotations

import contextlib
import hashlib
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_protocol.chunking import Reassembler, missing_bitmap, missing_indices, split
from fl_protocol.errors import LocalMisuseError, RefusalReason, RefusedError
from fl_protocol.limits import CHUNK_HEADER_BYTES, MAX_TRANSFER_BYTES, MIN_CHUNK_DATA_BYTES
from fl_protocol.messages import ChunkMsg, decode, encode
from fl_protocol.signing import sign
from tests.fl_protocol.examples import AGGREGATOR_KEY
from tests.ids import short_id

ID = bytes(range(16))


def transfer_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def some_bytes(count: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(count)  # noqa: S311 - test data


def chunks_of(whole: bytes, data_bytes: int = 256, identity: bytes = ID) -> list[ChunkMsg]:
    return list(split(identity, whole, data_bytes=data_bytes))


def refusal(reassembler: Reassembler, chunk: ChunkMsg) -> RefusalReason:
    with pytest.raises(RefusedError) as caught:
        reassembler.accept(chunk, 0.0)
    return caught.value.reason


@given(whole=st.binary(min_size=1, max_size=3000), data_bytes=st.integers(256, 1000), data=st.data())
def test_chunks_in_any_order_and_repeated_give_the_whole_once(
    whole: bytes, data_bytes: int, data: st.DataObject
) -> None:
    chunks = chunks_of(whole, data_bytes)
    assert all(decode(encode(chunk), ChunkMsg) == chunk and chunk.cut_bytes >= len(chunk.data) for chunk in chunks)
    order = data.draw(st.permutations(range(len(chunks))))
    repeats = data.draw(st.lists(st.integers(0, len(chunks) - 1), max_size=5))
    reassembler = Reassembler()
    last, before = order[-1], [index for index in [*order[:-1], *repeats] if index != order[-1]]
    assert [reassembler.accept(chunks[index], 0.0) for index in before] == [None] * len(before)
    assert reassembler.accept(chunks[last], 0.0) == whole
    assert len(reassembler) == 0


def test_a_chunk_adds_no_more_than_its_header_allows_signed_or_not() -> None:
    largest_fields = [*chunks_of(bytes(MAX_TRANSFER_BYTES), 96 * 1024)[-2:], chunks_of(bytes(MAX_TRANSFER_BYTES))[-1]]
    for chunk in largest_fields:
        assert len(encode(chunk)) < len(sign(chunk, AGGREGATOR_KEY)) <= len(chunk.data) + CHUNK_HEADER_BYTES


def test_several_transfers_may_be_interleaved() -> None:
    wholes = [some_bytes(1000, seed) for seed in range(4)]
    cut = [chunks_of(whole, identity=transfer_id(number)) for number, whole in enumerate(wholes)]
    reassembler = Reassembler()
    done = [reassembler.accept(cut[number][index], 0.0) for index in range(4) for number in range(4)]
    assert [whole for whole in done if whole is not None] == wholes


def test_the_same_chunk_with_other_data_is_refused_and_the_transfer_dropped() -> None:
    chunks = chunks_of(some_bytes(1000))
    reassembler = Reassembler()
    reassembler.accept(chunks[0], 0.0)
    assert refusal(reassembler, msgspec.structs.replace(chunks[0], data=bytes(256))) is RefusalReason.MALFORMED
    assert len(reassembler) == 0


@pytest.mark.parametrize("changes", [{"digest": bytes(32)}, {"total_bytes": 1001, "data": bytes(256)}], ids=short_id)
def test_a_chunk_of_another_whole_under_the_same_id_is_refused(changes: dict[str, Any]) -> None:
    whole = some_bytes(1000)
    reassembler = Reassembler()
    chunks = chunks_of(whole)
    reassembler.accept(chunks[0], 0.0)
    assert refusal(reassembler, msgspec.structs.replace(chunks[1], **changes)) is RefusalReason.MALFORMED
    # What was already there is not lost to the intruder.
    assert [reassembler.accept(chunk, 0.0) for chunk in chunks[1:]][-1] == whole


def test_chunks_that_do_not_add_up_to_the_digest_are_refused() -> None:
    chunks = chunks_of(some_bytes(1000))
    reassembler = Reassembler()
    for chunk in chunks[:-1]:
        reassembler.accept(chunk, 0.0)
    wrong = msgspec.structs.replace(chunks[-1], data=bytes(len(chunks[-1].data)))
    assert refusal(reassembler, wrong) is RefusalReason.MALFORMED
    assert len(reassembler) == 0


@pytest.mark.parametrize("second_cut", [300, 600, 256])
def test_a_transfer_cut_anew_replaces_what_came_of_the_old_cut(second_cut: int) -> None:
    """Also when both cuts give the same number of chunks (500 and 600 bytes)."""
    whole = some_bytes(1000)
    reassembler = Reassembler()
    for chunk in chunks_of(whole, 500)[:1]:
        assert reassembler.accept(chunk, 0.0) is None
    again = [reassembler.accept(chunk, 1.0) for chunk in chunks_of(whole, second_cut)]
    assert again == [None] * (len(again) - 1) + [whole]


def test_cuts_of_equal_count_are_told_apart_by_the_last_chunk_too() -> None:
    whole = some_bytes(990)
    reassembler = Reassembler()
    reassembler.accept(chunks_of(whole, 500)[0], 0.0)
    assert reassembler.accept(chunks_of(whole, 600)[1], 0.0) is None
    assert reassembler.accept(chunks_of(whole, 600)[0], 0.0) == whole


def test_a_transfer_over_the_cap_is_refused_at_its_first_chunk() -> None:
    (chunk, *_) = chunks_of(some_bytes(1001))
    assert refusal(Reassembler(max_bytes=1000), chunk) is RefusalReason.OVERSIZED


def test_a_new_transfer_displaces_the_one_longest_without_progress() -> None:
    reassembler = Reassembler(max_transfers=2)
    wholes = {number: some_bytes(600, number) for number in range(3)}
    cut = {number: chunks_of(whole, identity=transfer_id(number)) for number, whole in wholes.items()}
    reassembler.accept(cut[0][0], 0.0)
    reassembler.accept(cut[1][0], 1.0)
    reassembler.accept(cut[0][1], 2.0)  # so that 1 is now the one that waits
    reassembler.accept(cut[2][0], 3.0)
    assert len(reassembler) == 2
    assert reassembler.accept(cut[0][2], 4.0) == wholes[0]
    assert [reassembler.accept(chunk, 5.0) for chunk in cut[2][1:]][-1] == wholes[2]
    assert len(reassembler) == 0


def test_an_abandoned_transfer_does_not_make_the_next_one_oversized() -> None:
    reassembler = Reassembler(max_bytes=1000)
    reassembler.accept(chunks_of(some_bytes(900), identity=transfer_id(1))[0], 0.0)
    whole = some_bytes(800, 2)
    assert [reassembler.accept(chunk, 1.0) for chunk in chunks_of(whole)][-1] == whole


@given(sends=st.lists(st.tuples(st.integers(0, 9), st.integers(300, 1500), st.integers(256, 500), st.integers(0, 9))))
def test_what_is_held_never_exceeds_the_caps(sends: list[tuple[int, int, int, int]]) -> None:
    reassembler = Reassembler(max_bytes=2000, max_transfers=3)
    for number, total, cut, index in sends:
        chunks = chunks_of(bytes([number]) * total, cut, transfer_id(number))
        with contextlib.suppress(RefusedError):  # another length under the same id
            reassembler.accept(chunks[index % len(chunks)], 0.0)
        assert len(reassembler) <= 3
        assert sum(len(part) for open_ in reassembler._open.values() for part in open_.parts.values()) <= 2000


def test_a_slow_transfer_is_not_quiet_as_long_as_chunks_arrive_new_or_not() -> None:
    chunks = chunks_of(some_bytes(1000))
    reassembler = Reassembler()
    reassembler.accept(chunks[0], 0.0)
    reassembler.accept(chunks[2], 100.0)
    assert reassembler.quiet_since(100.0) == []
    assert reassembler.quiet_since(100.1) == [ID]
    reassembler.accept(chunks[2], 150.0)
    assert reassembler.quiet_since(150.0) == []
    assert reassembler.quiet_since(150.1) == [ID]
    assert reassembler.missing(ID) == b"\x0a"
    reassembler.forget_before(150.0)
    assert ID in reassembler
    reassembler.forget_before(150.1)
    assert ID not in reassembler


def test_a_repetition_is_no_progress_where_room_is_needed() -> None:
    reassembler = Reassembler(max_transfers=2)
    for number in (1, 2):
        reassembler.accept(chunks_of(some_bytes(600), identity=transfer_id(number))[0], float(number))
    reassembler.accept(chunks_of(some_bytes(600), identity=transfer_id(1))[0], 3.0)
    reassembler.accept(chunks_of(some_bytes(600), identity=transfer_id(3))[0], 4.0)
    assert [transfer_id(number) in reassembler for number in (1, 2, 3)] == [False, True, True]


@given(count=st.integers(1, 300), present=st.sets(st.integers(0, 299)))
def test_the_bitmap_names_exactly_the_missing_chunks(count: int, present: set[int]) -> None:
    bitmap = missing_bitmap(count, present)
    assert len(bitmap) == -(-count // 8)
    assert missing_indices(bitmap, count) == [index for index in range(count) if index not in present]


@given(bitmap=st.binary(max_size=40), count=st.integers(0, 400))
def test_a_hostile_bitmap_names_only_chunks_that_exist(bitmap: bytes, count: int) -> None:
    indices = missing_indices(bitmap, count)
    assert indices == sorted(set(indices))
    assert all(0 <= index < min(count, 8 * len(bitmap)) for index in indices)


@pytest.mark.parametrize(
    ("length", "data_bytes"),
    [(0, 256), (MAX_TRANSFER_BYTES + 1, 256), (10, 0), (10, MIN_CHUNK_DATA_BYTES - 1), (10, 96 * 1024 + 1)],
)
def test_what_cannot_be_sent_is_refused_before_it_is_cut(length: int, data_bytes: int) -> None:
    with pytest.raises(LocalMisuseError, match="expected"):
        chunks_of(bytes(length), data_bytes)


def test_the_largest_transfer_passes_in_the_smallest_chunks() -> None:
    whole = bytes(MAX_TRANSFER_BYTES)
    chunks = chunks_of(whole)
    assert len(chunks) == 65_536
    reassembler = Reassembler()
    digests = {hashlib.sha256(done).digest() for chunk in chunks if (done := reassembler.accept(chunk, 0.0))}
    assert digests == {chunks[0].digest}
