"""Batches committed in a process of their own: as they would be in this one, whatever happens to that process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from aggregator import assembly
from aggregator.adapters import commit_process
from aggregator.adapters.commit_process import ARENA_BYTES, Commit, CommitProcess, shared_memory_free
from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.batches import Batches, Decided
from aggregator.committer import Accepted, Committer, PendingUpdate, Verdict
from aggregator.errors import DatabaseError
from aggregator.in_force import tasks_in_force
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.database import Database
from fl_protocol.errors import RefusalReason, RefusedError
from tests.aggregator.desk import Desk, SeededEntropy, WatchedTransport, id_of, make_update, messages, sum_of
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import AGGREGATOR_KEY, TENANT

LONG_S = 60.0
"""More than any machine needs to start a process."""


def make_commit(folder: str) -> Commit:
    """What the second process commits with: its own connection to the desk's database."""
    store = AggregatorStore(Database(f"sqlite:///{folder}/aggregator.db"), LocalBlobs(Path(folder) / "blobs"))
    committer = Committer(tenant=TENANT, worker="worker", store=store, entropy=os.urandom, now_s=lambda: 1_000_000.0)

    def commit(batch: Sequence[PendingUpdate]) -> list[Verdict]:
        return committer.commit(batch, lambda: tasks_in_force(store))

    return commit


@contextmanager
def beside(desk: Desk, make: Callable[[str], Commit] = make_commit, **settings: Any) -> Iterator[CommitProcess]:
    process = CommitProcess(partial(make, str(desk.folder)), **settings)
    try:
        yield process
    finally:
        process.close()


def desk_with_round(folder: Path) -> Desk:
    desk = Desk(folder)
    desk.open_round()
    return desk


def pending(device: str, *, cut: int = 500) -> PendingUpdate:
    envelope = make_update(device, update_id=id_of(device))
    return PendingUpdate(device, id_of(device), [envelope[:cut], memoryview(envelope)[cut:]])


def accepted(decided: Decided | None) -> list[str]:
    assert decided is not None
    return [one.update.device for one in decided.verdicts if isinstance(one, Accepted)]


def begin(process: CommitProcess, *updates: PendingUpdate) -> None:
    """Have a batch committed."""
    batch = process.batch()
    assert batch is not None
    for update in updates:
        batch.add(update)
    batch.begin()


@pytest.mark.parametrize("arena_bytes", [1, 3 * 4096, 10**6])
def test_a_batch_is_committed_whatever_fits_into_shared_memory(tmp_path: Path, arena_bytes: int) -> None:
    desk = desk_with_round(tmp_path)
    with beside(desk, arena_bytes=arena_bytes) as process:
        first = pending("watch-0")
        begin(process, first, pending("watch-1"), pending("stranger"), pending("watch-2"))
        decided = process.decided(LONG_S)
        assert accepted(decided) == ["watch-0", "watch-1", "watch-2"]
        assert decided is not None
        refused = decided.verdicts[2]
        assert isinstance(refused, RefusedError)
        assert refused.reason is RefusalReason.UNKNOWN_DEVICE
        begin(process, first)
        again = process.decided(LONG_S)
        assert again is not None
        assert [isinstance(one, Accepted) and one.is_new for one in again.verdicts] == [False]
    assert desk.total().total.tobytes() == sum_of(1.0, 1.0, 1.0).tobytes()


@pytest.mark.parametrize("arena_bytes", [1, 10**6])
def test_the_next_batch_is_handed_over_while_one_is_committed(tmp_path: Path, arena_bytes: int) -> None:
    desk = desk_with_round(tmp_path)
    updates = [pending(f"watch-{index}") for index in range(4)]
    with beside(desk, arena_bytes=arena_bytes) as process:
        for round_trip in range(2):  # the same memory again
            begin(process, *updates[:2])
            begin(process, updates[2])
            assert process.is_busy
            assert process.batch() is None
            assert accepted(process.decided(LONG_S)) == ["watch-0", "watch-1"]
            third = process.batch()
            assert third is not None
            third.add(updates[3])
            assert accepted(process.decided(LONG_S)) == ["watch-2"]
            third.begin()
            assert accepted(process.decided(LONG_S)) == ["watch-3"], round_trip
            assert not process.is_busy
    assert desk.total().total.tobytes() == sum_of(1.0, 1.0, 1.0, 1.0).tobytes()


