"""An ingest worker: its shards, its bounds under load, and a database or broker that goes away and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator.errors import DatabaseError
from aggregator.service import MOST_EVENTS
from aggregator.shards import ALL_SHARDS, LEASE_S
from aggregator.store.leases import INGEST, STOPPED
from fl_protocol.limits import NUM_SHARDS
from fl_protocol.topics import shard_of, upload_topic
from tests.aggregator.desk import DEVICES, Desk, a_desk, id_of, make_update, messages, sum_of
from tests.fl_protocol.examples import TENANT


def shards_of(desk: Desk, name: str) -> set[str]:
    """The shards that a worker has asked the broker for."""
    prefix, suffix = f"fl/v1/{TENANT}/up/", "/+/+/+"
    filters = desk.transport(name)._session.filters
    return {f"shard-{one.removeprefix(prefix).removesuffix(suffix)}" for one in filters}


def leased(desk: Desk, name: str) -> set[str]:
    now_s = desk.clock.now_s()
    return {one.name for one in desk.store.leases.all() if one.worker == name and one.until_s > now_s}


def test_a_lone_worker_serves_everything_at_once(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    assert shards_of(desk, "worker") == set(ALL_SHARDS) == leased(desk, "worker")
    (said,) = desk.store.leases.workers()
    assert (said.worker, said.state, said.detail) == ("worker", INGEST, "")


def test_workers_share_the_shards_and_take_over_those_of_one_that_died(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    for name in ("second", "third"):
        desk.start(name)
    desk.let_pass(25.0)
    mine = {name: shards_of(desk, name) for name in ("worker", "second", "third")}
    assert sorted(len(shards) for shards in mine.values()) == [21, 21, 22]
    assert set().union(*mine.values()) == set(ALL_SHARDS)
    assert mine == {name: leased(desk, name) for name in mine}
    # Every device is served, by one of them.
    for name in DEVICES:
        assert desk.send_good(name) == 1
    assert len(desk.receipts()) == len(DEVICES)
    desk.kill("second")
    desk.let_pass(LEASE_S + 12.0)
    left = {name: shards_of(desk, name) for name in ("worker", "third")}
    assert sorted(len(shards) for shards in left.values()) == [32, 32]
    assert set().union(*left.values()) == set(ALL_SHARDS)
    assert desk.total().total.tobytes() == sum_of(*[1.0] * len(DEVICES)).tobytes()


def test_one_that_is_stopped_gives_its_shards_back_at_once(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    desk.start("second")
    desk.let_pass(25.0)
    desk.services.pop("second").stop()
    assert leased(desk, "second") == set()
    desk.let_pass(6.0)
    assert shards_of(desk, "worker") == set(ALL_SHARDS)
    assert {one.worker: one.state for one in desk.store.leases.workers()} == {"worker": INGEST, "second": STOPPED}


def test_a_session_that_the_broker_kept_is_served_as_the_leases_say(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    desk.kill()
    desk.start("second")
    desk.let_pass(LEASE_S + 6.0)
    assert len(leased(desk, "second")) == NUM_SHARDS
    desk.start("worker")  # its old session subscribes to everything
    desk.let_pass(12.0)
    assert shards_of(desk, "worker") == leased(desk, "worker")
    assert len(shards_of(desk, "worker")) == NUM_SHARDS // 2


def test_after_a_broker_restart_it_asks_again(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    desk.restart_broker()
    assert shards_of(desk, "worker") == set(ALL_SHARDS)
    assert desk.send_good() == 1


def test_while_the_broker_is_away_the_operator_is_told(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    desk.transport().drop("the broker is away")
    desk.settle()
    (said,) = desk.store.leases.workers()
    assert said.detail == "not connected to the broker"
    desk.transport().open()
    desk.settle()
    (said,) = desk.store.leases.workers()
    assert said.detail == ""


# Under load.


def check_honest_updates_are_committed_under_a_flood(folder: Path) -> None:
    """More junk waits at every step than is taken in one; an update that is whole does not wait for its end.

    Less than the broker's window in all: behind an update that is not decided no more than that comes (MQTT 5, 4.6).
    """
    desk = a_desk(folder)
    for message in messages(make_update()):
        desk.broker.publish(message.topic, message.payload, retain=False)
    junk = upload_topic(TENANT, "stranger", id_of("junk"), 0)
    for _ in range(8):
        for _ in range(MOST_EVENTS + 10):
            desk.broker.publish(junk, b"junk", retain=False)
        desk.clock.time_s += 0.1
        desk.settle(1)
    assert [one.device for one in desk.receipts()] == ["watch-0"]


def test_a_flood_of_junk_keeps_no_honest_update_from_its_commit(tmp_path: Path) -> None:
    check_honest_updates_are_committed_under_a_flood(tmp_path)


def test_a_worker_that_waits_for_a_quiet_moment_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aggregator.batches.LONGEST_PENDING_S", 1e9)
    with pytest.raises(AssertionError):
        check_honest_updates_are_committed_under_a_flood(tmp_path)


# Trouble.


def test_a_database_that_fails_is_told_once_and_tried_again(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    reading = desk.services["worker"].store.database.reading
    failing = [True]

    def sometimes() -> object:
        if failing[0]:
            raise DatabaseError("the database cannot be read: connection refused")
        return reading()

    desk.services["worker"].store.database.reading = sometimes  # type: ignore[method-assign, assignment]
    for _ in range(4):
        desk.take(messages(make_update()))
        desk.let_pass(3.0)
    assert len(desk.journal.named("degraded")) == 1
    assert desk.services["worker"].worker.failure == "the database cannot be read: connection refused"
    assert desk.transport().num_held == 0  # the broker need not remember: devices send again
    failing[0] = False
    desk.let_pass(2.0)
    assert desk.services["worker"].worker.failure == ""
    assert len(desk.journal.named("recovered")) == 1
    assert desk.take(messages(make_update())) == 1


def test_a_wrong_shard_is_no_topic(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    good = messages(make_update())[0]
    shard = shard_of("watch-0")
    other = good.topic.replace(f"/up/{shard:02d}/", f"/up/{(shard + 1) % NUM_SHARDS:02d}/")
    desk.broker.publish(other, good.payload, retain=False)
    desk.settle()
    assert desk.refusals() == {"malformed": 1}
    assert desk.said() == []


def test_refusals_are_counted_in_the_database_also_where_nothing_is_committed(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    desk.take(messages(make_update(round=2)))
    desk.let_pass(6.0)
    assert desk.store.refusals("") == {"round_closed": 1}
