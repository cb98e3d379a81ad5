"""Wrong clocks, counted records, and restarts anywhere: each round has one coin and one participation.

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
from device_client.events import (
    Action,
    ConditionsRead,
    CountRecords,
    ParticipationEnded,
    RecordsCounted,
    Remember,
    SessionState,
    Tick,
)
from device_client.session import DeviceSession
from fl_protocol.transport import Connected, Disconnected
from tests.device_client.session_driver import (
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
@settings(max_examples=100, deadline=None, derandomize=True)
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


def test_a_session_that_trusts_its_clock_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CurrentRound, "clock_is_plausible_from_s", -math.inf)
    with pytest.raises(AssertionError):
        test_under_a_clock_that_is_years_behind_nothing_is_decided_until_it_is_right()
