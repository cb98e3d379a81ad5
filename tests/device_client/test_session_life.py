"""A round's life on a device: waiting until it may train, clocks that are wrong, counting records, and restarts
anywhere.

For each guarantee a session that is broken on purpose is caught by the same check.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from device_client.current_round import CLOCK_MARGIN_S, CurrentRound
from device_client.downloads import LONGEST_SILENCE_S
from device_client.events import (
    Abandon,
    Action,
    ConditionsRead,
    CountRecords,
    Evaluate,
    ParticipationEnded,
    RecordsCounted,
    Remember,
    SessionState,
    Tick,
    UpdateReady,
)
from device_client.floors import Floors
from device_client.session import DeviceSession
from fl_protocol.messages import RoundManifestMsg
from fl_protocol.transport import Connected, Disconnected
from tests.device_client.ports import make_plan
from tests.device_client.session_driver import (
    DIGEST,
    STUDY,
    Disk,
    Driver,
    asked_for,
    manifest,
    manifest_message,
    notes,
    participations,
    reasons,
    seeded,
    some_update,
    uploads,
)

YEAR_S = 365.25 * 86400.0
LOW = ("battery at 12 %, at least 30 % wanted", "not charging")


def abandoned(actions: list[Action]) -> list[int]:
    return [action.round for action in actions if isinstance(action, Abandon)]


def test_a_session_does_not_train_before_it_was_told_that_it_may() -> None:
    driver = Driver(blocked=None)
    assert asked_for(driver.open_round()) == []
    assert driver.session.wants_to_train
    assert "the conditions have not been read yet" in driver.session.view().doing
    assert asked_for(driver.tell(ConditionsRead(()))) == [0]


def test_a_blocked_device_waits_says_why_and_starts_when_it_may() -> None:
    driver = Driver(blocked=LOW)
    assert driver.session.wants_to_train is False
    assert driver.session.view().doing == "waiting for the study's next round"
    assert asked_for(driver.open_round()) == []
    assert driver.session.view().doing == f"waiting to train for round 1: {LOW[0]}; {LOW[1]}"
    assert asked_for(driver.tell(ConditionsRead(LOW[1:]))) == []
    assert driver.session.view().doing == "waiting to train for round 1: not charging"
    assert asked_for(driver.tell(ConditionsRead(()))) == [0]
    assert driver.session.view().doing == "fetching the model of round 1: 0 of 1 pieces"
    driver.send(0)
    assert driver.session.view().doing == "fetching the model of round 1: 1 of 4 pieces"
    assert participations(driver.send(1, 2, 3)) == [1]
    assert driver.session.view().doing == "training for round 1"


@pytest.mark.parametrize("role", ["train", "evaluate"])
def test_a_download_rests_while_blocked_and_the_model_is_not_used(role: str) -> None:
    driver = Driver(role=role)  # type: ignore[arg-type]
    driver.open_round()
    driver.send(0)
    actions = driver.tell(ConditionsRead(LOW))
    assert len([a for a in actions if type(a).__name__ == "Unsubscribe"]) == 3
    assert "(paused: battery at 12 %" in driver.session.view().doing
    # What was on its way still comes; it is kept, nothing more is asked for, nothing is charged or measured.
    late = driver.send(1, 2)
    assert asked_for(late) == []
    assert sorted(driver.disk.chunks[DIGEST]) == [0, 1, 2]
    driver.now_s += LONGEST_SILENCE_S
    assert driver.tell(Tick()) == []
    driver.tell(Disconnected("gone"))
    assert asked_for(driver.tell(Connected())) == []
    actions = driver.tell(ConditionsRead(()))
    assert asked_for(actions) == [3]
    driver.tell(ConditionsRead(LOW))
    assert participations(driver.send(3)) == []
    used = driver.tell(ConditionsRead(()))
    assert participations(used) == ([1] if role == "train" else [])
    assert any(isinstance(action, Evaluate) for action in used) == (role == "evaluate")


@pytest.mark.parametrize("fetching", [False, True])
def test_a_round_is_given_up_at_its_deadline_and_not_taken_up_by_a_restart(*, fetching: bool) -> None:
    driver = Driver(blocked=() if fetching else LOW)
    driver.open_round()
    if fetching:
        driver.send(0)
    assert driver.session.next_wake_s() <= 2000.0
    driver.now_s = 1999.9
    assert notes(driver.tell(ConditionsRead(LOW))) == []
    driver.now_s = driver.session.next_wake_s()
    assert driver.now_s == 2000.0
    actions = driver.tell(Tick())
    assert notes(actions) == ["round_skipped"]
    assert f"{LOW[0]}; {LOW[1]}" in reasons(actions)
    assert driver.state is not None
    assert driver.state.willing_round == 0
    assert driver.disk.chunks == {}
    assert driver.session.next_wake_s() == math.inf
    assert not driver.session.wants_to_train
    # Also where the clock then jumps back, or the deadline is moved.
    driver.now_s = 1100.0
    assert asked_for(driver.tell(ConditionsRead(()))) == []
    assert asked_for(driver.open_round(deadline_s=9000.0)) == []
    assert asked_for(driver.restarted().open_round(deadline_s=9000.0)) == []


def test_a_device_that_only_measures_waits_beyond_the_deadline_without_spinning() -> None:
    driver = Driver(role="evaluate", blocked=LOW)
    driver.open_round()
    driver.now_s = 5000.0
    assert driver.tell(Tick()) == []
    assert driver.session.next_wake_s() > driver.now_s
    driver.tell(ConditionsRead(()))
    assert any(isinstance(action, Evaluate) for action in driver.send_model())


def in_training(**changes: object) -> Driver:
    driver = Driver(**changes)  # type: ignore[arg-type]
    driver.open_round()
    assert participations(driver.send_model()) == [1]
    return driver


@pytest.mark.parametrize("restart", [False, True])
def test_training_is_abandoned_at_the_deadline(*, restart: bool) -> None:
    driver = in_training()
    if restart:
        driver = driver.restarted(working_on=manifest())
        assert driver.session.view().doing == "waiting for the study's next round"
        driver.open_round()
        assert driver.session.view().doing == "training for round 1"
        assert participations(driver.send_model()) == []
    assert driver.session.wants_to_train
    assert driver.session.next_wake_s() == 2000.0
    driver.now_s = 2000.0
    actions = driver.tell(Tick())
    assert abandoned(actions) == [1]
    assert reasons(actions) == "the round's deadline has passed"
    assert abandoned(driver.tell(Tick())) == []
    assert driver.session.view().doing == "not in round 1: the round's deadline has passed"


@pytest.mark.parametrize("restart", [False, True])
def test_training_goes_on_when_the_same_rounds_deadline_is_moved(*, restart: bool) -> None:
    driver = in_training()
    if restart:
        driver = driver.restarted(working_on=manifest())
    assert abandoned(driver.open_round(deadline_s=3000.0)) == []
    driver.now_s = 2999.0
    assert abandoned(driver.tell(Tick())) == []
    assert driver.session.next_wake_s() == 3000.0
    driver.now_s = 3000.0
    assert abandoned(driver.tell(Tick())) == [1]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("newer", [{"round": 2}, {"round": 1, "status": "finished"}])
def test_training_is_abandoned_when_its_round_is_over(newer: dict[str, object], *, restart: bool) -> None:
    driver = in_training()
    if restart:
        driver = driver.restarted(working_on=manifest())
    actions = driver.open_round(**newer)
    assert abandoned(actions) == [1]
    assert reasons(actions) == "the round was closed without this device"
    assert asked_for(actions) == ([0] if newer["round"] == 2 else [])


def test_a_finished_update_is_not_abandoned_by_the_deadline_that_passed_meanwhile() -> None:
    driver = in_training()
    driver.now_s = 2000.0
    actions = driver.tell(UpdateReady(some_update()))
    assert abandoned(actions) == []
    assert len(uploads(actions)) == 1


def test_a_refused_manifest_ends_nothing_that_runs() -> None:
    driver = in_training(floors=Floors(minimum_noise_multiplier=2.0))
    actions = driver.open_round(round=2, plan=make_plan(noise_multiplier=1.0))
    assert abandoned(actions) == []
    assert "noise_multiplier 1" in driver.session.view().refused
    assert driver.session.view().doing == "training for round 1"
    assert abandoned(driver.open_round()) == []  # the present manifest again: the refused one is not the newest
    assert driver.session.view().refused == ""


def test_a_moved_deadline_keeps_what_was_fetched_and_costs_nothing_however_often_it_is_replayed() -> None:
    driver = Driver()
    driver.open_round()
    driver.send(0, 1)
    writes = driver.disk.writes
    for number in range(200):  # a broker that shows two versions of the same manifest in turn
        assert asked_for(driver.open_round(deadline_s=3000.0 if number % 2 else 2000.0)) == []
    assert driver.disk.writes == writes
    driver.open_round(deadline_s=3000.0)
    driver.now_s = 2500.0
    assert participations(driver.send(2, 3)) == [1]


def test_an_open_round_after_its_study_was_finished_is_a_replay() -> None:
    driver = Driver()
    driver.open_round(round=1)
    driver.send(0)
    driver.open_round(round=1, status="finished")
    writes = driver.disk.writes
    for _ in range(100):
        assert "a replay" in reasons(driver.open_round(round=1))
        driver.send(0)
        driver.open_round(round=1, status="finished")
    assert driver.disk.writes == writes
    assert asked_for(driver.open_round(round=2)) == [0]  # it was given more rounds


def test_under_a_clock_that_is_years_behind_nothing_is_decided_until_it_is_right() -> None:
    driver = Driver(now_s=1100.0)
    opened_s = 10 * YEAR_S
    later = {"opened_s": opened_s, "deadline_s": opened_s + 1000.0}
    assert asked_for(driver.open_round(**later)) == []
    assert driver.state is not None
    assert driver.state.decided_round == 0
    assert "clock is behind" in driver.session.view().doing
    wake_s = driver.session.next_wake_s()
    assert wake_s == opened_s - CLOCK_MARGIN_S
    driver.now_s = wake_s - 1.0
    assert driver.tell(Tick()) == []
    driver.now_s = wake_s
    assert asked_for(driver.tell(Tick())) == [0]
    assert participations(driver.send_model()) == [1]


def test_under_a_clock_that_is_years_ahead_rounds_are_skipped_and_pending_updates_kept() -> None:
    driver = Driver(now_s=1100.0 + 10 * YEAR_S, outbox=(some_update(),))
    assert len(uploads(driver.actions)) == 1
    assert reasons(driver.open_round()) == "its deadline has passed"
    assert driver.session.view().doing == "not in round 1: its deadline has passed"
    assert driver.session.view().pending == 1
    driver.now_s -= 10 * YEAR_S
    assert asked_for(driver.open_round(round=2)) == [0]
    driver.tell(Disconnected("gone"))
    assert len(uploads(driver.tell(Connected()))) == 1


@pytest.mark.parametrize("set_back_s", [100.0, 86400.0, 10 * YEAR_S])
def test_a_clock_that_is_set_back_stalls_neither_resends_nor_downloads(set_back_s: float) -> None:
    driver = Driver(now_s=20 * YEAR_S, outbox=(some_update(),))
    driver.open_round(opened_s=0.0, deadline_s=40 * YEAR_S)
    driver.now_s -= set_back_s
    began_s, resent, asked = driver.now_s, 0, 0
    driver.tell(Tick())
    while driver.now_s < began_s + 3 * 300.0:
        wake_s = driver.session.next_wake_s()
        assert wake_s > driver.now_s
        driver.now_s = wake_s
        actions = driver.tell(Tick())
        resent, asked = resent + len(uploads(actions)), asked + len(asked_for(actions))
    assert resent >= 2
    assert asked >= 2
    assert participations(driver.send_model()) == [1]


def test_a_participation_noted_under_a_clock_that_was_ahead_does_not_keep_the_device_out_for_years() -> None:
    state = SessionState(STUDY, highest_round=1, decided_round=1, participated_s=1100.0 + 10 * YEAR_S)
    driver = Driver(state=state, minimum_separation_s=86400.0)
    assert asked_for(driver.open_round(round=2)) == [0]


def counts(actions: list[Action]) -> list[int]:
    return [action.manifest.round for action in actions if isinstance(action, CountRecords)]


def test_records_are_counted_once_a_round_before_anything_is_fetched() -> None:
    driver = Driver(counts_records=True, blocked=LOW)
    assert counts(driver.open_round()) == []  # a count is charged: not while it could not train anyway
    actions = driver.tell(ConditionsRead(()))
    assert counts(actions) == [1]
    assert asked_for(actions) == []
    assert driver.session.view().doing == "counting the new records for round 1"
    for event in (Tick(), ConditionsRead(LOW), ConditionsRead(()), manifest_message(manifest(deadline_s=2500.0))):
        assert counts(driver.tell(event)) == []
    assert asked_for(driver.tell(RecordsCounted(1))) == [0]
    assert driver.tell(RecordsCounted(1)) == []
    restarted = driver.restarted()
    actions = restarted.open_round()
    assert counts(actions) == []
    assert asked_for(actions) == [0]
    assert participations(restarted.send_model()) == [1]
    restarted.tell(ParticipationEnded(1, "spent"))
    assert counts(restarted.open_round(round=2)) == [2]


def test_a_device_that_measures_counts_nothing() -> None:
    driver = Driver(role="evaluate", counts_records=True)
    assert asked_for(driver.open_round()) == [0]


def trained_without_enough_records(subject: type[DeviceSession]) -> list[int]:
    """Cut the power at every write around a count that was too small; the rounds that are trained nevertheless."""
    trained = []
    for writes in range(6):
        driver = Driver(counts_records=True, subject=subject)
        actions = driver.open_round() + driver.tell(RecordsCounted(1, "about 3 new records, 50 are wanted"))
        disk = Disk()
        for action in [action for action in actions if isinstance(action, Remember)][:writes]:
            disk.take(action)
        restarted = Driver(counts_records=True, disk=disk, subject=subject)
        if counts(restarted.open_round()):
            restarted.tell(RecordsCounted(1, "about 3 new records, 50 are wanted"))
        trained += participations(restarted.send_model())
    return trained


def test_too_few_records_skip_the_round_whenever_the_power_fails() -> None:
    driver = Driver(counts_records=True)
    driver.open_round()
    actions = driver.tell(RecordsCounted(1, "about 3 new records, 50 are wanted"))
    assert notes(actions) == ["round_skipped"]
    assert driver.session.view().doing == "not in round 1: about 3 new records, 50 are wanted"
    assert trained_without_enough_records(DeviceSession) == []


def test_a_session_that_forgets_that_it_was_counting_is_caught() -> None:
    class Forgetful(DeviceSession):
        def _remember(self, **changes: float) -> Remember:
            if "counted_round" in changes:
                changes.pop("willing_round")  # still willing, though the count has not said yes
            return super()._remember(**changes)

    assert trained_without_enough_records(Forgetful) != []


def test_a_count_for_another_round_changes_nothing() -> None:
    driver = Driver(counts_records=True)
    driver.open_round(round=3)
    assert driver.tell(RecordsCounted(2)) == []
    assert driver.tell(RecordsCounted(2, "too few")) == []
    assert asked_for(driver.tell(RecordsCounted(3))) == [0]


def lives(seed: int, *, subject: type[DeviceSession], cuts: list[int]) -> dict[int, int]:
    """Several rounds; in each life the power fails before a write. By round: how often it was trained or refused."""
    disk, outcomes = Disk(), dict.fromkeys(range(1, 4), 0)
    for life, cut in enumerate([*cuts, 10**6]):
        driver, writes = Driver(disk=copy_of(disk), entropy=seeded(f"{seed} {life}"), subject=subject), 0
        for number in range(1, 4):
            for action in one_round(driver, number):
                if isinstance(action, Remember):
                    if writes == cut:
                        break
                    writes += 1
                disk.take(action)
                outcomes[number] += number in participations([action]) or "the coin said no" in reasons([action])
            else:
                driver.tell(ParticipationEnded(number, "done"))
                continue
            break
    return outcomes


def one_round(driver: Driver, number: int) -> Iterator[Action]:
    yield from driver.open_round(round=number, participation_probability=0.7)
    yield from driver.send_model()


def copy_of(disk: Disk) -> Disk:
    """What the next life finds; what it writes is taken over action by action."""
    return Disk(disk.state, {digest: dict(parts) for digest, parts in disk.chunks.items()}, dict(disk.updates))


every_cut = st.lists(st.integers(0, 8), max_size=6)


@given(seed=st.integers(0, 10**6), cuts=every_cut)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_one_coin_and_one_participation_a_round_wherever_the_power_fails(seed: int, cuts: list[int]) -> None:
    outcomes = lives(seed, subject=DeviceSession, cuts=cuts)
    assert set(outcomes.values()) <= {0, 1}
    assert outcomes[3] == 1 or cuts  # without a power cut every round has its outcome


@pytest.mark.parametrize("forgotten", ["decided_round", "willing_round"])
def test_a_session_that_does_not_remember_its_decisions_is_caught(forgotten: str) -> None:
    class Forgetful(DeviceSession):
        def _remember(self, **changes: float) -> Remember:
            kept = getattr(self._state, forgotten)
            return Remember(replace(super()._remember(**changes).state, **{forgotten: kept}))

    outcomes = [lives(seed, subject=Forgetful, cuts=[cut, cut]) for seed in range(30) for cut in range(5)]
    assert max(max(each.values()) for each in outcomes) > 1


def test_a_session_that_trains_while_blocked_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        DeviceSession, "_conditions_read", lambda self, blocked, now_s: setattr(self, "_blocked", ()) or []
    )
    with pytest.raises(AssertionError):
        test_a_blocked_device_waits_says_why_and_starts_when_it_may()


def test_a_session_that_trusts_its_clock_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CurrentRound, "clock_is_plausible_from_s", -math.inf)
    with pytest.raises(AssertionError):
        test_under_a_clock_that_is_years_behind_nothing_is_decided_until_it_is_right()


def test_a_session_that_takes_every_manifest_for_a_new_round_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_self: CurrentRound, _manifest: RoundManifestMsg) -> bool:
        return False

    monkeypatch.setattr(CurrentRound, "is_same_as", never)
    with pytest.raises(AssertionError):
        test_a_moved_deadline_keeps_what_was_fetched_and_costs_nothing_however_often_it_is_replayed()
