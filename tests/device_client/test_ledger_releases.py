"""What left the device is in the ledger before it leaves; a round's bytes are never others, whatever was put back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from device_client.errors import LedgerError, StoreError
from device_client.events import PendingUpdate
from device_client.ledger import LOG_NAME, Budget, Counter, LogStore, PrivacyLedger
from fl_protocol.errors import LocalMisuseError
from tests.device_client.ledger_ports import BUDGET, DAY_S, OTHER, START_S, TASK, MemoryCounter, Open, filled, reserve
from tests.device_client.ports import DEVICE, MemoryStore, make_plan


def sealed(round_number: int, **changes: Any) -> PendingUpdate:
    """An update as the outbox keeps it."""
    settings: dict[str, Any] = {
        "update_id": bytes(16),
        "study": TASK,
        "device": DEVICE,
        "round": round_number,
        "envelope": b"envelope",
        "sealed_digest": b"\x07" * 32,
        "deadline_s": START_S,
        "recipient_key": "0f" * 16,
    }
    return PendingUpdate(**{**settings, **changes})


class ForgettingLedger(PrivacyLedger):
    """Broken: a release is noted in memory only."""

    def record_release(self, pending: PendingUpdate, *, now_s: float) -> None:
        store, counter = MemoryStore(), MemoryCounter()
        ledger = PrivacyLedger(store, counter, BUDGET)
        reserve(ledger, pending.round)
        ledger.record_release(pending, now_s=now_s)
        self._spending.take(ledger.releases[0])


class LenientLedger(PrivacyLedger):
    """Broken: a round that was released before may be released again with other bytes."""

    def record_release(self, pending: PendingUpdate, *, now_s: float) -> None:
        self._spending.releases.pop((pending.study, pending.round), None)
        super().record_release(pending, now_s=now_s)


class UnchargedLedger(PrivacyLedger):
    """Broken: it does not look whether the round was charged."""

    def was_charged(self, task: str, round_number: int, **_: Any) -> bool:
        del task, round_number
        return True


class FreshPeriodLedger(PrivacyLedger):
    """Broken: a release begins a period at whatever time the clock says."""

    def record_release(self, pending: PendingUpdate, *, now_s: float) -> None:
        self._spending.at_s = now_s
        super().record_release(pending, now_s=now_s)


def ledger_of(open_ledger: Open, store: LogStore, counter: Counter) -> PrivacyLedger:
    return open_ledger(store, counter, Budget(3.0, 1e-5, period_s=30 * DAY_S))


def check_a_release_is_on_disk_when_it_is_noted(open_ledger: Open) -> None:
    store, counter = filled(3)
    ledger = ledger_of(open_ledger, store, counter)
    spent = ledger.spent_epsilon
    for number in (1, 3):
        ledger.record_release(sealed(number), now_s=START_S + 5)
        again = ledger_of(PrivacyLedger, store.after_restart(), counter.after_restart())
        assert again.was_released(TASK, number)
        assert not again.was_released(TASK, 2)
        assert again.releases == ledger.releases
        assert again.spent_epsilon == ledger.spent_epsilon == spent  # it was charged before
        assert again.releases[-1].said_s == START_S + 5


def check_a_round_has_one_sealed_update(open_ledger: Open) -> None:
    store, counter = filled(2)
    ledger = ledger_of(open_ledger, store, counter)
    ledger.record_release(sealed(2), now_s=START_S)
    before = store.read_log(LOG_NAME)
    ledger.record_release(sealed(2), now_s=START_S + 9)  # the same bytes, noted again after a restart
    for one in (ledger, ledger_of(open_ledger, store, counter)):
        with pytest.raises(LedgerError, match="released before, with other bytes"):
            one.record_release(sealed(2, sealed_digest=b"\x08" * 32), now_s=START_S)
    assert store.read_log(LOG_NAME) == before


def check_nothing_is_released_that_was_not_charged(open_ledger: Open) -> None:
    store, counter = filled(2)
    ledger = ledger_of(open_ledger, store, counter)
    ledger.reserve_count(task=TASK, round_number=3, plan=make_plan(), noise_multiplier=50.0, now_s=START_S)
    for pending in (sealed(3), sealed(1, study=OTHER)):
        with pytest.raises(LedgerError, match="never charged"):
            ledger.record_release(pending, now_s=START_S)
    assert not ledger.releases


def check_a_release_moves_no_period(open_ledger: Open) -> None:
    store, counter = filled(2)
    ledger = ledger_of(open_ledger, store, counter)
    ends_s, spent = ledger.period_ends_s, ledger.spent_epsilon
    for number, now_s in ((1, START_S + 999 * DAY_S), (2, START_S - 999 * DAY_S)):
        ledger.record_release(sealed(number), now_s=now_s)
        assert (ledger.period_ends_s, ledger.spent_epsilon) == (ends_s, spent)


CHECKS = [
    (check_a_release_is_on_disk_when_it_is_noted, ForgettingLedger),
    (check_a_round_has_one_sealed_update, LenientLedger),
    (check_nothing_is_released_that_was_not_charged, UnchargedLedger),
    (check_a_release_moves_no_period, FreshPeriodLedger),
]


@pytest.mark.parametrize(("check", "broken"), CHECKS)
def test_the_ledger_passes(check: Callable[[Open], None], broken: Open) -> None:
    del broken
    check(PrivacyLedger)


@pytest.mark.parametrize(("check", "broken"), CHECKS)
def test_a_broken_ledger_is_caught(check: Callable[[Open], None], broken: Open) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(broken)


def test_an_old_store_without_the_release_is_noticed_by_the_counter() -> None:
    store, counter = filled(2)
    ledger = PrivacyLedger(store, counter, BUDGET)
    old = store.after_restart()
    ledger.record_release(sealed(2), now_s=START_S)
    with pytest.raises(LedgerError, match="an old copy of the store was put back"):
        PrivacyLedger(old, counter, BUDGET)


def test_a_disk_that_fails_lets_nothing_leave() -> None:
    store, counter = filled(2)
    ledger = PrivacyLedger(store, counter, BUDGET)
    store.full = True
    with pytest.raises(StoreError):
        ledger.record_release(sealed(2), now_s=START_S)
    assert not ledger.was_released(TASK, 2)
    store.full, counter.full = False, True
    for _ in range(2):  # the line may be there, but it is not counted yet
        with pytest.raises(StoreError):
            ledger.record_release(sealed(2), now_s=START_S)
    counter.full = False
    ledger.record_release(sealed(2), now_s=START_S)
    assert PrivacyLedger(store.after_restart(), counter.after_restart(), BUDGET).was_released(TASK, 2)


@pytest.mark.parametrize("now_s", [math.inf, math.nan])
def test_a_line_that_could_not_be_read_again_is_never_written(now_s: float) -> None:
    store, counter = filled(2)
    before = store.read_log(LOG_NAME)
    with pytest.raises(LocalMisuseError, match="can be read again"):
        PrivacyLedger(store, counter, BUDGET).record_release(sealed(2), now_s=now_s)
    assert store.read_log(LOG_NAME) == before
    PrivacyLedger(store, counter, BUDGET)


def test_without_a_budget_a_release_is_noted_too() -> None:
    store, counter, budget = MemoryStore(), MemoryCounter(), Budget(math.inf, 1e-5)
    ledger = PrivacyLedger(store, counter, budget)
    reserve(ledger, 1)
    ledger.record_release(sealed(1), now_s=START_S)
    assert PrivacyLedger(store, counter, budget).was_released(TASK, 1)
    assert msgspec.json.decode(store.read_log(LOG_NAME).splitlines()[1])["kind"] == "release"


# --- what was begun before a person accepted the ledger ---------------------------------------------------------------


class AnywhereLedger(PrivacyLedger):
    """Broken: any acceptance will do, whenever it was."""

    def was_accepted_since_charge(self, task: str, round_number: int) -> bool:
        return self.was_charged(task, round_number) and bool(self.acceptances)


class OldChargeLedger(PrivacyLedger):
    """Broken: a charge is a charge."""

    def was_accepted_since_charge(self, task: str, round_number: int) -> bool:
        del task, round_number
        return False


def check_only_rounds_charged_before_an_acceptance_are_told(open_ledger: Open) -> None:
    budget = Budget(3.0, 1e-5, period_s=30 * DAY_S)
    old, counter = filled(2)
    newer = PrivacyLedger(old, counter, budget)
    put_back = old.after_restart()
    newer.record_release(sealed(2), now_s=START_S)
    PrivacyLedger.reanchor(put_back, counter, budget, now_s=START_S + DAY_S)
    for _ in range(2):  # as well after a restart
        ledger = open_ledger(put_back, counter, budget)
        assert [ledger.was_accepted_since_charge(TASK, number) for number in (1, 2)] == [True, True]
        if ledger.last_round(TASK) < 3:
            reserve(ledger, 3, now_s=START_S + 31 * DAY_S)
            reserve(ledger, 1, task=OTHER, now_s=START_S + 31 * DAY_S)
        assert not ledger.was_accepted_since_charge(TASK, 3)
        assert not ledger.was_accepted_since_charge(OTHER, 1)
        assert not ledger.was_accepted_since_charge(TASK, 99)  # nothing was charged for it


def test_a_round_charged_before_an_acceptance_is_told_and_none_after() -> None:
    check_only_rounds_charged_before_an_acceptance_are_told(PrivacyLedger)


@pytest.mark.parametrize("broken", [AnywhereLedger, OldChargeLedger])
def test_a_ledger_that_mixes_up_acceptance_and_charge_is_caught(broken: Open) -> None:
    with pytest.raises(AssertionError):
        check_only_rounds_charged_before_an_acceptance_are_told(broken)
