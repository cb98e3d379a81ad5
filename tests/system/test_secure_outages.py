"""Secure rounds while processes die, machines are away, networks lie and clocks jump.

Whatever happens: no update counts twice, none that was receipted is lost to a round that is committed, each sum is that
of what was counted, no helper answers two lists of a round, and no round is stuck.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from aggregator import committer, task_runner
from aggregator.errors import BlobError
from aggregator.helper import service as helper_service
from aggregator.rounds import Phase
from aggregator.task_file import Server
from firmware_sim.faults.packets import PacketRates
from firmware_sim.virtual_flash import PowerCutError
from fl_protocol.topics import helper_topic, shard_of
from tests.enrolments import broken_copy
from tests.system.secure_checks import (
    Sent,
    answers_on_the_wire,
    check_one_list_per_round,
    check_sums,
    listen_to_integers,
)
from tests.system.study import aggregator_power_cut, check_study, committed, final_digest, rows_of
from tests.system.test_secure_studies import HELPERS, secure_task
from tests.virtual_fleet import AGGREGATOR, TASK, TENANT, VirtualFleet

AWAY = HELPERS[1]
DEVICES = ("watch-0", "watch-1", "watch-2")
UNMASKING_S = 20.0


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What devices mask."""
    return listen_to_integers(monkeypatch)


def start(
    folder: Path, *, devices: int = 3, faults: PacketRates | None = None, seed: str = "fleet", **changes: Any
) -> VirtualFleet:
    """Three devices, all of which each of three rounds waits for."""
    folder.mkdir(exist_ok=True)
    settings = {
        "goal": 3,
        "minimum_cohort": 3,
        "server": Server(name="fedavg", learning_rate=1.0),
        "secure": {"unmasking_s": UNMASKING_S},
    }
    task = secure_task(**{**settings, **changes})
    fleet = VirtualFleet(folder, devices=0, task=task, helpers=HELPERS, faults=faults, seed=seed)
    for name in DEVICES[:devices]:
        start_device(fleet, name)
    return fleet


def start_device(fleet: VirtualFleet, name: str) -> None:
    fleet.start_device(name, minimum_helpers=2, minimum_operators=2)


def pass_time(fleet: VirtualFleet, duration_s: float) -> None:
    ends_s = fleet.clock.time_s + duration_s
    fleet.run(until=lambda: fleet.clock.time_s >= ends_s)


