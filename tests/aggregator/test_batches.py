"""Whole updates on their way to the database: what is gathered, for how long, and what becomes of a failing batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from aggregator.batches import (
    FULL_BATCH,
    FULL_BATCH_BYTES,
    LONGEST_PENDING_S,
    MOST_BATCH_BYTES,
    MOST_IN_BATCH,
    Batches,
    CommitsHere,
    Decided,
)
from aggregator.committer import PendingUpdate, Verdict
from aggregator.errors import DatabaseError
from tests.aggregator.desk import VirtualClock, id_of


class Database:
    """Commits what it is given, unless it is away."""

    def __init__(self) -> None:
        self.is_away = False
        self.committed: list[list[str]] = []

    def __call__(self, batch: Sequence[PendingUpdate]) -> list[Verdict]:
        if self.is_away:
            raise DatabaseError("away")
        self.committed.append([update.device for update in batch])
        return [None] * len(batch)


def update(device: str, num_bytes: int = 100) -> PendingUpdate:
    return PendingUpdate(device, id_of(device), [b"x" * num_bytes])


def decided(*devices: str) -> Decided:
    return Decided([(device, id_of(device)) for device in devices], [None] * len(devices))


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def batches(database: Database, clock: VirtualClock) -> Batches:
    return Batches(CommitsHere(database), clock.now_s)


def test_what_was_gathered_is_decided_together_and_once(batches: Batches, database: Database) -> None:
    assert all(batches.add(update(device)) for device in "abc")
    assert (batches.num_gathered, batches.is_busy) == (3, False)
    batches.hand_over()
    assert (batches.num_gathered, batches.is_busy) == (0, True)
    assert batches.decided(0.0) == decided("a", "b", "c")
    assert batches.decided(0.0) is None
    assert database.committed == [["a", "b", "c"]]
    assert not batches.is_busy


def test_nothing_is_handed_over_where_nothing_was_gathered(batches: Batches) -> None:
    assert not batches.is_due(more_wait=False)
    batches.hand_over()
    assert not batches.is_busy


def test_a_batch_waits_for_more_as_long_as_more_is_there_and_not_for_ever(
    batches: Batches, clock: VirtualClock
) -> None:
    batches.add(update("a"))
    assert batches.is_due(more_wait=False)
    assert not batches.is_due(more_wait=True)
    clock.time_s += LONGEST_PENDING_S
    assert batches.is_due(more_wait=True)


@pytest.mark.parametrize(("count", "num_bytes"), [(FULL_BATCH, 100), (3, FULL_BATCH_BYTES // 3 + 1)])
def test_a_full_batch_is_due_at_once(batches: Batches, count: int, num_bytes: int) -> None:
    for index in range(count - 1):
        batches.add(update(f"watch-{index}", num_bytes))
    assert not batches.is_due(more_wait=True)
    batches.add(update("last", num_bytes))
    assert batches.is_due(more_wait=True)


@pytest.mark.parametrize(("count", "num_bytes"), [(MOST_IN_BATCH, 100), (8, MOST_BATCH_BYTES // 8)])
def test_there_is_an_end_to_what_one_batch_takes(batches: Batches, count: int, num_bytes: int) -> None:
    same = update("watch", num_bytes)
    assert [batches.add(same) for _ in range(count + 2)] == [True] * count + [False] * 2
    batches.hand_over()
    assert batches.make_room()


def test_an_update_of_any_size_has_room_in_an_empty_batch(batches: Batches) -> None:
    assert batches.add(update("large", MOST_BATCH_BYTES + 1))


def test_with_two_batches_on_their_way_there_is_no_room_until_one_is_decided(batches: Batches) -> None:
    for device in "ab":
        batches.add(update(device))
        batches.hand_over()
    assert not batches.make_room()
    assert not batches.add(update("c"))
    assert batches.decided(0.0) == decided("a")
    assert batches.add(update("c"))


def test_a_batch_that_fails_is_kept_and_what_comes_meanwhile_gathers_behind_it(
    batches: Batches, database: Database
) -> None:
    database.is_away = True
    batches.add(update("a"))
    batches.hand_over()
    for _ in range(3):
        with pytest.raises(DatabaseError, match="away"):
            batches.decided(0.0)
    batches.add(update("b"))
    assert not batches.is_due(more_wait=False)  # it would wait for the other anyway, and take fewer with it
    database.is_away = False
    assert batches.decided(0.0) == decided("a")
    assert batches.is_due(more_wait=False)
    batches.hand_over()
    assert batches.decided(0.0) == decided("b")


class Gathering(CommitsHere):
    """As a process of its own asks for it."""

    gather_s = 0.03


def test_where_each_batch_costs_the_same_few_syncs_it_gathers_for_a_moment(
    database: Database, clock: VirtualClock
) -> None:
    batches = Batches(Gathering(database), clock.now_s)
    assert not batches.is_gathering
    batches.add(update("a"))
    clock.time_s += 0.02
    batches.add(update("b"))  # the first one counts
    assert batches.is_gathering
    assert not batches.is_due(more_wait=False)
    clock.time_s += 0.02
    assert not batches.is_gathering
    assert batches.is_due(more_wait=True)
    clock.time_s -= 3600.0  # a clock that was set back keeps nobody waiting
    assert batches.is_due(more_wait=True)
