"""The outbox: work until it is sealed, an update from then on, never both; durable, and bounded."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_client.errors import StoreError
from device_client.events import PendingUpdate
from device_client.local_optimiser import LocalProgress
from device_client.outbox import PREFIX, Outbox, OutboxFullError, Work
from fl_protocol.messages import encode
from tests.device_client.ports import MemoryStore, make_manifest, make_plan

STUDY, OTHER = "clinic/watch", "clinic/steps"


def work(number: int = 1, *, study: str = STUDY, size: int = 8, **changes: Any) -> Work:
    return Work(
        update_id=bytes([number]) * 16,
        study=study,
        device="watch-7",
        manifest=encode(make_manifest(round=number)),
        start=np.arange(size, dtype="<f4").tobytes(),
        **changes,
    )


def update(number: int = 1, *, study: str = STUDY, size: int = 50) -> PendingUpdate:
    return PendingUpdate(
        update_id=bytes([number]) * 16,
        study=study,
        device="watch-7",
        round=number,
        envelope=bytes(size),
        sealed_digest=bytes(32),
        deadline_s=1.0,
        recipient_key="ab" * 16,
    )


def test_an_update_takes_the_place_of_its_work() -> None:
    store = MemoryStore()
    outbox = Outbox(store)
    outbox.begin(work())
    for one in (outbox, Outbox(store.after_restart())):
        assert one.work(STUDY) == work()
        assert list(one) == []
    outbox.put(update())
    for one in (outbox, Outbox(store.after_restart())):
        assert one.work(STUDY) is None
        assert list(one) == [update()]
    assert len(list(store.names(PREFIX))) == 1
    outbox.discard(update().update_id)
    for one in (outbox, Outbox(store.after_restart())):
        assert list(one) == []
        assert one.size_bytes == 0


def test_work_keeps_its_progress_and_its_vectors() -> None:
    store = MemoryStore()
    progress = LocalProgress(2, bytes(64), b"")
    given_work = work(progress=progress, server_control=bytes(8), own_control=np.ones(2, "<f4").tobytes())
    Outbox(store).put(given_work)
    found = Outbox(store.after_restart()).work(STUDY)
    assert found == given_work
    assert found.progress == progress
    np.testing.assert_array_equal(found.start_params(), np.arange(8))
    assert found.decoded_manifest() == make_manifest()
    control = found.control()
    assert control is not None
    np.testing.assert_array_equal(control[1], [1, 1])
    assert work().control() is None


def test_studies_do_not_see_each_others_entries() -> None:
    outbox = Outbox(MemoryStore())
    outbox.put(update(1))
    outbox.put(update(2, study=OTHER))
    outbox.put(work(3, study=OTHER))
    assert [pending.round for pending in outbox.of(STUDY)] == [1]
    assert outbox.work(STUDY) is None
    assert outbox.drop(OTHER) == 2
    assert list(outbox) == [update(1)]
    assert outbox.drop(OTHER) == 0


@given(st.lists(st.tuples(st.sampled_from(["put", "discard", "drop"]), st.integers(1, 5), st.booleans())))
def test_what_is_in_memory_is_always_what_a_restart_finds(changes: list[tuple[str, int, bool]]) -> None:
    store = MemoryStore()
    outbox = Outbox(store)
    for kind, number, full in changes:
        store.full = full
        study = STUDY if number % 2 else OTHER
        try:
            if kind == "put":
                outbox.put(update(number, study=study, size=10 * number))
            elif kind == "discard":
                outbox.discard(bytes([number]) * 16)
            else:
                outbox.drop(study)
        except StoreError:
            assert full
    store.full = False
    outbox.sweep()  # what a full disk kept although it was dropped
    again = Outbox(store.after_restart())
    assert list(again) == list(outbox)
    assert again.size_bytes == outbox.size_bytes == sum(len(data) for data in store.blobs.values())


def fill(outbox: Outbox, *, most: int = 50) -> int:
    """Take part until there is no room, the way a participation does: note, progress, update."""
    for number in range(1, most):
        noted = work(number, size=200)
        try:
            outbox.begin(noted)
        except OutboxFullError:
            return number - 1
        outbox.put(msgspec.structs.replace(noted, progress=LocalProgress(1, bytes(1600), bytes(1600))))
        outbox.put(update(number, size=900))
    return most


class Unbounded(Outbox):
    """Broken: it takes whatever comes."""

    def begin(self, work: Work) -> None:
        self.put(work)


def check_it_is_bounded(kind: type[Outbox]) -> None:
    store = MemoryStore()
    outbox, most = kind(store, maximum_bytes=30_000), 0
    taken = fill(outbox)
    most = max(most, sum(len(data) for data in store.blobs.values()))
    assert 1 <= taken < 40
    assert most <= 30_000
    with pytest.raises(OutboxFullError, match="maximum_outbox_bytes is 30000"):
        outbox.begin(work(99, size=5000))
    assert fill(Outbox(store.after_restart(), maximum_bytes=30_000), most=2) in {0, 2}


def test_it_is_bounded() -> None:
    check_it_is_bounded(Outbox)


def test_an_outbox_without_bound_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check_it_is_bounded(Unbounded)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_work_with_all_its_progress_stays_within_the_bound(momentum: float) -> None:
    size = 1000
    manifest = make_manifest(plan=make_plan(momentum=momentum))
    noted = msgspec.structs.replace(
        work(size=size, server_control=bytes(4 * size), own_control=bytes(4 * size)), manifest=encode(manifest)
    )
    velocity = bytes(8 * size) if momentum else b""
    begun = 0
    for maximum_bytes in range(20_000, 60_000, 2000):
        outbox = Outbox(MemoryStore(), maximum_bytes=maximum_bytes)
        if maximum_bytes < noted.largest_bytes():
            with pytest.raises(OutboxFullError, match=f"maximum_outbox_bytes is {maximum_bytes}, and a participation"):
                outbox.begin(noted)
            continue
        outbox.begin(noted)
        outbox.put(msgspec.structs.replace(noted, progress=LocalProgress(1, bytes(8 * size), velocity)))
        assert outbox.size_bytes <= maximum_bytes
        begun += 1
    assert begun > 5


def test_nothing_is_noted_where_there_is_no_room() -> None:
    store = MemoryStore()
    outbox = Outbox(store, maximum_bytes=9000)
    with pytest.raises(OutboxFullError):
        outbox.begin(work(size=5000))
    assert store.operations == []


def test_a_full_disk_leaves_the_old_entry() -> None:
    store = MemoryStore()
    outbox = Outbox(store)
    outbox.begin(work())
    store.full = True
    with pytest.raises(StoreError):
        outbox.put(update())
    assert outbox.work(STUDY) == work()


@pytest.mark.parametrize("data", [b"\xc1", b"", b"\x90", msgspec.msgpack.encode({"type": "other"})])
def test_a_damaged_entry_is_named(data: bytes) -> None:
    store = MemoryStore()
    store.blobs["outbox/00"] = data
    with pytest.raises(StoreError, match="outbox/00"):
        Outbox(store)


def test_work_whose_manifest_cannot_be_read_says_so() -> None:
    with pytest.raises(StoreError, match="manifest"):
        msgspec.structs.replace(work(), manifest=b"\xc1").decoded_manifest()


class StuckStore(MemoryStore):
    """A disk that does not delete, and may not write either."""

    stuck = True

    def delete(self, name: str) -> None:
        if self.stuck:
            raise StoreError(f"{name} cannot be deleted (Input/output error)")
        super().delete(name)


@pytest.mark.parametrize("entry", [work(), update()])
@pytest.mark.parametrize("full", [False, True])
def test_what_is_given_up_is_out_of_use_although_the_disk_does_not_let_go_of_it(
    entry: Work | PendingUpdate, *, full: bool
) -> None:
    store = StuckStore()
    outbox = Outbox(store)
    outbox.put(entry)
    store.full = full
    with pytest.raises(StoreError):
        outbox.give_up(entry.update_id)
    with pytest.raises(StoreError, match="Input/output"):
        outbox.sweep()
    assert outbox.work(STUDY) is None
    assert list(outbox) == []
    assert outbox.size_bytes == sum(len(data) for data in store.blobs.values()) > 0
    store.stuck = store.full = False
    outbox.sweep()
    assert outbox.size_bytes == 0 == len(store.blobs)


def test_a_mark_keeps_what_was_given_up_out_of_use_for_the_next_process() -> None:
    store = StuckStore()
    outbox = Outbox(store)
    outbox.put(work())
    with pytest.raises(StoreError):
        outbox.give_up(work().update_id)
    again = Outbox(store)
    assert again.work(STUDY) is None
    store.stuck = False
    again.sweep()
    assert not store.blobs


def test_what_a_wearer_left_is_out_of_use_although_the_disk_refuses() -> None:
    store = StuckStore()
    outbox = Outbox(store)
    outbox.put(update(1))
    outbox.put(work(2))
    store.full = True
    with pytest.raises(StoreError):
        outbox.drop(STUDY)
    assert list(outbox) == []
    assert outbox.work(STUDY) is None
