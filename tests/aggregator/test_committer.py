"""Committing updates in batches: whatever happens at whichever moment, what has a receipt counts exactly once.

The committer is tested in a whole worker on a virtual broker: what counts is what devices are told, and what the sums
on the disk hold.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import delete, insert, update

from aggregator.committer import Committer
from aggregator.errors import BlobError, ConflictError, DatabaseError
from aggregator.exact_sum import MOST_UPDATES
from aggregator.partial_sums import open_sum, sum_place
from aggregator.store import schema
from aggregator.store.updates import StoredPartial, Updates
from aggregator.task_file import Asynchronous, Rule
from fl_protocol.errors import RefusalReason
from fl_protocol.messages import ReceiptMsg
from fl_protocol.transport import Received
from tests.aggregator.desk import (
    SUMS_SECRET,
    D,
    Desk,
    Moments,
    PowerCutError,
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

ROBUST = task_config(rule=Rule(name="median"), minimum_cohort=3)
ASYNC = task_config(asynchronous=Asynchronous(maximum_staleness=2))


def numbers(device: str) -> np.ndarray:
    """What a device's update holds: values whose sum as floats would depend on its order."""
    seed = int.from_bytes(id_of(device)[:4], "big")
    return np.random.default_rng(seed).normal(size=D).astype(np.float32)


def update_of(device: str, *, update_id: bytes | None = None, **changes: Any) -> list[Received]:
    name = update_id if update_id is not None else id_of(device)
    envelope = make_update(device, update_id=name, body=numbers(device).astype("<f4").tobytes(), **changes)
    return messages(envelope, device, update_id=name, data_bytes=1200)


def expected(*devices: str) -> bytes:
    return sum_of(*(numbers(device) for device in devices)).tobytes()


# Power cuts.


def counted(desk: Desk) -> int:
    """Updates that count in round 3, checked: the sum is that of the updates that the database has, bit for bit."""
    ids = set(desk.accepted())
    devices = [name for name in ("watch-0", "watch-1", "watch-2", "watch-3") if id_of(name) in ids]
    assert len(devices) == len(ids)
    if desk.tasks[0].rule.name == "mean":
        total = desk.total()
        assert total.total.tobytes() == expected(*devices)
        assert total.count == len(devices)
    else:
        kept = desk.store.updates.kept(TASK, 3)
        assert {one.update_id for one in kept} == ids
        assert desk.store.updates.arrived(TASK, 3) == len(ids)
        for one in kept:
            sealed = desk.store.blobs.get(one.segment)[one.start : one.start + one.length]
            assert sealed in update_bytes(one.device)
    return len(ids)


def update_bytes(device: str) -> bytes:
    """The chunks' data of a device's update, which `update_of` made once."""
    return _WHOLES[device]


_UPDATES = {name: update_of(name) for name in ("watch-0", "watch-1", "watch-2", "watch-3")}
_WHOLES = {
    name: make_update(name, update_id=id_of(name), body=numbers(name).astype("<f4").tobytes()) for name in _UPDATES
}


def check_a_power_cut_at_every_moment(folder: Path, **settings: Any) -> None:
    """Four devices: one counts already, three are in the batch that is cut; then the worker starts again."""
    moments = Moments()
    cut = -1
    outcomes = set()
    while True:
        cut += 1
        desk = a_desk(folder / str(cut), **settings)
        updates = {name: messages(_WHOLES[name], name, update_id=id_of(name), data_bytes=1200) for name in _WHOLES}
        assert desk.take(updates["watch-3"]) == 1
        assert len(desk.receipts()) == 1
        moments = Moments(cut)
        with moments.of(desk):
            try:
                # The test's own messages are no moments of the worker's.
                watch, desk.broker.watch = desk.broker.watch, lambda _topic: None
                for name in ("watch-0", "watch-1", "watch-2"):
                    for message in updates[name]:
                        desk.broker.publish(message.topic, message.payload, retain=False)
                desk.broker.watch = watch
                desk.settle()
                whole = True
            except PowerCutError:
                whole = False
        desk.kill()
        receipted = {one.device for one in desk.receipts()} | {"watch-3"}
        before = counted(desk)
        assert before in (1, 4), f"half of a batch was committed at moment {cut}"
        assert {id_of(name) for name in receipted} <= set(desk.accepted()), f"a receipt that is not true at {cut}"
        outcomes.add((before, len(receipted)))
        desk.start()
        # Devices without a receipt send the same bytes again.
        for name in set(updates) - receipted - {one.device for one in desk.receipts()}:
            desk.clock.time_s += 2.0
            desk.take(updates[name])
        assert counted(desk) == 4
        again = reasons(desk.said())
        assert set(again) <= {None}, again
        desk.kill()
        if whole:
            break
    # The cuts were where they should be: before the commit, between commit and receipts, between receipts.
    assert outcomes >= {(1, 1), (4, 1), (4, 2), (4, 3), (4, 4)}
    assert moments.seen.count("acknowledge") == sum(len(updates[name]) for name in ("watch-0", "watch-1", "watch-2"))
    assert {"before put", "after put", "INSERT", "COMMIT"} <= set(moments.seen)