PAGE_BYTES = 4096


def take_all(_folder: str) -> Commit:
    """Says nothing about anything."""
    return lambda batch: [None] * len(batch)


class SmallSharedMemory:
    """Shared memory of a container: what a process writes there is taken page by page, and beyond it is SIGBUS."""

    def __init__(self, num_pages: int) -> None:
        self._num_pages, self._taken = num_pages, 0

    def free_bytes(self) -> int:
        status = SimpleNamespace(f_bavail=self._num_pages - self._taken, f_frsize=PAGE_BYTES)
        return shared_memory_free(lambda _path: status)  # type: ignore[arg-type, return-value]

    def take(self, memory: memoryview) -> None:
        """Count the pages that were written to."""
        pages = (memory[start : start + PAGE_BYTES] for start in range(0, len(memory), PAGE_BYTES))
        self._taken = sum(any(page) for page in pages)
        assert self._taken <= self._num_pages, "SIGBUS"


def copy_of_first_side(change: tuple[str, str]) -> ModuleType:
    """Broken on purpose, but for the second process, which knows of no copies."""
    copy = broken_copy("aggregator.adapters.commit_process", change)
    same = ("_serve", "_Asked", "_Answer", "_Failure", "_Place")
    copy.__dict__.update({name: getattr(commit_process, name) for name in same})
    return copy


def check_no_more_is_written_than_there_is_room_for(folder: Path, made: Callable[..., CommitProcess]) -> None:
    for num_pages in (0, 1, 2, 7, 100):
        small = SmallSharedMemory(num_pages)
        process = made(
            partial(take_all, str(folder)), arena_bytes=2**20, reserved_bytes=2**13, free_bytes=small.free_bytes
        )
        try:
            for _ in range(3):
                for _ in range(2):
                    begin(process, *[PendingUpdate("watch-0", bytes(16), [b"x" * 3000])] * 50)
                    small.take(process._memory)
                for _ in range(2):
                    decided = process.decided(LONG_S)
                    assert decided is not None
                    assert decided.verdicts == [None] * 50
        finally:
            process.close()
        # Others need some of it.
        assert num_pages < 2 or small.free_bytes() > 0


def test_shared_memory_that_is_too_small_is_not_written_to(tmp_path: Path) -> None:
    check_no_more_is_written_than_there_is_room_for(tmp_path, CommitProcess)


@pytest.mark.parametrize(
    "change",
    [
        ("batch.clear(self._room(batch))", "batch.clear(2**19)"),
        ("return min(self._part_bytes, max(batch.taken_bytes, share))", "return share * MOST_BATCHES * 2"),
    ],
)
def test_a_process_that_writes_beyond_shared_memory_is_caught(tmp_path: Path, change: tuple[str, str]) -> None:
    copy = copy_of_first_side(change)
    with pytest.raises(AssertionError, match="SIGBUS"):
        check_no_more_is_written_than_there_is_room_for(tmp_path, copy.CommitProcess)


def test_memory_for_small_batches_is_taken_at_the_start(tmp_path: Path) -> None:
    small = SmallSharedMemory(100)
    process = CommitProcess(
        partial(take_all, str(tmp_path)), arena_bytes=2**20, reserved_bytes=40 * 4096, free_bytes=small.free_bytes
    )
    try:
        assert [part.reserved for part in process._parts] == [(0, 20 * 4096), (2**19, 20 * 4096)]
        begin(process, PendingUpdate("watch-0", bytes(16), [b"x" * 20 * 4096]))
        assert [part.taken_bytes for part in process._parts] == [20 * 4096, 20 * 4096]
        assert process.decided(LONG_S) == ([("watch-0", bytes(16))], [None], {})
    finally:
        process.close()


