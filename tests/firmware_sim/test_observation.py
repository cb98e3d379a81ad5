"""What a run did, from its events: complete scores only, everything counted once, gaps left by a kill filled."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from device_client.errors import BudgetSpentError
from device_client.ledger import Budget, PrivacyLedger
from firmware_sim.observation import LogTail, Observation
from firmware_sim.settings import AGGREGATOR
from tests.device_client.ledger_ports import MemoryCounter
from tests.device_client.ports import MemoryStore
from tests.firmware_sim.runs import (
    HELD_OUT,
    SETTINGS,
    TRAINING,
    Event,
    aborted,
    accepted,
    committed,
    evaluated,
    feed,
    finished,
    helper_key,
    loaded,
    opened,
    trained,
    unmasking,
    whole_run,
)


@pytest.fixture
def observation() -> Observation:
    return Observation(SETTINGS)


def test_a_model_has_a_score_only_when_every_held_out_wrist_has_measured_it(observation: Observation) -> None:
    for index, name in enumerate(HELD_OUT):
        assert observation.score_of("d1") is None
        observation.take(name, evaluated("d1", correct=10 * (index + 1), count=40 + index, loss_sum=float(index)))
    score = observation.score_of("d1")
    assert score is not None
    assert score.count == 40 + 41 + 42 + 43
    assert score.accuracy == 100 / 166
    assert score.loss == 6 / 166
    assert score.by_person() == {"9": 30 / 81, "10": 70 / 85}
    assert observation.score_of("another") is None
    assert observation.score_of(None) is None


def test_wrists_that_train_do_not_complete_a_score(observation: Observation) -> None:
    feed(observation, *((name, evaluated("d1", correct=1)) for name in [*HELD_OUT[:3], TRAINING[0]]))
    assert observation.score_of("d1") is None


def test_a_run_is_finished_when_the_finished_model_is_measured_by_all(observation: Observation) -> None:
    events = whole_run()
    feed(observation, *events[:-1])
    assert not observation.finished
    feed(observation, events[-1])
    assert observation.finished
    assert observation.versions == {"d0": 0, "d1": 1, "d2": 2, "d3": 3}


def test_rounds_hold_what_their_events_said(observation: Observation) -> None:
    feed(observation, *whole_run())
    assert sorted(observation.rounds) == [1, 2]
    record = observation.rounds[2]
    assert (record.outcome, record.version, record.goal, record.arrived) == ("committed", 2, 16, 16)
    assert (record.bytes_up, record.bytes_down, record.seconds) == (48_000, 16 * 1512, 1.25)
    assert record.epsilon_max == 2.15
    assert observation.epsilon == {name: 2 + index / 100 for index, name in enumerate(TRAINING)}


def test_the_last_round_is_scored_by_the_finished_model_the_others_by_their_own(observation: Observation) -> None:
    feed(observation, *whole_run())
    first, last = (observation.score_after(observation.rounds[number]) for number in (1, 2))
    assert first is not None
    assert last is not None
    assert first.accuracy == (50 + 51 + 52 + 53) / 400
    assert last.accuracy == (70 + 73 + 76 + 79) / 400
    latest = observation.latest_score()
    assert latest is not None
    assert latest.accuracy == last.accuracy


def test_an_open_round_counts_arrivals_as_they_come(observation: Observation) -> None:
    feed(observation, (AGGREGATOR, opened(1, digest="d0", version=0)))
    for count, device in enumerate(TRAINING[:5], start=1):
        feed(observation, (AGGREGATOR, accepted(1, device, size=1000 + count)))
        assert (observation.rounds[1].outcome, observation.rounds[1].arrived) == ("open", count)
    assert observation.rounds[1].bytes_up == sum(range(1001, 1006))


def test_an_aborted_round_keeps_its_reason_and_has_no_version(observation: Observation) -> None:
    feed(observation, (AGGREGATOR, opened(1, digest="d0", version=0)), (AGGREGATOR, aborted(1, "3 of at least 8")))
    record = observation.rounds[1]
    assert (record.outcome, record.reason, record.version) == ("aborted", "3 of at least 8", None)
    assert observation.score_after(record) is None


def test_without_noise_no_epsilon_is_recorded(observation: Observation) -> None:
    feed(observation, (TRAINING[0], trained(1, None)))
    assert observation.epsilon == {}


def test_refusals_are_counted_by_reason_at_the_aggregator_only(observation: Observation) -> None:
    refused: Event = {"event": "update_refused", "at_s": 1.0, "reason": "round_closed"}
    feed(observation, (AGGREGATOR, refused), (TRAINING[0], refused), (AGGREGATOR, {**refused, "reason": "replayed"}))
    feed(observation, (AGGREGATOR, refused))
    assert observation.refusals == {"round_closed": 2, "replayed": 1}


def refusal_of_a_spent_ledger() -> str:
    """What a real ledger says when nothing is left."""
    ledger = PrivacyLedger(MemoryStore(), MemoryCounter(), Budget(0.5, 1e-5))
    with pytest.raises(BudgetSpentError) as caught:
        ledger.reserve(task="task", round_number=1, plan=SETTINGS.plan().message(), now_s=0.0)
    return str(caught.value)


@pytest.mark.parametrize("event", ["participation_ended", "round_skipped"])
def test_a_run_is_stuck_when_too_few_wrists_have_budget_left(observation: Observation, event: str) -> None:
    ended: Event = {"event": event, "at_s": 1.0, "round": 3, "reason": refusal_of_a_spent_ledger()}
    feed(observation, *((name, ended) for name in TRAINING[:8] * 2))
    assert not observation.is_stuck  # eight are left, as many as a round needs
    feed(observation, (TRAINING[8], {**ended, "reason": "round 3 of task was charged before"}))
    assert not observation.is_stuck
    feed(observation, (TRAINING[8], ended))
    assert observation.is_stuck
    feed(observation, (AGGREGATOR, finished(digest="d3", version=3)))
    assert not observation.is_stuck


@pytest.mark.parametrize("event", ["participation_ended", "store_failed", "message_refused", "degraded"])
def test_complaints_name_who_complained(observation: Observation, event: str) -> None:
    feed(observation, (TRAINING[3], {"event": event, "at_s": 1.0, "round": 1, "reason": "the disk is full"}))
    assert observation.complaints == [f"{TRAINING[3]}: the disk is full"]


def test_a_task_that_paused_itself_is_told_with_its_reason(observation: Observation) -> None:
    paused: Event = {
        "event": "task_paused",
        "at_s": 1.0,
        "task": "watch",
        "reason": "3 rounds in a row came to nothing",
    }
    feed(observation, (AGGREGATOR, paused))
    assert observation.paused_because == "3 rounds in a row came to nothing"


# Helpers of secure rounds.


def test_unmasking_lasts_from_the_first_asking_to_the_commit(observation: Observation) -> None:
    feed(observation, (AGGREGATOR, opened(1, digest="d0", version=0)), (AGGREGATOR, unmasking(1, at_s=100.25)))
    record = observation.rounds[1]
    assert (record.outcome, record.unmasking_s) == ("open", None)
    # Killed, started again, and helpers asked again.
    feed(observation, (AGGREGATOR, loaded(number=1, phase="unmasking", committed=0)))
    feed(observation, (AGGREGATOR, unmasking(1, at_s=101.0)), (AGGREGATOR, committed(1, digest="d1", version=1)))
    assert (record.outcome, record.unmasking_s) == ("committed", 1.75)


def test_updates_that_are_told_while_helpers_are_asked_count(observation: Observation) -> None:
    feed(observation, (AGGREGATOR, opened(1, digest="d0", version=0)), (AGGREGATOR, accepted(1, TRAINING[0])))
    feed(observation, (AGGREGATOR, unmasking(1, arrived=2)), (AGGREGATOR, accepted(1, TRAINING[1])))
    assert (observation.rounds[1].arrived, observation.rounds[1].bytes_up) == (2, 6000)


def test_helpers_are_known_with_their_operators_by_their_keys(observation: Observation) -> None:
    keys = [helper_key("helper-b", "hospital-b"), helper_key("helper-a", "patients")]
    feed(observation, *((AGGREGATOR, key) for key in keys))
    assert observation.helpers == {"helper-a": "patients", "helper-b": "hospital-b"}


@pytest.mark.parametrize(
    "published",
    [
        {"event": "round_extended", "at_s": 2.0, "round": 1, "deadline_s": 20.0},
        accepted(1, TRAINING[0]),
        opened(2, digest="d1", version=1),
    ],
    ids=["extended", "update", "next round"],
)
def test_a_round_waits_for_its_helpers_until_it_is_published(observation: Observation, published: Event) -> None:
    reason = "helper helper-a has published no key; is covey-helper running?"
    waiting: Event = {"event": "waiting_for_helpers", "at_s": 1.0, "round": 1, "reason": reason}
    feed(observation, (AGGREGATOR, opened(1, digest="d0", version=0)), (AGGREGATOR, waiting))
    assert observation.waits_for == reason
    feed(observation, (AGGREGATOR, published))
    assert observation.waits_for == ""
    assert observation.complaints == []  # every start begins so


def test_a_round_that_is_given_up_because_of_a_helper_keeps_its_reason(observation: Observation) -> None:
    reason = "the 16 updates of round 1 could not be combined: no answer of helper-b in time"
    feed(observation, (AGGREGATOR, opened(1, digest="d0", version=0)), (AGGREGATOR, unmasking(1)))
    feed(observation, (AGGREGATOR, aborted(1, reason)))
    record = observation.rounds[1]
    assert (record.outcome, record.reason, record.unmasking_s) == ("aborted", reason, None)


@pytest.mark.parametrize(
    ("source", "event", "complaint"),
    [
        (
            "helper-a",
            {"event": "unmask_refused", "round": 3, "reason": "too_few", "detail": "7 of at least 8 updates"},
            "helper-a: does not unmask round 3: too_few: 7 of at least 8 updates",
        ),
        (
            "helper-a",
            {"event": "unmask_refused", "round": 0, "reason": "bad_manifest", "detail": "it is not signed"},
            "helper-a: does not unmask a request: bad_manifest: it is not signed",
        ),
        (
            "helper-b",
            {"event": "request_ignored", "reason": "another helper was meant"},
            "helper-b: a request is ignored: another helper was meant",
        ),
        (
            AGGREGATOR,
            {"event": "helper_message_refused", "helper": "helper-b", "kind": "answer", "reason": "not signed"},
            "aggregator: answer of helper-b refused: not signed",
        ),
        ("helper-b", {"event": "degraded", "reason": "the disk is full"}, "helper-b: the disk is full"),
    ],
    ids=["refused", "refused, no round", "ignored", "not believed", "store"],
)
def test_what_goes_wrong_with_helpers_is_told(
    observation: Observation, source: str, event: Event, complaint: str
) -> None:
    feed(observation, (source, {"at_s": 1.0, **event}))
    assert observation.complaints == [complaint]


def test_unknown_events_change_nothing_but_the_time(observation: Observation) -> None:
    feed(
        observation, (AGGREGATOR, {"event": "connected", "at_s": 7.0}), (AGGREGATOR, {"event": "stopped", "at_s": 9.0})
    )
    assert (observation.first_s, observation.last_s, observation.rounds) == (7.0, 9.0, {})


# A kill -9 leaves gaps: what was committed but not told.


def test_a_commit_that_was_not_told_is_noticed_when_the_aggregator_starts_again(observation: Observation) -> None:
    feed(observation, (AGGREGATOR, opened(1, digest="d0", version=0)))
    feed(observation, *((AGGREGATOR, accepted(1, device)) for device in TRAINING))
    feed(observation, (AGGREGATOR, loaded(number=2, phase="open", committed=1)))
    record = observation.rounds[1]
    assert (record.outcome, record.version, record.arrived, record.bytes_up) == ("committed", 1, 16, 48_000)
    feed(observation, (AGGREGATOR, committed(2, digest="d2", version=2)))
    assert observation.rounds[2].version == 2


def test_an_abort_that_was_not_told_is_noticed_when_the_aggregator_starts_again(observation: Observation) -> None:
    feed(observation, (AGGREGATOR, opened(1, digest="d0", version=0)))
    feed(observation, (AGGREGATOR, loaded(number=2, phase="open", committed=0)))
    assert observation.rounds[1].outcome == "aborted"
    assert observation.rounds[1].version is None


def test_a_restart_in_an_open_round_leaves_it_open(observation: Observation) -> None:
    events = [(AGGREGATOR, opened(1, digest="d0", version=0)), (AGGREGATOR, accepted(1, TRAINING[0]))]
    feed(observation, *events, (AGGREGATOR, loaded(number=1, phase="open", committed=0)))
    assert (observation.rounds[1].outcome, observation.rounds[1].arrived) == ("open", 1)


def test_a_device_that_starts_settles_nothing(observation: Observation) -> None:
    feed(observation, (AGGREGATOR, opened(1, digest="d0", version=0)))
    feed(observation, (TRAINING[0], {"event": "started", "at_s": 1.0}))
    assert observation.rounds[1].outcome == "open"


def test_a_finish_that_was_not_told_is_noticed_from_those_who_measure(observation: Observation) -> None:
    untold = [(source, event) for source, event in whole_run() if event["event"] != "task_finished"]
    untold = [
        (source, event) for source, event in untold if (event["event"], event.get("round")) != ("round_committed", 2)
    ]
    feed(observation, *untold, (AGGREGATOR, loaded(number=2, phase="finished", committed=2)))
    assert observation.finished
    assert observation.versions["d3"] == 3
    assert (observation.rounds[2].outcome, observation.rounds[2].version) == ("committed", 2)
    final = observation.score_after(observation.rounds[2])
    assert final is not None
    assert final.accuracy == 298 / 400


# Logs.


def write(path: Path, *events: Event, tail: bytes = b"") -> None:
    with path.open("ab") as stream:
        stream.write(b"".join(msgspec.json.encode(event) + b"\n" for event in events) + tail)


def test_a_log_is_read_line_by_line_as_it_grows(tmp_path: Path) -> None:
    log = tmp_path / "aggregator.jsonl"
    tail = LogTail(AGGREGATOR, log)
    assert list(tail.read()) == []  # not there yet
    first, second = accepted(1, "a"), accepted(1, "b")
    line = msgspec.json.encode(second) + b"\n"
    write(log, first, tail=line[:20])
    assert list(tail.read()) == [first]
    write(log, tail=line[20:])
    assert list(tail.read()) == [second]
    assert list(tail.read()) == []


def test_a_line_torn_by_a_kill_costs_no_later_line(tmp_path: Path) -> None:
    log = tmp_path / "aggregator.jsonl"
    events = [accepted(1, "a"), loaded(number=1, phase="open", committed=0), accepted(1, "b")]
    write(log, events[0], tail=b'{"event":"update_acc')
    write(log, *events[1:])  # the first line of the new process lands on the torn one
    assert list(LogTail(AGGREGATOR, log).read()) == [events[0], events[2]]


@pytest.mark.parametrize("line", [b"", b"null", b"[]", b"7", b"\xff\xfe", b'{"event": "x"', b"\0" * 40])
def test_a_line_that_is_no_event_is_passed_over(tmp_path: Path, line: bytes) -> None:
    log = tmp_path / "aggregator.jsonl"
    write(log, accepted(1, "a"), tail=line + b"\n")
    write(log, accepted(1, "b"))
    assert [event["device"] for event in LogTail(AGGREGATOR, log).read()] == ["a", "b"]


def test_a_resumed_run_is_gathered_from_the_start_and_counts_everything_once(tmp_path: Path) -> None:
    log = tmp_path / "aggregator.jsonl"
    events = [event for source, event in whole_run() if source == AGGREGATOR]
    write(log, *events[:10])
    before, tail = Observation(SETTINGS), LogTail(AGGREGATOR, log)
    feed(before, *((AGGREGATOR, event) for event in tail.read()))
    write(log, loaded(number=1, phase="open", committed=0), *events[10:])
    feed(before, *((AGGREGATOR, event) for event in tail.read()))

    after = feed(Observation(SETTINGS), *((AGGREGATOR, event) for event in LogTail(AGGREGATOR, log).read()))
    assert after.rounds == before.rounds
    assert [record.arrived for record in after.rounds.values()] == [16, 16]
    assert [record.bytes_up for record in after.rounds.values()] == [48_000, 48_000]


def test_finishing_is_told_once_even_if_measured_again(observation: Observation) -> None:
    feed(observation, *whole_run())
    score = observation.score_of("d3")
    feed(observation, (HELD_OUT[0], evaluated("d3", correct=70, loss_sum=30.0, status="finished", round=2)))
    assert observation.score_of("d3") == score
    feed(observation, (AGGREGATOR, finished(digest="d3", version=3)))
    assert observation.versions["d3"] == 3
