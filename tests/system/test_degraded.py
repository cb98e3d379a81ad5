"""What the service does while something that it needs is away: it says so, loses and doubles nothing, and recovers.

A database that is locked for a minute, a full disk, blobs that cannot be read, a broker that restarts, a clock that is
set forward and back. In the end the model is the one of a study that nothing happened to, bit for bit.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import event

from aggregator import committer
from aggregator.errors import BlobError, DatabaseError
from aggregator.round_events import ClockJumped
from aggregator.rounds import Phase
from aggregator.task_runner import TaskRunner
from tests.system.handmade import announced
from tests.system.study import accepted, check_study, committed, final_digest
from tests.virtual_fleet import AGGREGATOR, VirtualFleet, task_config

OUTAGE_S = 60.0
WORKER = "ingest-1"


def start(folder: Path, *, devices: int = 3) -> VirtualFleet:
    """A study of three rounds, each of which waits for all three devices."""
    return VirtualFleet(folder, devices=devices, task=task_config(goal=3, minimum_cohort=3, round_duration_s=300.0))


def pass_time(fleet: VirtualFleet, duration_s: float) -> None:
    ends_s = fleet.clock.time_s + duration_s
    fleet.run(until=lambda: fleet.clock.time_s >= ends_s)


def finish(fleet: VirtualFleet) -> str:
    fleet.run(most_s=1200.0)
    pass_time(fleet, 2.0)
    check_study(fleet)
    return final_digest(fleet)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the finished model when nothing goes wrong."""
    return finish(start(tmp_path_factory.mktemp("undisturbed")))


def check_said_and_over(fleet: VirtualFleet, name: str = AGGREGATOR) -> None:
    """The journal says that something is wrong, once for each part of the process, and that it is over."""
    journal = fleet.journals[name]
    assert 1 <= len(journal.named("degraded")) <= 2
    assert len(journal.named("recovered")) == len(journal.named("degraded"))
    assert all(note["reason"] for note in journal.named("degraded"))
    service = fleet.services[name]
    assert service.worker.failure == ""
    assert service.coordinator is None or service.coordinator.failure == ""


