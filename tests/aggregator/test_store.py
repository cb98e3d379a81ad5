"""The database: a crash at any statement leaves the state before, and a closed round leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import event

from aggregator.combine import GlobalModel
from aggregator.errors import DatabaseError
from aggregator.rounds import Phase, RoundState
from aggregator.store import AggregatorStore, little_endian
from fl_protocol.errors import RefusalReason
from fl_protocol.messages import UpdateHeaderMsg
from fl_protocol.sealing import RoundKey
from tests.aggregator.desk import DIGEST, GRAPH_DIGEST, PARAMS, ROUND_KEY, D, Desk, PowerCutError
from tests.fl_protocol.examples import TASK, TENANT


@contextmanager
def power_cut(store: AggregatorStore, statement: int) -> Iterator[list[str]]:
    """Lose power at a statement (0-based), or at the commit after the last; yields what was executed."""
    executed: list[str] = []

    def before(_c: object, _cursor: object, text: str, *_rest: object) -> None:
        if len(executed) == statement:
            raise PowerCutError
        executed.append(text)

    def at_commit(_connection: object) -> None:
        if len(executed) == statement:
            raise PowerCutError

    event.listen(store._engine, "before_cursor_execute", before)
    event.listen(store._engine, "commit", at_commit)
    try:
        yield executed
    finally:
        event.remove(store._engine, "before_cursor_execute", before)
        event.remove(store._engine, "commit", at_commit)


def snapshot(store: AggregatorStore) -> object:
    """Everything in the database."""
    with store.transaction() as connection:
        names = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        return {
            name: sorted(map(repr, connection.exec_driver_sql(f"SELECT * FROM {name}")))  # noqa: S608 - our own names
            for (name,) in names.fetchall()
        }


def commit_round(desk: Desk) -> None:
    with desk.store.transaction() as connection:
        total = sum(desk.store.updates(connection, 3))
        desk.store.add_model(connection, 1, GlobalModel(np.asarray(total, np.float32), PARAMS))
        desk.store.close_round(connection, number=3, outcome="committed", reason="", now_s=5.0)
        desk.store.open_round(connection, number=4, opened_s=5.0, deadline_s=9.0, key=ROUND_KEY)
        desk.store.save_state(connection, RoundState(Phase.OPEN, 4, 1))


def accept(desk: Desk) -> None:
    header = UpdateHeaderMsg(
        tenant=TENANT,
        task=TASK,
        round=3,
        model_digest=DIGEST,
        device="watch-3",
        update_id=b"\x33" * 16,
        kem="x25519",
        sealed_digest=bytes(32),
    )
    desk.store.add_update(header, PARAMS, bytes_up=1, now_s=1.0)


def count_refusal(desk: Desk) -> None:
    desk.store.count_refusal(RefusalReason.MALFORMED)


def replace_device(desk: Desk) -> None:
    desk.store.add_device("watch-0", b"\x01" * 32, 1.0)


@pytest.mark.parametrize("change", [commit_round, accept, count_refusal, replace_device])
def test_a_crash_at_any_statement_leaves_the_state_before(tmp_path: Path, change: Callable[[Desk], None]) -> None:
    desk = Desk(tmp_path)
    desk.send_good("watch-1")
    before = snapshot(desk.store)
    for statement in range(30):
        with power_cut(desk.store, statement) as executed:
            try:
                change(desk)
            except PowerCutError:
                cut = True
            else:
                cut = False
        store = AggregatorStore(f"sqlite:///{tmp_path / 'aggregator.db'}", TASK)
        after = snapshot(store)
        store.close()
        if not cut:
            assert after != before
            assert len(executed) <= statement
            return
        assert after == before
    pytest.fail("the change never ended")


def database_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_closed_round_leaves_neither_updates_nor_its_key_in_any_file(tmp_path: Path) -> None:
    secret = b"ROUND-SECRET-of-32-bytes-exactly"
    desk = Desk(tmp_path, key=RoundKey("x25519", secret))
    number = float(np.frombuffer(b"MARK", "<f4")[0])
    pattern = np.full(4, number, "<f4").tobytes()
    for device in ("watch-1", "watch-2", "watch-3"):
        assert desk.send_good(device, number=number) == 1
    raw = b"".join(database_bytes(tmp_path).values())
    assert raw.count(pattern) >= 3
    assert secret in raw
    with desk.store.transaction() as connection:
        desk.store.close_round(connection, number=3, outcome="committed", reason="", now_s=5.0)
    assert desk.store.empty_log()
    for name, content in database_bytes(tmp_path).items():
        assert pattern not in content, name
        assert secret not in content, name
    # What makes a duplicate recognisable is kept.
    assert desk.store.has_update_from("watch-1", 3)


def test_the_log_is_emptied_once_nobody_reads(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.send_good("watch-1")
    reader = AggregatorStore(f"sqlite:///{tmp_path / 'aggregator.db'}", TASK)
    with reader.transaction() as connection:
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql("SELECT count(*) FROM updates").fetchall()
        desk.send_good("watch-2")
        assert not desk.store.empty_log()
    assert desk.store.empty_log()
    assert (tmp_path / "aggregator.db-wal").stat().st_size == 0
    desk.send_good("watch-3")
    assert len(desk.stored()) == 3


def test_the_database_itself_refuses_a_second_update(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.send_good("watch-1")
    with pytest.raises(DatabaseError, match="UNIQUE"), desk.store.transaction() as connection:
        connection.exec_driver_sql(
            "INSERT INTO updates SELECT task, x'99', round, device, sealed_digest, accepted_s, bytes_up, change "
            "FROM updates"
        )
    assert len(desk.stored()) == 1


def test_the_state_is_what_was_committed(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.send_good("watch-1")
    desk.send_good("watch-2")
    again = AggregatorStore(f"sqlite:///{tmp_path / 'aggregator.db'}", TASK)
    assert again.round_state() == RoundState(Phase.OPEN, 3, 0, 2, 0.0, 1e9)
    assert again.round_key(3) == ROUND_KEY
    assert again.round_key(99) is None
    again.create_task(GRAPH_DIGEST, PARAMS)
    with pytest.raises(DatabaseError, match="another model graph"):
        again.create_task(b"\x08" * 32, PARAMS)


def test_tasks_share_a_database_without_mixing(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.send_good("watch-1")
    other = AggregatorStore(f"sqlite:///{tmp_path / 'aggregator.db'}", "other")
    with pytest.raises(DatabaseError, match="covey-aggregator init"):
        other.round_state()
    other.create_task(GRAPH_DIGEST, PARAMS + 1)
    assert other.round_state() == RoundState()
    assert not other.has_update_from("watch-1", 3)
    assert other.model(0).digest != desk.store.model(0).digest
    with other.transaction() as connection:
        assert list(other.updates(connection, 3)) == []
    other.count_refusal(RefusalReason.OVERSIZED)
    assert desk.store.refusals() == {}


def test_parameters_survive_bit_for_bit(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    params = np.random.default_rng(0).normal(size=D).astype(np.float32)
    with desk.store.transaction() as connection:
        digest = desk.store.add_model(connection, 1, GlobalModel(params, -params))
        assert desk.store.digest(connection, 1) == digest
    stored = desk.store.model(1)
    assert little_endian(stored.model.params) == little_endian(params)
    assert little_endian(stored.model.velocity) == little_endian(-params)
    assert stored.digest == digest


@pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all.db", "nonsense", "sqlite:////proc/version"])
def test_a_database_that_cannot_be_opened_is_one_sentence(url: str) -> None:
    with pytest.raises(DatabaseError, match="cannot be opened"):
        AggregatorStore(url, TASK)
