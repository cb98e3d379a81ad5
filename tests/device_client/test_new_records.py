"""Whether there are enough new records is charged before it is looked at, and decided on a noisy count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from device_client.errors import BudgetSpentError, StoreError
from device_client.ledger import LOG_NAME, Budget, PrivacyLedger
from device_client.new_records import NewRecords
from fl_protocol.messages import RoundManifestMsg
from tests.device_client.ledger_ports import MemoryCounter
from tests.device_client.ports import MemoryStore, make_manifest
from tests.virtual_fleet import SeededEntropy

STUDY = "clinic/watch"
FALSE_ALARM_RATE = 1e-9


@dataclass
class Stored:
    """How many records were ever stored; it remembers when it was asked."""

    store: MemoryStore
    count: int
    asked_after: list[list[tuple[str, str]]] = field(default_factory=list)

    def __call__(self) -> int:
        self.asked_after.append(list(self.store.operations))
        return self.count


def rule(
    store: MemoryStore,
    stored: Stored,
    kind: type[NewRecords] = NewRecords,
    *,
    epsilon: float = np.inf,
    noise: float = 20.0,
) -> NewRecords:
    return kind(
        minimum=100,
        noise=noise,
        appended=stored,
        ledger=PrivacyLedger(store, MemoryCounter(), Budget(epsilon, 1e-5)),
        entropy=SeededEntropy("new records"),
        store=store,
        name="counted/watch",
    )


class Peeking(NewRecords):
    """Broken: it looks before it pays."""

    def problem(self, manifest: RoundManifestMsg, *, study: str, now_s: float) -> str:
        if self.appended() < self.minimum:
            return "too few"
        return super().problem(manifest, study=study, now_s=now_s)


class Exact(NewRecords):
    """Broken: the count has next to no noise."""

    def problem(self, manifest: RoundManifestMsg, *, study: str, now_s: float) -> str:
        return NewRecords.problem(replace(self, noise=1e-3), manifest, study=study, now_s=now_s)


def check_the_charge_is_durable_before_the_count_is_looked_at(kind: type[NewRecords]) -> None:
    store = MemoryStore()
    stored = Stored(store, 50)
    subject = rule(store, stored, kind)
    store.operations.clear()
    subject.problem(make_manifest(), study=STUDY, now_s=1.0)
    assert stored.asked_after
    assert all(("append", LOG_NAME) in operations for operations in stored.asked_after)


def check_the_decision_is_as_noisy_as_charged(kind: type[NewRecords]) -> None:
    """20 records too few at a noise of 20: enough with probability 0.16. False-alarm rate: FALSE_ALARM_RATE."""
    store = MemoryStore()
    subject = rule(store, Stored(store, 80), kind)
    rounds = 400
    enough = sum(
        subject.problem(make_manifest(round=number), study=STUDY, now_s=1.0) == "" for number in range(1, rounds + 1)
    )
    # Discrete and continuous Gaussian of this width agree far better than 400 draws can tell; >= 100 is > 99.5.
    chance = float(stats.norm.sf((99.5 - 80) / 20.0))
    assert stats.binomtest(enough, rounds, chance).pvalue > FALSE_ALARM_RATE


CHECKS: list[tuple[Callable[[type[NewRecords]], None], type[NewRecords]]] = [
    (check_the_charge_is_durable_before_the_count_is_looked_at, Peeking),
    (check_the_decision_is_as_noisy_as_charged, Exact),
]


@pytest.mark.parametrize("check", [check for check, _ in CHECKS])
def test_the_rule_passes(check: Callable[[type[NewRecords]], None]) -> None:
    check(NewRecords)


@pytest.mark.parametrize(("check", "broken"), CHECKS)
def test_a_broken_rule_is_caught(check: Callable[[type[NewRecords]], None], broken: type[NewRecords]) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check(broken)


def test_records_count_from_the_last_participation_across_restarts() -> None:
    store = MemoryStore()
    stored = Stored(store, 100_000)
    subject = rule(store, stored)
    assert subject.problem(make_manifest(), study=STUDY, now_s=1.0) == ""
    subject.took_part()
    later = MemoryStore(blobs=dict(store.blobs))
    again = rule(later, stored)
    assert "100 are wanted" in again.problem(make_manifest(round=2), study=STUDY, now_s=2.0)
    stored.count += 100_000
    assert again.problem(make_manifest(round=3), study=STUDY, now_s=3.0) == ""


def test_what_is_told_is_never_less_than_nothing() -> None:
    store = MemoryStore()
    subject = rule(store, Stored(store, 0))
    for number in range(1, 30):
        reason = subject.problem(make_manifest(round=number), study=STUDY, now_s=1.0)
        assert "-" not in reason.split(" new records")[0]


def test_a_spent_budget_looks_at_nothing() -> None:
    store = MemoryStore()
    stored = Stored(store, 100)
    subject = rule(store, stored, epsilon=0.001)
    with pytest.raises(BudgetSpentError):
        subject.problem(make_manifest(), study=STUDY, now_s=1.0)
    assert stored.asked_after == []


def test_a_full_disk_looks_at_nothing() -> None:
    store = MemoryStore()
    stored = Stored(store, 100)
    subject = rule(store, stored)
    store.full = True
    with pytest.raises(StoreError):
        subject.problem(make_manifest(), study=STUDY, now_s=1.0)
    assert stored.asked_after == []


def test_a_round_is_counted_once() -> None:
    store = MemoryStore()
    subject = rule(store, Stored(store, 100))
    subject.problem(make_manifest(), study=STUDY, now_s=1.0)
    with pytest.raises(BudgetSpentError, match="charged before"):
        subject.problem(make_manifest(), study=STUDY, now_s=1.0)