def test_where_the_system_does_not_say_what_is_free_all_of_the_arena_is_used() -> None:
    def unknown(_path: str) -> os.statvfs_result:
        raise FileNotFoundError

    assert shared_memory_free(unknown) == 2 * ARENA_BYTES


def make_killed_once(folder: str) -> Commit:
    """Ends the process at the first batch that it is given with a device's name, as SIGKILL would."""
    commit = make_commit(folder)

    def killed_once(batch: Sequence[PendingUpdate]) -> list[Verdict]:
        mark = Path(folder) / "killed"
        if any(update.device == "watch-1" for update in batch) and not mark.exists():
            mark.touch()
            os._exit(9)
        return commit(batch)

    return killed_once


@pytest.mark.parametrize("killed_at", ["watch-1", "watch-2"])
def test_a_process_that_dies_is_replaced_and_its_batches_count_once(tmp_path: Path, killed_at: str) -> None:
    desk = desk_with_round(tmp_path)
    others = sorted({"watch-1", "watch-2"})
    first, second = (others, ["watch-0"]) if killed_at == "watch-1" else (["watch-0"], others)
    decided: list[str] = []
    with beside(desk, make_killed_once) as process:
        begin(process, *map(pending, first))
        begin(process, *map(pending, second))
        told = []
        while process.is_busy:
            try:
                decided += accepted(process.decided(LONG_S))
            except DatabaseError as error:
                told.append(str(error))
    assert decided == first + second
    assert len(told) == 1
    assert "was started again" in told[0]
    assert desk.total().total.tobytes() == sum_of(1.0, 1.0, 1.0).tobytes()


def unusable(folder: str) -> Commit:
    """A database that cannot be opened."""
    raise DatabaseError(f"{folder} cannot be opened today")


def test_a_database_that_fails_there_is_an_error_here(tmp_path: Path) -> None:
    desk = desk_with_round(tmp_path)
    with beside(desk, unusable) as process:
        begin(process, pending("watch-0"))
        for _ in range(2):
            with pytest.raises(DatabaseError, match="cannot be opened today"):
                process.decided(LONG_S)
            assert process.is_busy


def make_confused(folder: str) -> Commit:
    """Some updates are an error that nobody has foreseen, alone and in whatever batch they are."""
    commit = make_commit(folder)

    def confused(batch: Sequence[PendingUpdate]) -> list[Verdict]:
        if any(update.device == "confusing" for update in batch):
            raise IndexError("list index out of range")
        return commit(batch)

    return confused


def check_an_unforeseen_error_costs_nobody_else_its_place(folder: Path) -> None:
    desk = desk_with_round(folder)
    with beside(desk, make_confused) as process:
        started = process._process.pid
        begin(process, pending("watch-0"), PendingUpdate("confusing", bytes(16), [b"x"]), pending("watch-1"))
        begin(process, pending("watch-2"))
        decided: list[Decided | None] = []
        for _ in range(2):
            with pytest.raises(DatabaseError, match="IndexError: list index out of range"):
                process.decided(LONG_S)
            if not decided:  # the batch after it, before it is tried again
                decided.append(process.decided(LONG_S))
        decided.append(process.decided(LONG_S))
        assert accepted(decided[0]) == ["watch-2"]
        found = decided[1]
        assert accepted(found) == ["watch-0", "watch-1"]
        assert found is not None
        assert found.verdicts[1] is None
        assert found.unusable == {1: "IndexError: list index out of range"}
        # The next batches are as any other, by the same process.
        begin(process, pending("watch-3"))
        last = process.decided(LONG_S)
        assert accepted(last) == ["watch-3"]
        assert last is not None
        assert last.unusable == {}
        assert process._process.pid == started
    assert desk.total().total.tobytes() == sum_of(1.0, 1.0, 1.0, 1.0).tobytes()


def test_an_update_that_is_an_unforeseen_error_is_found_and_the_others_count(tmp_path: Path) -> None:
    check_an_unforeseen_error_costs_nobody_else_its_place(tmp_path)