def test_a_power_cut_at_any_moment_of_a_commit_loses_no_receipted_update_and_counts_none_twice(tmp_path: Path) -> None:
    check_a_power_cut_at_every_moment(tmp_path)


def test_nor_does_it_where_single_updates_are_kept(tmp_path: Path) -> None:
    check_a_power_cut_at_every_moment(tmp_path, tasks=(ROBUST,))


class TwoTransactions(Committer):
    """Broken: the rows of updates become durable before the sum that they are in."""

    def _make_durable(self, batch: Any, tasks: Any) -> list[str]:
        updates = self._store.updates
        add, later = updates.add, []
        updates.add = lambda _connection, rows: later.append(rows)  # type: ignore[method-assign]
        with self._store.database.transaction() as connection:
            for rows in [batch.rows]:
                if rows:
                    add(connection, rows)
        try:
            return super()._make_durable(batch, tasks)
        finally:
            del updates.add


def test_a_committer_of_two_transactions_is_caught(tmp_path: Path) -> None:
    with built_with(Committer=TwoTransactions), pytest.raises(AssertionError):
        check_a_power_cut_at_every_moment(tmp_path)


# When something fails that is no power cut.


def check_a_failure_at_every_moment(folder: Path) -> None:
    """The database or the disk fails at any moment: nothing is told that is not so, and all is made good after it."""
    cut = -1
    while True:
        cut += 1
        desk = a_desk(folder / str(cut))
        moments = Moments()

        def fail(what: str, moments: Moments = moments, cut: int = cut) -> None:
            if len(moments.seen) == cut:
                moments(what)
                raise (BlobError if "put" in what or "delete" in what else DatabaseError)("it failed")
            moments(what)

        with moments.of(desk):
            desk.blobs.watch = fail
            for name in ("watch-0", "watch-1"):
                for message in messages(_WHOLES[name], name, update_id=id_of(name), data_bytes=1200):
                    desk.broker.publish(message.topic, message.payload, retain=False)
            moments.seen.clear()
            desk.settle()
            desk.let_pass(2.0)
        assert counted(desk) == 2
        assert sorted(one.device for one in desk.receipts()) == ["watch-0", "watch-1"]
        if len(moments.seen) < cut:
            break


def test_a_failing_disk_at_any_moment_costs_no_update(tmp_path: Path) -> None:
    check_a_failure_at_every_moment(tmp_path)


# One batch that holds the same thing twice.


