"""Several ingest workers and coordinators on one database: whichever dies or stalls, the model is the same, bit for
bit.

Devices are real; each process has its own connection to the database and to the broker. A worker's sums are committed
before it is killed, its leases run out, and the others take its shards over. For each promise there is a copy that
breaks it, which is caught.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, delete, event, insert

from aggregator import committer
from aggregator.committer import PendingUpdate
from aggregator.intake import Intake
from aggregator.rounds import Phase, RoundState
from aggregator.store import schema
from aggregator.store.leases import Leases
from aggregator.store.tasks import Tasks
from aggregator.store.updates import AcceptedUpdate, NewUpdate, StoredPartial, Updates
from firmware_sim.virtual_flash import PowerCutError
from fl_protocol.messages import UpdateEnvelopeMsg, UpdateHeaderMsg, decode
from fl_protocol.transport import Received
from tests.contracts.databases import PostgresqlServer, new_url
from tests.system.study import aggregator_power_cut, check_study, committed, final_digest, rows_of
from tests.virtual_fleet import AGGREGATOR, TASK, VirtualFleet, task_config

WORKERS = ("ingest-1", "ingest-2")
DEVICES, EARLY = 9, 6
"""Of nine devices that a round waits for, three come late: until then the first round is half-way."""
FINISHED_WITHIN_S = 150.0
"""Of virtual time. The slowest of the honest ones needs 61; one that sits out a round's deadline, 600."""


def start(folder: Path, *workers: str, database_url: str | None = None) -> VirtualFleet:
    """Six of nine devices, and the workers with their fair share of the shards."""
    task = task_config(goal=DEVICES, minimum_cohort=DEVICES, round_duration_s=600.0)
    fleet = VirtualFleet(folder, devices=0, task=task, database_url=database_url)
    for name in workers:
        fleet.start_worker(name)
    pass_time(fleet, 12.0)
    for index in range(EARLY):
        fleet.start_device(f"watch-{index}")
    return fleet


def pass_time(fleet: VirtualFleet, duration_s: float) -> None:
    ends_s = fleet.clock.time_s + duration_s
    fleet.run(until=lambda: fleet.clock.time_s >= ends_s)


def run_half_way(fleet: VirtualFleet) -> None:
    """Until all early updates of the first round are committed."""
    fleet.run(until=lambda: len(rows_of(fleet)) == EARLY)


def finish(fleet: VirtualFleet) -> str:
    """The late devices come; the digest of the finished model."""
    for index in range(EARLY, DEVICES):
        if f"watch-{index}" not in fleet.devices:
            fleet.start_device(f"watch-{index}")
    fleet.run(most_s=FINISHED_WITHIN_S)
    pass_time(fleet, 1.0)
    check_study(fleet)
    return final_digest(fleet)