def finish(fleet: VirtualFleet, sent: Sent, *, most_s: float = 600.0) -> str:
    """The study comes to its end, and all that was promised holds; the digest of its model."""
    fleet.run(most_s=most_s)
    pass_time(fleet, 2.0)
    check_study(fleet)
    check_one_list_per_round(fleet)
    assert check_sums(fleet, sent) == fleet.task.rounds
    return final_digest(fleet)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the finished model when nothing goes wrong."""
    fleet = start(tmp_path_factory.mktemp("undisturbed"))
    fleet.run()
    return final_digest(fleet)


def run_until_unmasking(fleet: VirtualFleet, number: int = 1) -> None:
    """Until a round is closed, while one helper is away."""
    fleet.run(until=lambda: (fleet.state.phase, fleet.state.number) == (Phase.UNMASKING, number))


def have_keys(fleet: VirtualFleet) -> None:
    """Until helpers have published their keys, and nothing has come of it."""
    for _ in fleet.steps(1):
        pass
    assert all(helper_topic(TENANT, name, "key") in fleet.broker.retained for name in HELPERS)


# The aggregator.


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_an_aggregator_killed_again_and_again_loses_and_doubles_nothing(
    tmp_path: Path, undisturbed: str, sent: Sent, every: int
) -> None:
    fleet, phases = start(tmp_path), set()
    for _ in range(12):
        for _ in fleet.steps(every):
            pass
        fleet.clock.time_s += 0.5
        phases.add(fleet.store.tasks.get(TASK).state.phase)
        fleet.kill_aggregator()
        fleet.start_aggregator()
    assert phases & {Phase.OPEN, Phase.UNMASKING}
    assert finish(fleet, sent) == undisturbed


@pytest.mark.parametrize("first", [30, 31, 32])
def test_an_aggregator_that_loses_power_at_any_statement_loses_and_doubles_nothing(
    tmp_path: Path, undisturbed: str, sent: Sent, first: int
) -> None:
    """Each life is three statements longer than the one before; the first ones do not come to open a round."""
    fleet, phases = start(tmp_path), []
    for statement in range(first, 300, 3):
        with aggregator_power_cut(fleet, statement):
            try:
                fleet.run()
                break
            except PowerCutError:
                phases.append(fleet.store.tasks.get(TASK).state.phase)
        fleet.kill_aggregator()
        fleet.start_aggregator()
    assert {Phase.OPEN, Phase.UNMASKING} <= set(phases)
    assert finish(fleet, sent) == undisturbed


def test_segments_that_cannot_be_read_for_a_while_put_the_helpers_question_off(
    tmp_path: Path, undisturbed: str, sent: Sent
) -> None:
    fleet = start(tmp_path)

    def before(operation: str) -> None:
        if operation == "get" and fleet.store.tasks.get(TASK).state.phase is Phase.UNMASKING:
            raise BlobError("a blob cannot be read (Input/output error)")

    fleet.blobs.before = before
    pass_time(fleet, 10.0)
    assert fleet.state.phase is Phase.UNMASKING
    assert not list(fleet.helpers[AWAY].store.answers.all())
    fleet.blobs.before = lambda operation: None
    assert finish(fleet, sent) == undisturbed


# Helpers.


@contextmanager
def helper_power_cut(fleet: VirtualFleet, statement: int) -> Iterator[None]:
    """A helper loses power at its n-th SQL statement, or at a commit, from now on."""
    left = statement

    def before(*_arguments: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise PowerCutError

    engine = fleet.helpers[AWAY].store.database.engine
    for name in ("before_cursor_execute", "commit"):
        event.listen(engine, name, before)
    try:
        yield
    finally:
        for name in ("before_cursor_execute", "commit"):
            event.remove(engine, name, before)


def test_a_helper_that_loses_power_at_any_statement_answers_one_list_a_round(
    tmp_path: Path, undisturbed: str, sent: Sent
) -> None:
    fleet, cuts = start(tmp_path, secure={"unmasking_s": 600.0}), 0
    for statement in range(1, 100):
        with helper_power_cut(fleet, statement):
            try:
                fleet.run()
                break
            except PowerCutError:
                cuts += 1
        fleet.kill_helper(AWAY)
        fleet.start_helper(AWAY)
    assert cuts > 12
    assert finish(fleet, sent) == undisturbed


def test_a_helper_killed_when_its_answer_is_kept_and_before_it_is_sent_gives_the_same_answer(
    tmp_path: Path, undisturbed: str, sent: Sent
) -> None:
    fleet = start(tmp_path)
    fleet.broker.loses = lambda topic: f"/{AWAY}/answer/" in topic
    run_until_unmasking(fleet)
    fleet.run(until=lambda: bool(fleet.helpers[AWAY].store.answers.all()))
    fleet.kill_helper(AWAY)
    fleet.broker.loses = lambda topic: False
    fleet.start_helper(AWAY)
    assert finish(fleet, sent) == undisturbed
    assert fleet.journals[AWAY].named("unmask_repeated")
    assert len(fleet.journals[AWAY].named("unmask_answered")) == 3


def check_asked_again_says_the_same(folder: Path) -> None:
    """A helper that adds noise is asked three times: noise that was drawn anew could be averaged away."""
    fleet = start(folder, secure={"unmasking_s": UNMASKING_S, "noise_multiplier": 1.0, "noise_from": "helpers"})
    fleet.broker.loses = lambda topic: f"/{AWAY}/answer/" in topic
    run_until_unmasking(fleet)
    pass_time(fleet, 12.0)
    fleet.broker.loses = lambda topic: False
    fleet.run()
    assert len([one for one, answer in answers_on_the_wire(fleet) if (one, answer.round) == (AWAY, 1)]) >= 3
    check_study(fleet)
    check_one_list_per_round(fleet)


def test_a_helper_that_is_asked_again_says_the_same_noise_and_all(tmp_path: Path) -> None:
    check_asked_again_says_the_same(tmp_path)


def test_a_helper_that_draws_its_noise_anew_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = broken_copy(
        "aggregator.helper.answerer",
        ("given = given_before(question, self._past(question))", "given = None"),
        ("chain = self._store.answers.add(record, answer, self._helper.identity)", "chain = b''"),
    )
    monkeypatch.setattr(helper_service, "Answerer", copy.Answerer)
    with pytest.raises(AssertionError):
        check_asked_again_says_the_same(tmp_path)


def test_a_round_waits_for_the_key_of_a_helper_that_is_away_and_then_opens(
    tmp_path: Path, undisturbed: str, sent: Sent
) -> None:
    fleet = start(tmp_path, round_duration_s=10.0)
    fleet.kill_helper(AWAY)
    pass_time(fleet, 25.0)
    waiting = fleet.journals[AGGREGATOR].named("waiting_for_helpers")[-1]
    assert f"helper {AWAY} has published no key" in waiting["reason"]
    assert not any("/round/" in topic for topic, _ in fleet.broker.published)
    fleet.start_helper(AWAY)
    assert finish(fleet, sent) == undisturbed
    assert not fleet.journals[AGGREGATOR].named("round_aborted")


def test_rounds_whose_helper_stays_away_are_given_up_by_its_name_and_the_task_pauses_until_it_is_back(
    tmp_path: Path, sent: Sent
) -> None:
    fleet = start(tmp_path)
    have_keys(fleet)
    fleet.kill_helper(AWAY)
    fleet.run(until=lambda: fleet.state.phase is Phase.PAUSED)
    aborted = fleet.journals[AGGREGATOR].named("round_aborted")
    assert all(f"no answer of {AWAY} in time" in note["reason"] for note in aborted)
    assert f"no answer of {AWAY}" in fleet.state.reason
    begun = {note["round"]: note["at_s"] for note in fleet.journals[AGGREGATOR].named("round_unmasking")}
    took = [note["at_s"] - begun[note["round"]] for note in aborted]
    assert len(took) == 3
    assert all(UNMASKING_S <= one <= UNMASKING_S + 1 for one in took)
    fleet.start_helper(AWAY)
    fleet.store.tasks.ask(TASK, "resume", now_s=fleet.clock.time_s)
    finish(fleet, sent)
    assert [note["round"] for note in committed(fleet)] == [4, 5, 6]


@contextmanager
def full_disk(fleet: VirtualFleet) -> Iterator[None]:
    """A helper's store has no room for another page."""
    with fleet.helpers[AWAY].store.database.engine.connect() as connection:
        raw = connection.connection.cursor()
        raw.execute("CREATE TABLE beside (x)")
        # Small answers would fit into pages that are there.
        raw.execute(
            "CREATE TRIGGER wide AFTER INSERT ON answers BEGIN INSERT INTO beside VALUES (zeroblob(99999)); END"
        )
        (pages,) = raw.execute("PRAGMA page_count").fetchone() or (0,)
        raw.execute(f"PRAGMA max_page_count={pages}")
    yield
    with fleet.helpers[AWAY].store.database.engine.connect() as connection:
        raw = connection.connection.cursor()
        raw.execute("PRAGMA max_page_count=1000000")
        raw.execute("DROP TRIGGER wide")