def test_the_same_update_twice_in_a_batch_counts_once_and_gets_its_receipt(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    assert desk.take([*sent_by("watch-0"), *sent_by("watch-0")]) == 1
    assert {one.update_id for one in desk.receipts()} == {id_of("watch-0")}
    assert desk.total().total.tobytes() == expected("watch-0")
    assert len(desk.journal.named("update_accepted")) == 1


def sent_by(device: str) -> list[Received]:
    return messages(_WHOLES[device], device, update_id=id_of(device), data_bytes=1200)


def test_an_id_twice_in_a_batch_with_other_content_is_a_replay(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    other = make_update("watch-0", update_id=id_of("watch-0"))
    mine = messages(other, "watch-0", update_id=id_of("watch-0"), data_bytes=1200)
    assert desk.take([*sent_by("watch-0"), *mine]) == 1
    assert reasons(desk.said()) == [None, RefusalReason.REPLAYED]
    assert desk.total().total.tobytes() == expected("watch-0")


def test_an_id_of_two_devices_in_a_batch_counts_once(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    assert desk.take([*sent_by("watch-0"), *update_of("watch-1", update_id=id_of("watch-0"))]) == 1
    answers = desk.said()
    assert [(one.device, isinstance(one, ReceiptMsg)) for one in answers] == [("watch-0", True), ("watch-1", False)]
    assert desk.total().total.tobytes() == expected("watch-0")


def test_a_device_twice_in_a_batch_counts_once(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    assert desk.take([*sent_by("watch-0"), *update_of("watch-0", update_id=id_of("another"))]) == 1
    assert reasons(desk.said()) == [None, RefusalReason.SECOND_UPDATE]
    assert desk.total().total.tobytes() == expected("watch-0")


def test_a_refused_update_does_not_shut_its_device_out_of_the_round(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    bad = make_update("watch-0", update_id=id_of("bad"), num_parameters=9, body=bytes(36))
    assert desk.take([*messages(bad, "watch-0", update_id=id_of("bad")), *sent_by("watch-0")]) == 1
    assert sorted(map(str, reasons(desk.said()))) == sorted(map(str, [RefusalReason.WRONG_LENGTH, None]))


# Two workers.


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_url(request, tmp_path, str(request.param))


def two_workers(folder: Path, url: str | None) -> Desk:
    """Both are given everything, whatever their leases say."""
    desk = a_desk(folder, url=url)
    desk.start("second", settles=False)
    for name in ("worker", "second"):
        desk.transport(name).subscribe("fl/v1/clinic/up/+/+/+/+")
    desk.settle()
    return desk


def interrupt(committer: Any, moment: str, action: Callable[[], None]) -> None:
    """Have something happen in the middle of a committer's next commit, before it does `moment`."""
    whole, once = getattr(committer, moment), [action]

    def before(*arguments: Any, **fields: Any) -> Any:
        if once:
            once.pop()()
        return whole(*arguments, **fields)

    setattr(committer, moment, before)


@pytest.mark.parametrize("moment", ["_verified", "_fresh", "_add", "_make_durable"])
def test_two_workers_given_the_same_updates_count_them_once(tmp_path: Path, url: str, moment: str) -> None:
    desk = two_workers(tmp_path, url)
    first, second = desk.services["worker"], desk.services["second"]
    # The second one commits in the middle of the first one's commit.
    interrupt(first.worker._committer, moment, lambda: _steps(second))
    assert desk.take([*sent_by("watch-0"), *sent_by("watch-1")]) == 2
    receipts = desk.receipts()
    assert {one.device for one in receipts} == {"watch-0", "watch-1"}
    assert len({(one.device, one.accepted_s, one.sealed_digest) for one in receipts}) == 2
    assert desk.total().total.tobytes() == expected("watch-0", "watch-1")
    assert len(desk.store.updates.partials(TASK, 3)) == 1
    # And each goes on from its own sum.
    desk.transport("second").unsubscribe("fl/v1/clinic/up/+/+/+/+")
    assert desk.take(sent_by("watch-2")) == 1
    assert desk.total().total.tobytes() == expected("watch-0", "watch-1", "watch-2")
    assert {one.worker for one in desk.store.updates.partials(TASK, 3)} == {"worker", "second"}
    desk.kill("worker")
    desk.kill("second")
    desk.store.close()


def _steps(service: Any) -> None:
    for _ in range(3):
        service.step()


def test_a_device_that_sends_two_updates_to_two_workers_counts_once(tmp_path: Path, url: str) -> None:
    desk = two_workers(tmp_path, url)
    first, second = desk.services["worker"], desk.services["second"]
    other = update_of("watch-0", update_id=id_of("another"))
    second.worker._intake.take(other)
    interrupt(first.worker._committer, "_make_durable", lambda: _steps(second))
    first.worker._intake.take(sent_by("watch-0"))
    desk.settle()
    assert len(desk.accepted()) == 1
    assert sorted(map(str, reasons(desk.said()))) == sorted(map(str, [None, RefusalReason.SECOND_UPDATE]))
    assert desk.total().count == 1
    desk.kill("worker")
    desk.kill("second")
    desk.store.close()


def check_two_processes_of_one_name_lose_nothing(folder: Path) -> None:
    """A process that was thought dead goes on beside its successor: neither replaces what it does not contain."""
    desk = a_desk(folder)
    desk.take(sent_by("watch-0"))
    old = desk.services.pop("worker")
    desk.transport_of(old).drop("out of reach")
    desk.start()
    assert desk.take(sent_by("watch-1")) == 1
    old.worker._intake.take(sent_by("watch-2"))  # which it had received before
    _steps(old)
    desk.clock.time_s += 2.0
    assert desk.take(sent_by("watch-3")) == 1
    assert counted(desk) == 4
    old.store.close()


def test_two_processes_of_one_name_lose_nothing(tmp_path: Path) -> None:
    check_two_processes_of_one_name_lose_nothing(tmp_path)


def test_a_store_that_replaces_any_sum_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace_any(self: Updates, connection: Any, task: str, *, counted_in: int, partial: Any, **_: Any) -> None:
        table = schema.partials
        key = {"task": task, "counted_in": counted_in, "round": partial.round, "worker": partial.worker}
        connection.execute(delete(table).where(*(table.c[name] == value for name, value in key.items())))
        connection.execute(insert(table).values(**key, blob=partial.blob, count=partial.num_updates))

    monkeypatch.setattr(Updates, "put_partial", replace_any)
    with pytest.raises((AssertionError, BlobError)):
        check_two_processes_of_one_name_lose_nothing(tmp_path)


# A round that closes.


@pytest.mark.parametrize("moment", ["_verified", "_fresh", "_add", "_make_durable"])
def test_a_round_that_closes_in_the_middle_of_a_commit_takes_nothing_any_more(
    tmp_path: Path, url: str, moment: str
) -> None:
    desk = a_desk(tmp_path, url=url)
    interrupt(desk.services["worker"].worker._committer, moment, desk.close_round)
    assert desk.take(sent_by("watch-0")) == 0
    assert desk.nack().reason is RefusalReason.ROUND_CLOSED
    assert desk.accepted() == []
    desk.kill()
    desk.store.close()


def test_a_committer_that_does_not_look_whether_its_round_is_open_is_caught(tmp_path: Path) -> None:
    loose = broken_committer(("if not is_open and key in counting:", "if False:"))
    desk_folder = tmp_path
    with built_with(Committer=loose):
        desk = a_desk(desk_folder)
    interrupt(desk.services["worker"].worker._committer, "_make_durable", desk.close_round)
    desk.take(sent_by("watch-0"))
    assert len(desk.accepted()) == 1  # after the round was closed: what the look prevents


def mark_closing(desk: Desk) -> None:
    with desk.store.database.transaction() as connection:
        connection.execute(update(schema.rounds).values(outcome="closing"))


def test_a_round_that_is_being_combined_takes_nothing(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    mark_closing(desk)
    assert desk.take(sent_by("watch-0")) == 0
    assert desk.said() == []  # it may be opened again
    desk.close_round()
    assert desk.take(sent_by("watch-0")) == 0
    assert desk.nack().reason is RefusalReason.ROUND_CLOSED


def test_after_the_next_round_opened_a_worker_begins_a_new_sum(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    desk.take(sent_by("watch-0"))
    desk.open_round(4)
    assert desk.take(update_of("watch-1", round=4)) == 1
    assert desk.total(4).total.tobytes() == expected("watch-1")
    desk.clock.time_s += 10.0
    desk.settle()
    assert {key[:2] for key in desk.services["worker"].worker._committer._sums._known} == {(TASK, 4)}


# Late updates.


def test_a_stale_update_counts_in_the_open_round_in_a_sum_of_its_own(tmp_path: Path) -> None:
    keys = {number: round_key("x25519", number) for number in (3, 4, 5, 6)}
    desk = a_desk(tmp_path, tasks=(ASYNC,))
    desk.close_round()
    for number in (4, 5, 6):
        desk.open_round(number, key=keys[number])
    sends = {"watch-0": 6, "watch-1": 4, "watch-2": 5, "watch-3": 4}
    for device, number in sends.items():
        envelope = update_of(device, round=number, recipient=keys[number].recipient())
        assert desk.take(envelope) == 1, device
    assert len(desk.receipts()) == 4
    partials = desk.store.updates.partials(TASK, 6)
    assert [(one.round, one.num_updates) for one in partials] == [(4, 2), (5, 1), (6, 1)]
    for one, devices in zip(partials, (("watch-1", "watch-3"), ("watch-2",), ("watch-0",)), strict=True):
        place = sum_place((TASK, 6, one.round), one.worker)
        opened = open_sum(desk.store.blobs.get(one.blob), SUMS_SECRET, place=place, count=one.num_updates)
        assert opened.total.tobytes() == expected(*devices)
    # One round too late: its key is gone.
    late = update_of("watch-4", round=3)
    assert desk.take(late) == 0
    assert desk.nack().reason is RefusalReason.ROUND_CLOSED


def test_an_update_that_came_too_late_is_counted_as_that(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    desk.open_round(4)
    assert desk.take(sent_by("watch-0")) == 0
    assert desk.nack().reason is RefusalReason.ROUND_CLOSED
    assert [(one.number, one.late) for one in desk.store.rounds.history(TASK)] == [(3, 0), (4, 1)]


# What is on the disk.


def test_single_updates_are_on_the_disk_only_as_they_came(tmp_path: Path) -> None:
    """Where a rule needs single updates, their sealed bytes are kept: nothing that can be read without the key."""
    desk = a_desk(tmp_path, tasks=(ROBUST,))
    marked = np.full(D, 0.0123, "<f4")
    for name in ("watch-0", "watch-1"):
        envelope = make_update(name, update_id=id_of(name), body=marked.tobytes())
        assert desk.take(messages(envelope, name, update_id=id_of(name))) == 1
    assert desk.blobs.kinds == ["segment", "segment"]
    for path, content in desk.everything_on_disk().items():
        assert marked[:2].tobytes() not in content, path


def test_a_sum_is_on_the_disk_only_sealed(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    assert desk.take(sent_by("watch-0")) == 1
    plain = expected("watch-0")
    raw = numbers("watch-0").astype("<f4").tobytes()
    for path, content in desk.everything_on_disk().items():
        assert plain[:16] not in content, path
        assert raw[:16] not in content, path


def test_sums_that_were_replaced_are_removed(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    for name in ("watch-0", "watch-1", "watch-2"):
        assert desk.take(sent_by(name)) == 1
    (partial,) = desk.store.updates.partials(TASK, 3)
    sums = [blob.name for blob in desk.blobs.stored() if blob.name.startswith("sum/")]
    assert sums == [partial.blob]


def test_a_swapped_sum_is_noticed(tmp_path: Path) -> None:
    """Whoever can write to the blobs cannot have one round's sum count in another, nor another worker's."""
    desk = a_desk(tmp_path)
    desk.take(sent_by("watch-0"))
    desk.start("second")
    desk.transport("second").subscribe("fl/v1/clinic/up/+/+/+/+")
    desk.services["worker"].worker._serve(())
    desk.take(sent_by("watch-1"))
    one, other = desk.store.updates.partials(TASK, 3)
    folder = tmp_path / "blobs"
    first, second = (folder / one.blob).read_bytes(), (folder / other.blob).read_bytes()
    (folder / one.blob).write_bytes(second)
    (folder / other.blob).write_bytes(first)
    with pytest.raises(BlobError, match="damaged"):
        desk.total()


# Bounds.


def test_a_conflict_that_does_not_end_leaves_the_batch_for_later(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    committer = desk.services["worker"].worker._committer
    whole = committer._make_durable

    def conflict(*_arguments: Any) -> list[str]:
        raise ConflictError("another process was quicker")

    committer._make_durable = conflict  # type: ignore[method-assign]
    assert desk.take(sent_by("watch-0")) == 0
    assert desk.said() == []
    assert len(desk.journal.named("degraded")) == 1
    committer._make_durable = whole  # type: ignore[method-assign]
    desk.let_pass(2.0)
    assert len(desk.receipts()) == 1
    assert desk.total().total.tobytes() == expected("watch-0")


def test_a_round_that_has_all_the_updates_a_sum_can_hold_refuses_more(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    desk.take(sent_by("watch-0"))
    desk.said()
    (held,) = desk.services["worker"].worker._committer._sums._known.values()
    held.sum.count = MOST_UPDATES
    assert desk.take(sent_by("watch-1")) == 0
    answer = desk.nack()
    assert (answer.reason, answer.device) == (RefusalReason.ROUND_CLOSED, "watch-1")
    assert desk.journal.named("degraded") == []


def test_two_tasks_in_one_batch_are_added_up_apart(tmp_path: Path) -> None:
    desk = a_desk(tmp_path, tasks=(task_config(), task_config(name="other")))
    assert desk.take([*sent_by("watch-0"), *update_of("watch-1"), *update_of("watch-2", task="other")]) == 2
    assert len(desk.receipts()) == 3
    assert desk.total().total.tobytes() == expected("watch-0", "watch-1")
    assert desk.total(task="other").total.tobytes() == expected("watch-2")
    # The same device in the other task: one update in each.
    desk.take(update_of("watch-0", task="other", update_id=id_of("in the other task")))
    assert len(desk.accepted("other")) == 2


def test_a_partial_is_what_the_coordinator_reads(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    desk.take([*sent_by("watch-0"), *sent_by("watch-1")])
    (partial,) = desk.store.updates.partials(TASK, 3)
    assert partial == StoredPartial(3, "worker", partial.blob, 2)
    assert desk.store.updates.arrived(TASK, 3) == 2
