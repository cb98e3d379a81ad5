"""What one device, one damaged blob or one unlucky worker may not do to everybody else's updates."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.errors import BlobError, ConflictError
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.database import Database
from aggregator.store.rounds import Rounds
from aggregator.store.updates import NewUpdate, Updates
from aggregator.task_file import Asynchronous
from fl_protocol.errors import RefusalReason
from fl_protocol.messages import ReceiptMsg
from fl_protocol.transport import Received
from tests.aggregator.desk import (
    SUMS_SECRET,
    Desk,
    a_desk,
    broken_committer,
    built_with,
    id_of,
    make_update,
    messages,
    reasons,
    sum_of,
    task_config,
)
from tests.contracts.databases import new_url
from tests.fl_protocol.examples import TASK, round_key

WITHIN_S = 20.0
ASYNCHRONOUS = task_config(asynchronous=Asynchronous(maximum_staleness=2))
KEYS = {number: round_key("x25519", number) for number in (4, 5, 6, 7)}

# The minimum cohort is of devices: one of them, with updates of several rounds, must not fill it.


def an_asynchronous_desk(folder: Path) -> Desk:
    desk = a_desk(folder, tasks=(ASYNCHRONOUS,))
    desk.close_round()
    for number in (4, 5, 6):
        desk.open_round(number, key=KEYS[number])
    return desk


def made_for(number: int, device: str = "watch-0") -> list[Received]:
    update_id = id_of(f"{device} {number}")
    envelope = make_update(device, update_id=update_id, round=number, recipient=KEYS[number].recipient())
    return messages(envelope, device, update_id=update_id)


def check_that_a_device_counts_once(folder: Path, *, in_one_batch: bool) -> None:
    desk = an_asynchronous_desk(folder)
    sent = [made_for(number) for number in (4, 5, 6)]
    for batch in [[*sent[0], *sent[1], *sent[2]]] if in_one_batch else sent:
        desk.take(batch)
    assert [type(one) for one in desk.said()] == [ReceiptMsg]
    desk.clock.time_s += 2.0
    desk.take([*made_for(6, "watch-1"), *made_for(4)])
    assert sorted(one.device for one in desk.receipts()) == ["watch-0", "watch-1"]
    assert desk.total(6).count == desk.store.updates.arrived(TASK, 6) == 2
    desk.open_round(7, key=KEYS[7])
    desk.take(made_for(5))  # not refused for good: the next round counts one more
    assert [type(one) for one in desk.said()] == [ReceiptMsg]
    assert desk.total(7).count == 1


@pytest.mark.parametrize("in_one_batch", [True, False])
def test_a_device_counts_once_in_a_round_whatever_its_updates_were_made_for(
    tmp_path: Path, *, in_one_batch: bool
) -> None:
    check_that_a_device_counts_once(tmp_path, in_one_batch=in_one_batch)


@pytest.mark.parametrize(
    ("change", "in_one_batch"),
    [
        (("if counting in batch.counted or", "if"), True),
        (("batch.counted.add(counting)", "pass"), True),
        (("batch.counted = devices_that_counted(connection, places)", "pass"), False),
    ],
)
def test_a_committer_that_counts_a_device_twice_is_caught(
    tmp_path: Path, change: tuple[str, str], *, in_one_batch: bool
) -> None:
    with built_with(Committer=broken_committer(change)), pytest.raises(AssertionError):
        check_that_a_device_counts_once(tmp_path, in_one_batch=in_one_batch)


def test_the_database_takes_no_second_update_of_a_device_in_a_round(database: Database) -> None:
    def row(number: int, device: str, counted_in: int) -> NewUpdate:
        return NewUpdate(TASK, id_of(f"{number} {device}"), number, counted_in, device, bytes(32), 1.0, 1)

    updates = Updates(database)
    with database.transaction() as connection:
        updates.add(connection, [row(4, "watch-0", 6), row(4, "watch-1", 6), row(5, "watch-0", 7)])
    with pytest.raises(ConflictError), database.transaction() as connection:
        updates.add(connection, [row(6, "watch-0", 6)])


# A sum that is lost or damaged.


def check_that_other_tasks_go_on(folder: Path, *, damaged: bool) -> None:
    desk = a_desk(folder, tasks=(task_config(), task_config(name="other")))
    desk.take(messages(make_update()))
    desk.said()
    desk.kill()
    (blob,) = [path for path in (folder / "blobs" / "sum").iterdir() if path.is_file()]
    whole = blob.read_bytes()
    if damaged:
        blob.write_bytes(bytes(len(whole)))
    else:
        blob.unlink()
    desk.start()

    def send(device: str, task: str = TASK) -> list[Received]:
        update_id = id_of(f"{device} {task}")
        return messages(make_update(device, update_id=update_id, task=task), device, update_id=update_id)

    desk.take([*send("watch-1"), *send("watch-2", "other"), *send("watch-2")])
    assert [(one.device, one.task) for one in desk.receipts()] == [("watch-2", "other")]
    assert desk.journal.named("degraded") == []
    assert len(desk.accepted()) == 1
    blob.write_bytes(whole)  # restored
    desk.take([*send("watch-1"), *send("watch-2")])
    assert sorted(one.device for one in desk.receipts()) == ["watch-1", "watch-2"]
    assert desk.total().total.tobytes() == sum_of(1.0, 1.0, 1.0).tobytes()


@pytest.mark.parametrize("damaged", [True, False])
def test_a_lost_or_damaged_sum_of_one_task_does_not_stop_others(tmp_path: Path, *, damaged: bool) -> None:
    check_that_other_tasks_go_on(tmp_path, damaged=damaged)


@pytest.mark.parametrize("damaged", [True, False])
def test_a_committer_that_lets_it_stop_all_is_caught(tmp_path: Path, *, damaged: bool) -> None:
    loose = broken_committer(("        except BlobError:", "        except ZeroDivisionError:"))
    with built_with(Committer=loose), pytest.raises(AssertionError):
        check_that_other_tasks_go_on(tmp_path, damaged=damaged)


def test_a_store_that_cannot_be_written_is_still_everybodys_trouble(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)

    def away(moment: str) -> None:
        if moment in ("before put", "before get"):
            raise BlobError("it is away")

    desk.blobs.watch = away
    desk.take(messages(make_update()))
    assert len(desk.journal.named("degraded")) == 1
    desk.blobs.watch = lambda _moment: None
    desk.let_pass(2.0)
    assert len(desk.receipts()) == 1


# Late updates steer participation: one device must not.


def check_late_updates_of_one_device(folder: Path) -> None:
    desk = a_desk(folder)
    for number in (4, 5):
        desk.open_round(number)

    def send_late(device: str, name: str, number: int) -> None:
        update_id = id_of(name)
        desk.take(messages(make_update(device, update_id=update_id, round=number), device, update_id=update_id))

    for index in range(6):
        send_late("watch-0", f"late {index}", 3 + index % 2)
    twice = [(make_update(update_id=id_of(name), round=4), id_of(name)) for name in ("a", "b")]
    desk.take([one for envelope, name in twice for one in messages(envelope, update_id=name)])  # in one batch
    send_late("watch-1", "another device", 4)
    send_late("watch-2", "of long ago", 2)
    assert set(reasons(desk.said())) == {RefusalReason.ROUND_CLOSED}
    assert [(one.number, one.late) for one in desk.store.rounds.history(TASK)] == [(3, 0), (4, 0), (5, 2)]
    desk.open_round(6)
    send_late("watch-0", "in the next round", 5)
    assert desk.store.rounds.history(TASK)[-1].late == 1
    committer = desk.services["worker"].worker._committer
    assert set(committer._late) == {(TASK, 6)}  # and memory does not grow with the rounds


def test_a_device_is_late_once_in_a_round_and_only_for_a_recent_one(tmp_path: Path) -> None:
    check_late_updates_of_one_device(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        ("header.device not in before and", ""),
        ("if recent and", "if"),
        ("if _may_be_open(key, tasks)}", "}"),
        ("self._late.setdefault(round_key, set()).update(late)", "pass"),
    ],
)
def test_a_committer_that_counts_them_all_is_caught(tmp_path: Path, change: tuple[str, str]) -> None:
    with built_with(Committer=broken_committer(change)), pytest.raises(AssertionError):
        check_late_updates_of_one_device(tmp_path)


def test_late_devices_are_remembered_up_to_a_bound(tmp_path: Path) -> None:
    with built_with(Committer=broken_committer(("_MOST_LATE = 100_000", "_MOST_LATE = 1"))):
        desk = a_desk(tmp_path)
    for device in ("watch-0", "watch-1"):
        desk.take(messages(make_update(device, update_id=id_of(device), round=2), device, update_id=id_of(device)))
    assert desk.store.rounds.history(TASK)[-1].late == 1


# Two workers that count late updates of one round at once.


@pytest.fixture
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[AggregatorStore]]:
    """Two workers' on one PostgreSQL, with round 1 open."""
    url = new_url(request, tmp_path, "postgresql")
    blobs = LocalBlobs(tmp_path / "blobs")
    opened = [AggregatorStore(Database(url, blobs=blobs), blobs) for _ in range(2)]
    with opened[0].database.transaction() as connection:
        opened[0].rounds.open(
            connection,
            TASK,
            1,
            opened_s=0.0,
            deadline_s=9.0,
            key=round_key("x25519"),
            sums_secret=SUMS_SECRET,
            version=0,
            model_digest=bytes(32),
            update_length=1,
            probability=1.0,
        )
    yield opened
    for store in opened:
        store.close()