def test_a_helper_with_a_full_disk_keeps_quiet_and_answers_when_there_is_room(
    tmp_path: Path, undisturbed: str, sent: Sent
) -> None:
    fleet = start(tmp_path)
    have_keys(fleet)
    with full_disk(fleet):
        run_until_unmasking(fleet)
        pass_time(fleet, UNMASKING_S / 2)
        assert (fleet.state.phase, fleet.state.number) == (Phase.UNMASKING, 1)
    assert finish(fleet, sent) == undisturbed
    assert "full" in fleet.journals[AWAY].named("degraded")[0]["reason"]
    assert fleet.journals[AWAY].named("recovered")


# Devices.


def test_a_device_killed_between_sealing_and_delivery_sends_the_same_bytes_again(tmp_path: Path, sent: Sent) -> None:
    fleet = start(tmp_path)
    name = DEVICES[0]
    fleet.broker.loses = lambda topic: f"/{name}/" in topic and "/up/" in topic
    fleet.run(until=lambda: bool(fleet.journals[name].named("update_sent")))
    before = {topic: payload for topic, payload in fleet.broker.published if f"/{name}/" in topic and "/up/" in topic}
    fleet.kill_device(name)
    fleet.broker.loses = lambda topic: False
    start_device(fleet, name)
    heard = len(fleet.broker.published)
    finish(fleet, sent)
    again = dict(fleet.broker.published[heard:])
    assert before
    assert all(again[topic] == payload for topic, payload in before.items())
    assert [note["arrived"] for note in committed(fleet)] == [3, 3, 3]