@contextmanager
def locked_database(fleet: VirtualFleet) -> Iterator[None]:
    """Another process holds the write lock; nobody waits for it here, since time is virtual."""

    def hurry(connection: sqlite3.Connection, _record: object, _proxy: object) -> None:
        connection.execute("PRAGMA busy_timeout=0")

    engines = [service.store.database.engine for service in fleet.services.values()]
    for engine in engines:
        event.listen(engine, "checkout", hurry)
    other = sqlite3.connect(fleet.folder / "aggregator.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()
        for engine in engines:
            event.remove(engine, "checkout", hurry)


@pytest.mark.parametrize("after_steps", range(1, 10, 2))
def test_a_database_that_is_locked_for_a_minute(tmp_path: Path, undisturbed: str, after_steps: int) -> None:
    fleet = start(tmp_path)
    for _ in fleet.steps(after_steps):
        pass
    with locked_database(fleet):
        pass_time(fleet, OUTAGE_S)
        assert fleet.aggregator.worker.failure
        assert "locked" in fleet.aggregator.worker.failure
    assert finish(fleet) == undisturbed
    check_said_and_over(fleet)


def test_a_worker_whose_database_is_locked_for_a_minute(tmp_path: Path, undisturbed: str) -> None:
    fleet = start(tmp_path)
    fleet.start_worker(WORKER)
    pass_time(fleet, 0.5)
    with locked_database(fleet):
        pass_time(fleet, OUTAGE_S)
    assert finish(fleet) == undisturbed
    check_said_and_over(fleet, WORKER)


@contextmanager
def broken_blobs(fleet: VirtualFleet, operation: str) -> Iterator[None]:
    """What a full or an unreadable disk says."""

    def before(what: str) -> None:
        if what.startswith(operation):
            raise BlobError(f"a blob cannot be {operation} (No space left on device)")

    fleet.blobs.before = before
    try:
        yield
    finally:
        fleet.blobs.before = lambda what: None


@pytest.mark.parametrize("operation", ["put", "put sum", "put params", "get"])
@pytest.mark.parametrize("after_steps", [0, 2, 5])
def test_a_disk_that_is_full_or_cannot_be_read_for_a_minute(
    tmp_path: Path, undisturbed: str, operation: str, after_steps: int
) -> None:
    fleet = start(tmp_path)
    for _ in fleet.steps(after_steps):
        pass
    with broken_blobs(fleet, operation):
        pass_time(fleet, OUTAGE_S)
        assert fleet.state.phase is not Phase.FINISHED
    assert finish(fleet) == undisturbed
    check_said_and_over(fleet)
    assert not fleet.journals[AGGREGATOR].named("round_aborted")


def test_a_disk_on_which_nothing_can_be_deleted_stops_nothing(tmp_path: Path, undisturbed: str) -> None:
    fleet = start(tmp_path)
    with broken_blobs(fleet, "delete"):
        assert finish(fleet) == undisturbed
    assert fleet.aggregator.coordinator is not None
    assert fleet.aggregator.coordinator.failure == ""  # what is left lying is collected another time


@pytest.mark.parametrize("keep_sessions", [True, False])
@pytest.mark.parametrize("after_steps", range(1, 10, 2))
def test_a_broker_that_restarts_while_the_database_is_away(
    tmp_path: Path, undisturbed: str, after_steps: int, *, keep_sessions: bool
) -> None:
    fleet = start(tmp_path)
    for _ in fleet.steps(after_steps):
        pass
    with locked_database(fleet):
        pass_time(fleet, OUTAGE_S / 2)
        fleet.broker.restart(keep_retained=False, keep_sessions=keep_sessions)
        pass_time(fleet, OUTAGE_S / 2)
    assert finish(fleet) == undisturbed
    check_said_and_over(fleet)


def test_a_process_killed_while_its_database_is_away_loses_nothing_that_has_a_receipt(
    tmp_path: Path, undisturbed: str
) -> None:
    fleet = start(tmp_path)
    for _ in fleet.steps(2):
        pass
    with locked_database(fleet):
        pass_time(fleet, OUTAGE_S)
        fleet.kill_aggregator()
    fleet.start_aggregator()
    assert finish(fleet) == undisturbed


# The clock.


def set_forward_and_back(folder: Path, by_s: float) -> VirtualFleet:
    """The aggregator's clock is wrong for ten seconds while the first round waits for one more device."""
    fleet = start(folder, devices=2)
    fleet.run(until=lambda: len(accepted(fleet)) == 2)
    for jump_s in (by_s, -by_s):
        fleet.aggregators_ahead_s += jump_s
        pass_time(fleet, 10.0)
    fleet.start_device("watch-2")
    return fleet


@pytest.mark.parametrize("by_s", [3600.0, -3600.0])
def test_a_clock_that_is_set_by_an_hour_and_back_closes_no_round_and_opens_none(
    tmp_path: Path, undisturbed: str, by_s: float
) -> None:
    fleet = set_forward_and_back(tmp_path, by_s)
    manifest = announced(fleet)
    assert (manifest.round, manifest.status) == (1, "open")
    assert 0 < manifest.deadline_s - fleet.clock.time_s <= 300.0
    assert finish(fleet) == undisturbed
    journal = fleet.journals[AGGREGATOR]
    assert [note["by_s"] for note in journal.named("clock_jumped")] == [by_s, -by_s]
    assert not journal.named("round_aborted")
    assert [note["arrived"] for note in committed(fleet)] == [3, 3, 3]
    assert all(note["seconds"] < 100.0 for note in committed(fleet))


def test_an_aggregator_that_believes_its_clock_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = TaskRunner.advance

    def broken(self: TaskRunner, event: object, **more: object) -> None:
        if not isinstance(event, ClockJumped):
            honest(self, event, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(TaskRunner, "advance", broken)
    fleet = set_forward_and_back(tmp_path, 3600.0)
    assert fleet.journals[AGGREGATOR].named("round_aborted")


def test_a_worker_whose_clock_is_set_back_goes_on_serving_its_shards(tmp_path: Path) -> None:
    fleet = start(tmp_path, devices=2)
    fleet.start_worker(WORKER)
    pass_time(fleet, 12.0)
    fleet.aggregators_ahead_s -= 3600.0
    pass_time(fleet, 30.0)
    leases = {lease.name: lease.worker for lease in fleet.store.leases.all() if lease.name.startswith("shard")}
    assert len(leases) == 64
    assert set(leases.values()) == {AGGREGATOR, WORKER}
    fleet.aggregators_ahead_s = 0.0
    pass_time(fleet, 1.0)
    fleet.start_device("watch-2")
    fleet.run()
    check_study(fleet)


def test_what_a_worker_had_under_a_clock_that_was_an_hour_ahead_does_not_stay_with_it_when_it_is_dead(
    tmp_path: Path,
) -> None:
    fleet = start(tmp_path, devices=2)
    fleet.start_aggregator("standby")
    fleet.start_worker(WORKER)
    fleet.aggregators_ahead_s = 3600.0
    pass_time(fleet, 20.0)
    fleet.kill_aggregator(WORKER)
    fleet.kill_aggregator()
    fleet.aggregators_ahead_s = 0.0
    pass_time(fleet, 30.0)
    leases = {lease.name: lease.worker for lease in fleet.store.leases.all()}
    assert len(leases) == 65
    assert set(leases.values()) == {"standby"}
    # Nor does the round stay open for that hour; devices stay out of one that opens in their future.
    assert announced(fleet).deadline_s <= fleet.clock.time_s + 300.0
    fleet.start_device("watch-2")
    fleet.run(most_s=1000.0)
    check_study(fleet)


# Copies that break a promise.


def away_for_a_minute(folder: Path) -> str:
    """A study whose database is away when its first updates come."""
    fleet = start(folder)
    for _ in fleet.steps(1):
        pass
    with locked_database(fleet):
        pass_time(fleet, OUTAGE_S)
    return finish(fleet)


def test_nothing_is_lost_while_the_database_is_away(tmp_path: Path, undisturbed: str) -> None:
    assert away_for_a_minute(tmp_path) == undisturbed


def test_a_worker_that_answers_although_nothing_was_committed_is_noticed(
    tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = committer.Committer._make_durable

    def broken(self: committer.Committer, *arguments: object) -> list[str]:
        try:
            return honest(self, *arguments)  # type: ignore[arg-type]
        except DatabaseError:
            return []

    monkeypatch.setattr(committer.Committer, "_make_durable", broken)
    with pytest.raises(AssertionError):
        assert away_for_a_minute(tmp_path) == undisturbed


def test_a_worker_that_keeps_what_a_failed_commit_added_up_is_noticed(
    tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest: Callable[..., object] = committer.Committer._attempt

    def broken(self: committer.Committer, *arguments: object) -> object:
        monkeypatch.setattr(self._sums, "forget", lambda: None)
        return honest(self, *arguments)

    monkeypatch.setattr(committer.Committer, "_attempt", broken)
    with pytest.raises(AssertionError):
        assert away_for_a_minute(tmp_path) == undisturbed