def count_late_in_both(stores: list[AggregatorStore], *, alone: bool, looks: threading.Barrier) -> list[Any]:
    """Each looks whether the round is open, waits a little for the other to have looked too, and counts."""
    outcomes: list[Any] = []

    def run(store: AggregatorStore) -> None:
        try:
            with store.database.transaction() as connection:
                assert store.rounds.is_open(connection, TASK, 1, alone=alone)
                try:
                    looks.wait()
                except threading.BrokenBarrierError:
                    outcomes.append("alone")
                store.rounds.count_late(connection, {(TASK, 1): 1})
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN_S)
    return outcomes


def test_two_workers_that_count_late_updates_go_one_after_the_other(stores: list[AggregatorStore]) -> None:
    outcomes = count_late_in_both(stores, alone=True, looks=threading.Barrier(2, timeout=0.5))
    assert outcomes == ["alone", "alone"]
    assert stores[0].rounds.history(TASK)[0].late == 2


def test_a_deadlock_is_a_conflict_that_is_tried_again(stores: list[AggregatorStore]) -> None:
    """With the weaker lock, which two can have, each waits for the other."""
    (error,) = count_late_in_both(stores, alone=False, looks=threading.Barrier(2, timeout=WITHIN_S))
    assert isinstance(error, ConflictError), error
    assert stores[0].rounds.history(TASK)[0].late == 1


def test_a_commit_of_open_updates_takes_the_stronger_lock_exactly_where_it_counts_late_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bool] = []
    is_open = Rounds.is_open

    def remember(self: Rounds, *arguments: Any, alone: bool = False) -> bool:
        looked.append(alone)
        return is_open(self, *arguments, alone=alone)

    monkeypatch.setattr(Rounds, "is_open", remember)
    desk = a_desk(tmp_path)
    desk.take(messages(make_update()))
    late = messages(make_update("watch-1", update_id=id_of("late"), round=2), "watch-1", update_id=id_of("late"))
    good = messages(make_update("watch-2", update_id=id_of("good")), "watch-2", update_id=id_of("good"))
    desk.take([*late, *good])
    assert looked == [False, True]