def late_while_unmasking(folder: Path, sent: Sent) -> VirtualFleet:
    """Two of three updates close the round; the third comes while a helper is away."""
    fleet = start(folder, goal=2, minimum_cohort=2, rounds=1)
    fleet.broker.loses = lambda topic: "/watch-2/" in topic and "/up/" in topic
    have_keys(fleet)
    fleet.kill_helper(AWAY)
    run_until_unmasking(fleet)
    fleet.broker.loses = lambda topic: False
    pass_time(fleet, UNMASKING_S / 2)
    assert fleet.journals[AGGREGATOR].named("update_deferred")
    fleet.start_helper(AWAY)
    finish(fleet, sent)
    assert not fleet.journals[AGGREGATOR].named("round_aborted")
    fleet.run(until=lambda: bool(fleet.journals["watch-2"].named("update_refused")))
    return fleet


def test_an_update_that_comes_while_its_round_is_unmasked_is_refused_and_not_counted(
    tmp_path: Path, sent: Sent
) -> None:
    fleet = late_while_unmasking(tmp_path, sent)
    assert sorted(row.device for row in rows_of(fleet)) == ["watch-0", "watch-1"]
    assert not fleet.journals["watch-2"].named("update_delivered")


def test_an_aggregator_that_takes_updates_while_it_unmasks_is_noticed(
    tmp_path: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = broken_copy(
        "aggregator.task_runner",
        (
            "            case AskHelpers():\n"
            '                self._ports.store.rounds.mark(connection, self.name, action.number, "closing")\n',
            "            case AskHelpers():\n",
        ),
    )
    monkeypatch.setattr(task_runner.TaskRunner, "_do", copy.TaskRunner._do)
    with pytest.raises(AssertionError):
        late_while_unmasking(tmp_path, sent)


# Networks, workers, clocks.


@pytest.mark.parametrize("seed", [1, 2])
def test_a_network_that_loses_repeats_swaps_and_corrupts(tmp_path: Path, sent: Sent, seed: int) -> None:
    faults = PacketRates(drop=0.1, repeat=0.1, reorder=0.1, corrupt=0.02)
    fleet = start(tmp_path, faults=faults, seed=f"fleet {seed}", minimum_cohort=2, round_duration_s=30.0)
    finish(fleet, sent, most_s=1200.0)


@pytest.mark.parametrize("keeps_retained", [True, False])
def test_a_broker_that_forgets_everything_while_helpers_are_asked(
    tmp_path: Path, undisturbed: str, sent: Sent, *, keeps_retained: bool
) -> None:
    fleet = start(tmp_path)
    fleet.broker.loses = lambda topic: "/request/" in topic
    run_until_unmasking(fleet)
    pass_time(fleet, 1.0)
    fleet.broker.loses = lambda topic: False
    fleet.broker.restart(keep_retained=keeps_retained)
    assert finish(fleet, sent) == undisturbed


def test_a_worker_killed_in_the_middle_of_a_round_leaves_its_masked_sum_to_the_others(
    tmp_path: Path, undisturbed: str, sent: Sent
) -> None:
    fleet = start(tmp_path, devices=0, round_duration_s=600.0)
    workers = ("ingest-1", "ingest-2")
    for name in workers:
        fleet.start_worker(name)
    pass_time(fleet, 12.0)
    for name in DEVICES[:2]:
        start_device(fleet, name)
    fleet.run(until=lambda: len(rows_of(fleet)) == 2)
    left_behind = {one.worker for one in fleet.store.updates.partials(TASK, 1)} & set(workers)
    assert left_behind
    fleet.kill_aggregator(sorted(left_behind)[0])
    pass_time(fleet, 21.0)
    start_device(fleet, DEVICES[2])
    assert finish(fleet, sent) == undisturbed


def test_clocks_that_jump_while_helpers_are_asked_neither_end_a_round_nor_keep_it(
    tmp_path: Path, undisturbed: str, sent: Sent
) -> None:
    fleet = start(tmp_path)
    have_keys(fleet)
    fleet.kill_helper(AWAY)
    run_until_unmasking(fleet)
    for ahead_s in (3600.0, -7200.0, 0.0):
        fleet.aggregators_ahead_s = ahead_s
        pass_time(fleet, UNMASKING_S / 4)
        assert fleet.state.phase is Phase.UNMASKING
        assert 0 < fleet.state.deadline_s - fleet.aggregators_now_s() <= UNMASKING_S
    fleet.start_helper(AWAY)
    assert finish(fleet, sent) == undisturbed
    assert len(fleet.journals[AGGREGATOR].named("clock_jumped")) == 3


# More updates than the modulus holds.

MOST = 3


def two_workers_at_once(folder: Path) -> VirtualFleet:
    """While one worker commits two updates, the other one does; a round takes three, and closes when both have."""
    fleet = start(folder, devices=0, goal=2, minimum_cohort=2, rounds=1, secure={"most_updates": MOST})
    workers = [fleet.start_worker(name) for name in ("ingest-1", "ingest-2")]
    pass_time(fleet, 12.0)
    coordinator, first = fleet.services.pop(AGGREGATOR), workers[0]
    leases = {one.name: one.worker for one in fleet.store.leases.all()}
    names: dict[str, list[str]] = {worker.worker.name: [] for worker in workers}
    for name in (f"watch-{index}" for index in range(40)):
        owned = names.get(leases[f"shard-{shard_of(name):02d}"])
        if owned is not None and len(owned) < 2:
            owned.append(name)
    fleet.services.clear()
    for name in (*names["ingest-1"], *names["ingest-2"]):
        start_device(fleet, name)
    for _ in fleet.steps(6):
        pass
    fleet.services.update({worker.worker.name: worker for worker in workers})

    def before(operation: str) -> None:
        if operation == "put sum":
            fleet.blobs.before = lambda operation: None
            for _ in range(4):
                workers[1].step()

    fleet.blobs.before = before
    for _ in range(4):
        first.step()
    fleet.services[AGGREGATOR] = coordinator
    return fleet


def test_two_workers_together_take_no_more_updates_than_the_modulus_holds(tmp_path: Path, sent: Sent) -> None:
    fleet = two_workers_at_once(tmp_path)
    assert len(rows_of(fleet)) == MOST
    assert len({one.worker for one in fleet.store.updates.partials(TASK, 1)}) == 2
    finish(fleet, sent)
    assert [note["arrived"] for note in committed(fleet)] == [MOST]


def test_workers_that_do_not_look_again_take_more_and_the_round_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = broken_copy("aggregator.committer", ("        if counted > most:", "        if False:"))
    monkeypatch.setattr(committer.Committer, "_check_room", copy.Committer._check_room)
    fleet = two_workers_at_once(tmp_path)
    assert len(rows_of(fleet)) > MOST
    fleet.run(until=lambda: fleet.state.number == 2)
    assert "too_many" in fleet.journals[AGGREGATOR].named("round_aborted")[0]["reason"]
