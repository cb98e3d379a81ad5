"""The database: a crash at any statement leaves the state before, and a closed round leaves no trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import insert, select

from aggregator.errors import ConflictError, DatabaseError
from aggregator.rounds import Phase, RoundState
from aggregator.store import schema
from aggregator.store.models import NewModel, little_endian
from aggregator.store.updates import NewUpdate, StoredPartial
from fl_protocol.errors import RefusalReason
from fl_protocol.sealing import RoundKey
from tests.aggregator.desk import (
    DIGEST,
    GRAPH_DIGEST,
    PARAMS,
    ROUND_KEY,
    D,
    Desk,
    Moments,
    PowerCutError,
    a_desk,
    task_config,
)
from tests.aggregator.tagging import tag
from tests.fl_protocol.examples import TASK


def snapshot(desk: Desk) -> object:
    """Everything in the database."""
    with desk.open_store().database.reading() as connection:
        return {
            table.name: sorted(map(repr, connection.execute(select(table)).all()))
            for table in schema.metadata.sorted_tables
        }


def new_update(device: str = "watch-3", **changes: object) -> NewUpdate:
    row = NewUpdate(TASK, b"\x33" * 16, 3, 3, device, bytes(32), 1.0, 7)
    return row._replace(**changes)  # type: ignore[arg-type]


def accept(desk: Desk) -> None:
    store = desk.services["worker"].store
    with store.database.transaction() as connection:
        assert store.rounds.is_open(connection, TASK, 3)
        store.updates.add(connection, [new_update()])
        partial = StoredPartial(3, "another", "sum/" + "0" * 32, 1)
        store.updates.put_partial(connection, TASK, counted_in=3, partial=partial, num_before=0)
        store.count_refusals(connection, _counted(RefusalReason.MALFORMED))


def _counted(reason: RefusalReason) -> Counter[tuple[str, RefusalReason]]:
    return Counter({("", reason): 2})


def commit_round(desk: Desk) -> None:
    store = desk.services["worker"].store
    before = store.tasks.get(TASK).state
    model = store.models.prepare(NewModel(1, PARAMS + 1, "round", parent=0, round=3))
    with store.database.transaction() as connection:
        store.models.add(connection, TASK, model, now_s=5.0)
        store.rounds.close(connection, TASK, 3, outcome="committed", reason="", metrics={}, now_s=5.0)
        store.updates.drop_partials(connection, TASK, 3)
        store.rounds.erase_keys(connection, TASK, up_to=3)
        store.tasks.save(connection, TASK, RoundState(Phase.PAUSED, 3, 1, version=1), before=before, probability=1.0)


def replace_device(desk: Desk) -> None:
    desk.services["worker"].store.devices.add("watch-0", b"\x01" * 32, 1.0)


def take_leases(desk: Desk) -> None:
    desk.services["worker"].store.leases.take({"shard-01", "coordinator"}, "another", until_s=9e9, now_s=8e9)


@pytest.mark.parametrize("change", [commit_round, accept, replace_device, take_leases])
def test_a_crash_at_any_statement_leaves_the_state_before(tmp_path: Path, change: Callable[[Desk], None]) -> None:
    desk = a_desk(tmp_path)
    desk.send_good("watch-1")
    before = snapshot(desk)
    for statement in range(30):
        moments = Moments(statement)
        with moments.of(desk):
            try:
                change(desk)
                cut = False
            except PowerCutError:
                cut = True
        after = snapshot(desk)
        if not cut:
            assert after != before
            return
        assert after == before
    pytest.fail("the change never ended")


# Erasure.


def test_a_closed_round_leaves_neither_updates_nor_its_key_in_any_file(tmp_path: Path) -> None:
    secret = b"ROUND-SECRET-of-32-bytes-exactly"
    key = RoundKey("x25519", secret)
    desk = Desk(tmp_path)
    desk.open_round(key=key)
    desk.start()
    for device in ("watch-1", "watch-2", "watch-3"):
        assert desk.send_good(device, number=0.0123, recipient=key.recipient()) == 1
    plain, total = np.full(4, 0.0123, "<f4").tobytes(), desk.total().total[:2].tobytes()
    files = desk.everything_on_disk()
    assert any(secret in content for content in files.values())
    for path, content in files.items():  # nor is anything readable before the round is closed
        assert plain not in content, path
        assert total not in content, path
    desk.close_round()
    assert desk.store.database.empty_log()
    for path, content in desk.everything_on_disk().items():
        assert secret not in content, path
        assert plain not in content, path
    # What makes a duplicate recognisable is kept.
    assert len(desk.accepted()) == 3


def test_the_log_is_emptied_once_nobody_reads(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    desk.send_good("watch-1")
    reader = desk.open_store().database
    with reader.reading() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM updates").fetchall()
        desk.send_good("watch-2")
        assert not desk.store.database.empty_log()
    assert desk.store.database.empty_log()
    assert (tmp_path / "aggregator.db-wal").stat().st_size == 0
    desk.send_good("watch-3")
    assert len(desk.accepted()) == 3


# What the tables themselves refuse.


@pytest.mark.parametrize(
    "row",
    [new_update("watch-1", update_id=b"\x99" * 16), new_update("watch-4", update_id=b"\x10" * 16)],
    ids=["a second one of a device", "one id twice"],
)
def test_the_database_itself_refuses_a_second_update(tmp_path: Path, row: NewUpdate) -> None:
    desk = a_desk(tmp_path)
    store = desk.store
    with store.database.transaction() as connection:
        store.updates.add(connection, [new_update("watch-1", update_id=b"\x10" * 16)])
    with pytest.raises(ConflictError, match="another process was quicker"), store.database.transaction() as connection:
        store.updates.add(connection, [row])
    assert desk.accepted() == [b"\x10" * 16]


def test_a_sum_is_replaced_only_by_one_that_goes_on_from_it(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    updates = desk.store.updates

    def put(blob: str, count: int, *, before: int) -> None:
        with desk.store.database.transaction() as connection:
            updates.put_partial(
                connection, TASK, counted_in=3, partial=StoredPartial(3, "w", blob, count), num_before=before
            )

    put("one", 1, before=0)
    put("two", 3, before=1)
    for blob, count, before in (("three", 2, 0), ("four", 4, 1), ("five", 9, 4)):
        with pytest.raises(ConflictError):
            put(blob, count, before=before)
    assert updates.partials(TASK, 3) == [StoredPartial(3, "w", "two", 3)]


# What is read back.


def test_the_state_is_what_was_committed(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    desk.send_good("watch-1")
    desk.send_good("watch-2")
    again = desk.open_store()
    state = again.tasks.get(TASK).state
    assert state == RoundState(Phase.OPEN, 3, 0, arrived=2, opened_s=desk.clock.time_s, deadline_s=1e9)
    (live,) = again.rounds.live()
    assert (live.number, live.key, live.model_digest, live.update_length) == (3, ROUND_KEY, DIGEST, D)


def test_a_task_that_moved_on_is_not_overwritten(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    before = desk.store.tasks.get(TASK).state
    desk.open_round(4)
    with pytest.raises(ConflictError, match="another coordinator"), desk.store.database.transaction() as connection:
        desk.store.tasks.save(connection, TASK, RoundState(Phase.PAUSED, 3), before=before, probability=1.0)
    assert desk.store.tasks.get(TASK).state.number == 4


def test_tasks_share_a_database_without_mixing(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    desk.send_good("watch-1")
    with pytest.raises(DatabaseError, match="covey-aggregator task list"):
        desk.store.tasks.get("other")
    desk.create(task_config(name="other"), params=PARAMS + 1)
    assert desk.store.tasks.get("other").state == RoundState()
    assert desk.store.tasks.get("other").graph_digest == GRAPH_DIGEST
    assert desk.accepted("other") == []
    assert desk.store.updates.partials("other", 3) == []
    assert desk.store.models.record("other", 0).digest != desk.store.models.record(TASK, 0).digest
    assert desk.store.rounds.history("other") == []
    with pytest.raises(DatabaseError, match="there is a task other already"):
        desk.create(task_config(name="other"))


def test_parameters_survive_bit_for_bit(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    models = desk.store.models
    params = np.random.default_rng(0).normal(size=D).astype(np.float32)
    prepared = models.prepare(
        NewModel(1, params, "round", parent=0, round=3, optimiser=b"memory", control=-params, population=9, delta=b"d")
    )
    with desk.store.database.transaction() as connection:
        models.add(connection, TASK, prepared, now_s=1.0)
        assert models.digest(connection, TASK, 1) == prepared.digest
    record = models.record(TASK, 1)
    assert little_endian(models.params(record)) == little_endian(params)
    assert little_endian(models.control(record, D)) == little_endian(-params)
    assert (models.optimiser(record), models.delta(record), record.population) == (b"memory", b"d", 9)
    assert models.newest(TASK) == 1


def test_damaged_parameters_are_never_taken_for_a_model(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    record = desk.store.models.record(TASK, 0)
    path = tmp_path / "blobs" / str(record.params)
    path.write_bytes(path.read_bytes()[:-4] + b"\x01\x00\x00\x00")
    with pytest.raises(DatabaseError, match="damaged"):
        desk.store.models.params(record)


def test_a_tag_is_on_one_version_at_most(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    models = desk.store.models
    with desk.store.database.transaction() as connection:
        models.add(connection, TASK, models.prepare(NewModel(1, PARAMS, "round", parent=0)), now_s=1.0)
    for name, version in (("released", 0), ("candidate", 1), ("released", 1)):
        tag(desk.store, TASK, name, version)
    assert [one.tags for one in models.records(TASK)] == [(), ("candidate", "released")]
    assert models.tagged(TASK, "released") == 1
    with pytest.raises(DatabaseError, match="has no model version 9"):
        models.record(TASK, 9)
    with pytest.raises(DatabaseError, match="no model of task watch has the tag gone"):
        models.tagged(TASK, "gone")


def test_what_was_deleted_is_overwritten_in_the_file(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    with desk.store.database.transaction() as connection:
        connection.execute(insert(schema.devices).values(device="marked", public_key=b"MARK" * 8, added_s=0.0))
    desk.store.database.empty_log()
    assert b"MARKMARK" in (tmp_path / "aggregator.db").read_bytes()
    with desk.store.database.transaction() as connection:
        connection.execute(schema.devices.delete().where(schema.devices.c.device == "marked"))
    desk.store.database.empty_log()
    assert b"MARKMARK" not in (tmp_path / "aggregator.db").read_bytes()