def serve_until_an_error(
    connection: Connection, arena_name: str, reserved: list[tuple[int, int]], make: Callable[[], Commit]
) -> None:
    """A second process that ends by whatever is no DatabaseError, as one without a guard would."""
    guard = "except Exception as error:  # noqa: BLE001 - whatever"
    copy = broken_copy("aggregator.adapters.commit_process", (guard, "except SystemError as error:  # whatever"))
    copy.__dict__.update(_Asked=commit_process._Asked, _Answer=commit_process._Answer, _Place=commit_process._Place)
    copy._serve(connection, arena_name, reserved, make)


def test_a_second_process_that_an_unforeseen_error_stops_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_process, "_serve", serve_until_an_error)
    with pytest.raises((AssertionError, DatabaseError)):
        check_an_unforeseen_error_costs_nobody_else_its_place(tmp_path)


def test_a_first_process_that_tries_the_same_batch_for_ever_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_process, "MOST_FAILURES", 10**9)
    with pytest.raises(DatabaseError, match="IndexError"):
        check_an_unforeseen_error_costs_nobody_else_its_place(tmp_path)


class UnsureBatch:
    """Is decided as soon as it is begun."""

    def __init__(self, commits: Unsure) -> None:
        self._commits = commits
        self.keys: list[tuple[str, bytes]] = []
        self.num_bytes = 0

    def add(self, update: PendingUpdate) -> None:
        self.keys.append((update.device, update.update_id))

    def begin(self) -> None:
        self._commits.begun.append(self)


class Unsure:
    """Commits nothing, and says that it could do nothing with the first update."""

    gather_s = 0.0

    def __init__(self) -> None:
        self.begun: list[UnsureBatch] = []

    def batch(self) -> UnsureBatch:
        return UnsureBatch(self)

    @property
    def is_busy(self) -> bool:
        return bool(self.begun)

    def decided(self, wait_s: float) -> Decided | None:
        if not self.begun:
            return None
        keys = self.begun.pop().keys
        return Decided(keys, [None] * len(keys), {0: "IndexError: list index out of range"})

    def close(self) -> None: ...


def test_the_operator_is_told_of_an_update_that_is_unusable(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.open_round()
    desk.start()
    intake = desk.intake()
    intake.batches = Batches(Unsure(), desk.clock.now_s)
    desk.take(messages(make_update()))
    desk.let_pass(2.0)
    (told,) = desk.journal.named("update_unusable")
    assert (told["device"], told["reason"]) == ("watch-0", "IndexError: list index out of range")
    assert desk.transport().num_held == 0


def test_a_service_that_commits_beside_answers_after_the_commit(tmp_path: Path) -> None:
    desk = desk_with_round(tmp_path)
    with beside(desk) as process:
        service = assembly.make_service(
            tenant=TENANT,
            name="worker",
            coordinates=False,
            signing_key=AGGREGATOR_KEY,
            store=desk.open_store(),
            transport=WatchedTransport(desk.broker, session="worker", receive_maximum=1000),
            journal=desk.journal,
            entropy=SeededEntropy("beside"),
            now_s=desk.clock.now_s,
            monotonic_s=desk.clock.now_s,
            limits=desk.limits,
            commits=process,
        )
        desk.services["worker"] = service
        service.start()
        desk.settle()
        for device in ("watch-0", "watch-1", "watch-2"):
            for message in messages(make_update(device, update_id=id_of(device)), device, update_id=id_of(device)):
                desk.broker.publish(message.topic, message.payload, retain=False)
        intake = desk.intake()
        service.step()
        assert not desk.said()  # still gathered
        assert desk.transport().num_held > 0
        desk.clock.time_s += 1.0
        service.step()
        while intake.batches.is_busy:
            intake.collect(LONG_S)
        service.step()
        assert sorted(receipt.device for receipt in desk.receipts()) == ["watch-0", "watch-1", "watch-2"]
        assert desk.transport().num_held == 0
        desk.services.clear()
    assert desk.total().total.tobytes() == sum_of(1.0, 1.0, 1.0).tobytes()