def shards_of(fleet: VirtualFleet) -> dict[str, int]:
    """How many shards each process has leased now."""
    leases = [lease for lease in fleet.store.leases.all() if lease.name.startswith("shard")]
    return Counter(lease.worker for lease in leases if lease.until_s > fleet.clock.time_s)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the finished model when one process does everything and nothing goes wrong."""
    fleet = start(tmp_path_factory.mktemp("undisturbed"))
    run_half_way(fleet)
    return finish(fleet)


# Workers.


def test_three_workers_share_the_shards_and_make_the_same_model_as_one(tmp_path: Path, undisturbed: str) -> None:
    fleet = start(tmp_path, *WORKERS)
    assert sorted(shards_of(fleet).values()) == [21, 21, 22]
    run_half_way(fleet)
    partials = fleet.store.updates.partials(TASK, 1)
    assert {one.worker for one in partials} == {AGGREGATOR, *WORKERS}
    assert sum(one.num_updates for one in partials) == EARLY
    assert finish(fleet) == undisturbed
    taken = {name: len(fleet.journals[name].named("update_accepted")) for name in (AGGREGATOR, *WORKERS)}
    assert sum(taken.values()) == 3 * DEVICES
    assert min(taken.values()) >= 3


def test_on_postgresql_too_the_shards_are_shared_and_the_model_is_the_same(
    tmp_path: Path, undisturbed: str, request: pytest.FixtureRequest
) -> None:
    fleet = start(tmp_path, *WORKERS, database_url=new_url(request, tmp_path, "postgresql"))
    assert sorted(shards_of(fleet).values()) == [21, 21, 22]
    run_half_way(fleet)
    assert finish(fleet) == undisturbed


def test_a_postgresql_server_that_is_killed_for_a_while_loses_and_doubles_nothing(
    tmp_path: Path, undisturbed: str, request: pytest.FixtureRequest
) -> None:
    server: PostgresqlServer = request.getfixturevalue("postgresql_server")
    fleet = start(tmp_path, *WORKERS, database_url=server.new_database())
    run_half_way(fleet)
    server.kill()
    try:
        for _ in range(20):
            for _ in fleet.steps(4):
                pass
            fleet.clock.time_s += 0.5
    finally:
        server.start()
    assert all(fleet.journals[name].named("degraded") for name in (AGGREGATOR, *WORKERS))
    assert finish(fleet) == undisturbed
    assert all(fleet.journals[name].named("recovered") for name in (AGGREGATOR, *WORKERS))


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_worker_killed_in_the_middle_of_a_round_leaves_its_sum_and_its_shards_to_the_others(
    tmp_path: Path, undisturbed: str, request: pytest.FixtureRequest, kind: str
) -> None:
    url = new_url(request, tmp_path, kind) if kind == "postgresql" else None
    fleet = start(tmp_path, *WORKERS, database_url=url)
    run_half_way(fleet)
    (left_behind,) = (one for one in fleet.store.updates.partials(TASK, 1) if one.worker == WORKERS[0])
    assert left_behind.num_updates >= 1
    fleet.kill_aggregator(WORKERS[0])
    pass_time(fleet, 21.0)
    assert shards_of(fleet) == {AGGREGATOR: 32, WORKERS[1]: 32}
    assert finish(fleet) == undisturbed
    assert [note["arrived"] for note in committed(fleet)] == [DEVICES] * 3


@pytest.mark.parametrize("after_steps", range(1, 22, 2))
def test_a_worker_killed_between_any_two_steps_loses_and_doubles_nothing(
    tmp_path: Path, undisturbed: str, after_steps: int
) -> None:
    fleet = start(tmp_path, *WORKERS)
    for _ in fleet.steps(after_steps):
        fleet.clock.time_s += 0.1
    fleet.kill_aggregator(WORKERS[0])
    assert finish(fleet) == undisturbed


@pytest.mark.parametrize("statement", range(1, 24, 2))
def test_a_worker_that_loses_power_at_any_statement_loses_and_doubles_nothing(
    tmp_path: Path, undisturbed: str, statement: int
) -> None:
    fleet = start(tmp_path, *WORKERS)
    with pytest.raises(PowerCutError), aggregator_power_cut(fleet, statement, name=WORKERS[0]):
        pass_time(fleet, 60.0)
    fleet.kill_aggregator(WORKERS[0])
    assert finish(fleet) == undisturbed


@pytest.mark.parametrize("at", range(1, 12, 2))
def test_an_aggregator_that_loses_power_at_any_blob_loses_and_doubles_nothing(
    tmp_path: Path, undisturbed: str, at: int
) -> None:
    fleet = start(tmp_path)
    operations = 0

    def before(_operation: str) -> None:
        nonlocal operations
        operations += 1
        if operations == at:
            raise PowerCutError

    fleet.blobs.before = before
    with pytest.raises(PowerCutError):
        finish(fleet)
    fleet.kill_aggregator()
    fleet.start_aggregator()
    assert finish(fleet) == undisturbed


def test_a_worker_that_is_stopped_gives_its_shards_back_at_once(tmp_path: Path, undisturbed: str) -> None:
    fleet = start(tmp_path, *WORKERS)
    run_half_way(fleet)
    fleet.services.pop(WORKERS[1]).stop()
    pass_time(fleet, 6.0)
    assert shards_of(fleet) == {AGGREGATOR: 32, WORKERS[0]: 32}
    assert finish(fleet) == undisturbed


def two_under_one_name(folder: Path) -> str:
    """A worker loses its connection to a second one of its name, which goes on, and gets it back later."""
    fleet = start(folder, *WORKERS)
    run_half_way(fleet)
    first = fleet.services[WORKERS[0]]
    second = fleet.start_worker(WORKERS[0])
    sent_by = {"watch-7": second, "watch-8": first}
    for count, (device, worker) in enumerate(sent_by.items(), EARLY + 1):
        fleet.services[WORKERS[0]] = worker
        worker.transport.open()
        fleet.start_device(device)
        fleet.run(until=lambda wanted=count: len(rows_of(fleet)) == wanted)  # type: ignore[misc]
    (partial,) = (one for one in fleet.store.updates.partials(TASK, 1) if one.worker == WORKERS[0])
    assert partial.num_updates == 3
    return finish(fleet)


def test_a_second_process_under_a_workers_name_replaces_no_sum_of_the_first(tmp_path: Path, undisturbed: str) -> None:
    assert two_under_one_name(tmp_path) == undisturbed


# Coordinators.


def test_a_coordinator_that_stands_by_takes_over_in_the_middle_of_a_round(tmp_path: Path, undisturbed: str) -> None:
    fleet = start(tmp_path)
    fleet.start_aggregator("standby")
    run_half_way(fleet)
    assert not fleet.journals["standby"].named("coordinating")
    fleet.kill_aggregator()
    assert finish(fleet) == undisturbed
    assert fleet.journals["standby"].named("coordinating")
    assert [note["arrived"] for note in committed(fleet)] == [DEVICES] * 3


def test_a_coordinator_that_was_away_while_it_combined_a_round_finds_another_in_its_place(
    tmp_path: Path, undisturbed: str
) -> None:
    fleet = start(tmp_path)
    fleet.start_aggregator("standby")
    run_half_way(fleet)
    stalled, stalls = fleet.aggregator, 0

    def before(operation: str) -> None:
        nonlocal stalls
        if operation == "put params" and not stalls:
            stalls += 1
            fleet.services.pop(AGGREGATOR)
            pass_time(fleet, 60.0)
            fleet.services[AGGREGATOR] = stalled

    fleet.blobs.before = before
    assert finish(fleet) == undisturbed
    assert stalls == 1
    told = [event for event, _ in fleet.journals[AGGREGATOR].events if event in {"coordinating", "standing_by"}]
    assert told == ["coordinating", "standing_by"]
    assert fleet.journals["standby"].named("coordinating")


def stale_order(folder: Path) -> tuple[RoundState, RoundState]:
    """A coordinator stalls while it carries out a pause; where the task stands before and after it goes on.

    Meanwhile another one has carried out that pause, a resumption, and all further rounds.
    """
    fleet = start(folder)
    fleet.start_aggregator("standby")
    for index in range(EARLY, DEVICES):
        fleet.start_device(f"watch-{index}")
    while fleet.state.committed < 1:
        for _ in fleet.steps(1):
            pass
        fleet.clock.time_s += 0.25
    stalled, before, last = fleet.aggregator, list[RoundState](), ""
    fleet.store.tasks.ask(TASK, "pause", now_s=fleet.clock.time_s)

    def happens() -> None:
        fleet.services.pop(AGGREGATOR)
        fleet.run(until=lambda: fleet.state.phase is Phase.PAUSED)
        fleet.store.tasks.ask(TASK, "resume", now_s=fleet.clock.time_s)
        fleet.run()
        before.append(fleet.store.tasks.get(TASK).state)
        fleet.services[AGGREGATOR] = stalled

    def listen(_c: object, _cursor: object, text: str, *_rest: object) -> None:
        nonlocal last
        if text == "BEGIN IMMEDIATE" and last.startswith("SELECT orders") and not before:
            last = ""
            happens()
        last = last if text.startswith("BEGIN") else text

    event.listen(stalled.store.database.engine, "before_cursor_execute", listen)
    pass_time(fleet, 10.0)
    return before[0], fleet.store.tasks.get(TASK).state


def test_an_order_that_another_coordinator_has_carried_out_is_not_carried_out_again_later(tmp_path: Path) -> None:
    before, after = stale_order(tmp_path)
    assert before.phase is Phase.FINISHED
    assert after == before


# Copies that break a promise.


def does_not_look_at_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_self: Leases, _connection: Connection, _name: str, _worker: str) -> None:
        return None

    monkeypatch.setattr(Leases, "confirm", broken)


def does_not_look_where_the_task_is(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Tasks.save

    def broken(self: Tasks, connection: Connection, name: str, state: RoundState, **fields: Any) -> None:
        honest(self, connection, name, state, **{**fields, "before": self.get(name).state})

    monkeypatch.setattr(Tasks, "save", broken)


@pytest.mark.parametrize("breaks", [does_not_look_at_its_lease, does_not_look_where_the_task_is])
def test_either_of_two_checks_keeps_a_late_coordinator_from_changing_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: Callable[[pytest.MonkeyPatch], None]
) -> None:
    breaks(monkeypatch)
    before, after = stale_order(tmp_path)
    assert after == before


def test_a_coordinator_that_does_not_look_whether_another_took_over_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    does_not_look_at_its_lease(monkeypatch)
    does_not_look_where_the_task_is(monkeypatch)
    before, after = stale_order(tmp_path)
    assert after != before


def test_a_worker_that_overwrites_its_namesakes_sum_is_noticed(
    tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(
        _self: Updates, connection: Connection, task: str, *, counted_in: int, partial: StoredPartial, num_before: int
    ) -> None:
        del num_before
        table = schema.partials
        key = {"task": task, "counted_in": counted_in, "round": partial.round, "worker": partial.worker}
        connection.execute(delete(table).where(*(table.c[name] == value for name, value in key.items())))
        connection.execute(insert(table).values({**key, "blob": partial.blob, "count": partial.num_updates}))

    monkeypatch.setattr(Updates, "put_partial", broken)
    with pytest.raises(AssertionError):
        assert two_under_one_name(tmp_path) == undisturbed


def killed_at(folder: Path, statement: str) -> str:
    """A worker loses power when it is about to execute a statement; the digest of the finished model."""
    fleet = start(folder, *WORKERS)

    def listen(_c: object, _cursor: object, text: str, *_rest: object) -> None:
        if text.startswith(statement):
            raise PowerCutError

    event.listen(fleet.services[WORKERS[0]].store.database.engine, "before_cursor_execute", listen)
    with pytest.raises(PowerCutError):
        pass_time(fleet, 60.0)
    fleet.kill_aggregator(WORKERS[0])
    return finish(fleet)


def test_a_worker_killed_just_before_its_updates_are_durable_loses_none_that_has_a_receipt(
    tmp_path: Path, undisturbed: str
) -> None:
    assert killed_at(tmp_path, "INSERT INTO updates") == undisturbed


def test_a_worker_that_sends_receipts_before_its_commit_is_noticed(
    tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Intake._put_aside

    def broken(self: Intake, update: PendingUpdate, messages: Sequence[Received]) -> None:
        header = decode(decode(update.envelope, UpdateEnvelopeMsg).header, UpdateHeaderMsg)
        self._answers.receipt(
            AcceptedUpdate(TASK, header.update_id, header.device, header.round, header.sealed_digest, 0.0)
        )
        honest(self, update, messages)

    monkeypatch.setattr(Intake, "_put_aside", broken)
    with pytest.raises(AssertionError):
        assert killed_at(tmp_path, "INSERT INTO updates") == undisturbed


def without_receipts_for_a_while(folder: Path) -> str:
    """Every device sends its first update again and again before it hears of it."""
    fleet = start(folder, *WORKERS)
    quiet_s = fleet.clock.time_s + 90.0
    fleet.broker.loses = lambda topic: "/down/" in topic and fleet.clock.time_s < quiet_s
    pass_time(fleet, 95.0)
    sent = Counter(topic for topic, _ in fleet.broker.published if "/up/" in topic)
    assert min(sent.values()) >= 2
    return finish(fleet)


def test_updates_that_are_sent_again_count_once(tmp_path: Path, undisturbed: str) -> None:
    assert without_receipts_for_a_while(tmp_path) == undisturbed


def test_a_worker_that_counts_what_is_sent_again_is_noticed(
    tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, known = Updates.add, set[bytes]()

    def broken(self: Updates, connection: Connection, rows: Sequence[NewUpdate]) -> None:
        fresh = [row for row in rows if row.update_id not in known]
        known.update(row.update_id for row in rows)
        if fresh:
            honest(self, connection, fresh)

    monkeypatch.setattr(committer, "accepted_updates", lambda connection, ids, *, tasks: {})
    monkeypatch.setattr(committer, "devices_that_sent", lambda connection, pairs: set())
    monkeypatch.setattr(committer, "devices_that_counted", lambda connection, pairs: set())
    monkeypatch.setattr(Updates, "add", broken)
    with pytest.raises(AssertionError):
        assert without_receipts_for_a_while(tmp_path) == undisturbed


def killed_half_way(folder: Path) -> str:
    """As above: one worker of three dies with a sum that is committed."""
    fleet = start(folder, *WORKERS)
    run_half_way(fleet)
    fleet.kill_aggregator(WORKERS[0])
    return finish(fleet)


def test_a_coordinator_that_adds_a_workers_sum_twice_is_noticed(
    tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Updates.partials

    def broken(self: Updates, task: str, counted_in: int) -> list[StoredPartial]:
        found = honest(self, task, counted_in)
        return [*found, *found[-1:]]

    monkeypatch.setattr(Updates, "partials", broken)
    with pytest.raises(AssertionError):
        assert killed_half_way(tmp_path) == undisturbed


def test_a_coordinator_that_forgets_the_sum_of_a_dead_worker_is_noticed(
    tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Updates.partials

    def broken(self: Updates, task: str, counted_in: int) -> list[StoredPartial]:
        return [one for one in honest(self, task, counted_in) if one.worker != WORKERS[0]]

    monkeypatch.setattr(Updates, "partials", broken)
    with pytest.raises(AssertionError):
        assert killed_half_way(tmp_path) == undisturbed
