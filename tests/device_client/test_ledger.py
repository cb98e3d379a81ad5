"""The privacy ledger: durable before anything, never refunded, never exceeded, never quietly changed."""

from __future__ import annotations

import math
from collections.abc import Callable

import dp_accounting
import msgspec
import numpy as np
import pytest
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client.accounting import (
    ORDERS,
    epsilon_by_order,
    noise_multiplier_for,
    poisson_gaussian_rdp,
    rdp_to_epsilon,
)
from device_client.errors import BudgetSpentError, LedgerError, StoreError
from device_client.ledger import HEAD_NAME, LOG_NAME, Budget, PrivacyLedger
from fl_protocol.errors import LocalMisuseError
from fl_protocol.messages import TrainingPlanMsg
from tests.device_client.ports import TASK, MemoryStore, make_plan

Open = Callable[[MemoryStore, Budget], PrivacyLedger]
BUDGET = Budget(3.0, 1e-5)


def cost_of(plan: TrainingPlanMsg) -> np.ndarray:
    return poisson_gaussian_rdp(
        sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier, steps=plan.local_steps
    )


def reserve(
    ledger: PrivacyLedger, round_number: int, *, task: str = TASK, plan: TrainingPlanMsg | None = None
) -> float:
    return ledger.reserve(
        task=task, round_number=round_number, plan=plan if plan is not None else make_plan(), now_s=float(round_number)
    )


def filled(rounds: int = 4) -> MemoryStore:
    store = MemoryStore()
    ledger = PrivacyLedger(store, BUDGET)
    for number in range(1, rounds + 1):
        reserve(ledger, number)
    return store.after_restart()


class ForgettingLedger(PrivacyLedger):
    """Broken: the line never reaches the disk."""

    def reserve(self, *, task: str, round_number: int, plan: TrainingPlanMsg, now_s: float) -> float:
        true_store, self._store = self._store, MemoryStore()
        try:
            return super().reserve(task=task, round_number=round_number, plan=plan, now_s=now_s)
        finally:
            self._store = true_store


class RefundingLedger(PrivacyLedger):
    """Broken: it gives back what was charged for the round before when a new one begins."""

    def reserve(self, *, task: str, round_number: int, plan: TrainingPlanMsg, now_s: float) -> float:
        self._rdp = np.zeros(len(ORDERS))
        return super().reserve(task=task, round_number=round_number, plan=plan, now_s=now_s)


class LateLedger(PrivacyLedger):
    """Broken: it lets the same round be charged, and so trained, again."""

    def last_round(self, task: str) -> int:
        return super().last_round(task) - 1


def check_a_charge_is_on_disk_when_reserve_returns(open_ledger: Open) -> None:
    store = MemoryStore()
    ledger = open_ledger(store, BUDGET)
    for number in (1, 2, 3):
        spent = reserve(ledger, number)
        again = PrivacyLedger(store.after_restart(), BUDGET)
        assert again.spent_epsilon == spent == ledger.spent_epsilon
        assert again.reservations == ledger.reservations
        assert again.last_round(TASK) == number


def check_spending_only_grows_and_stops_at_the_budget(open_ledger: Open) -> None:
    ledger, spent = open_ledger(MemoryStore(), BUDGET), 0.0
    for number in range(1, 1000):
        try:
            now = reserve(ledger, number)
        except BudgetSpentError:
            return
        assert spent < now <= BUDGET.epsilon
        spent = now
    pytest.fail("the budget was never spent")


def check_a_round_is_charged_once(open_ledger: Open) -> None:
    ledger = open_ledger(MemoryStore(), BUDGET)
    reserve(ledger, 5)
    spent, lines = ledger.spent_epsilon, len(ledger.reservations)
    for number in (5, 4, 1):
        with pytest.raises(BudgetSpentError, match="charged before"):
            reserve(ledger, number)
    assert (ledger.spent_epsilon, len(ledger.reservations)) == (spent, lines)
    reserve(ledger, 1, task="another")  # rounds are counted by task


CHECKS = [
    check_a_charge_is_on_disk_when_reserve_returns,
    check_spending_only_grows_and_stops_at_the_budget,
    check_a_round_is_charged_once,
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_ledger_passes(check: Callable[[Open], None]) -> None:
    check(PrivacyLedger)


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        (check_a_charge_is_on_disk_when_reserve_returns, ForgettingLedger),
        (check_spending_only_grows_and_stops_at_the_budget, RefundingLedger),
        (check_a_round_is_charged_once, LateLedger),
    ],
)
def test_a_broken_ledger_is_caught(check: Callable[[Open], None], broken: Open) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(broken)


plans = st.builds(
    lambda q, z, steps: make_plan(sampling_rate=q, noise_multiplier=z, local_steps=steps),
    st.sampled_from([0.01, 0.2, 1.0]),
    st.floats(0.5, 30.0),
    st.integers(1, 50),
)


@given(
    budget=st.builds(Budget, st.floats(0.1, 20.0), st.sampled_from([1e-3, 1e-6])),
    wanted=st.lists(plans, min_size=1, max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_asked_for_the_budget_is_never_exceeded(budget: Budget, wanted: list[TrainingPlanMsg]) -> None:
    store = MemoryStore()
    ledger = PrivacyLedger(store, budget)
    peer = rdp.RdpAccountant(list(ORDERS), dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    orders, accepted = set(), []
    for number, plan in enumerate(wanted, start=1):
        try:
            reserve(ledger, number, plan=plan)
        except BudgetSpentError:
            assert ledger.last_round(TASK) < number
            continue
        orders.add(ledger.order)
        accepted.append(plan)
        step = dp_accounting.GaussianDpEvent(plan.noise_multiplier)
        sampled = step if plan.sampling_rate == 1 else dp_accounting.PoissonSampledDpEvent(plan.sampling_rate, step)
        peer.compose(sampled, plan.local_steps)
    assert ledger.spent_epsilon <= budget.epsilon
    if ledger.reservations:
        (order,) = orders  # one, whatever came later
        total = sum(cost_of(plan) for plan in accepted)
        assert epsilon_by_order(total, budget.delta)[ORDERS.index(order)] <= budget.epsilon
        if order == math.floor(order):  # between integers dp-accounting may overstate (docs/adr/0005)
            assert peer.get_epsilon(budget.delta) <= budget.epsilon + 1e-9
    again = PrivacyLedger(store.after_restart(), budget)
    assert again.spent_epsilon == ledger.spent_epsilon
    assert again.reservations == ledger.reservations
    assert again.order == ledger.order


class ReoptimisingLedger(PrivacyLedger):
    """Broken: takes the best order anew each time, for which no filter is proven."""

    def _order_index(self, cost: np.ndarray) -> int:
        return int(np.argmin(epsilon_by_order(self._rdp + cost, self.budget.delta)))


def orders_of(ledger: PrivacyLedger) -> set[int]:
    """The orders at which a ledger enforces when wide noise is followed by sampled narrow noise."""
    seen = set()
    for number, plan in enumerate(
        (make_plan(noise_multiplier=20.0), make_plan(sampling_rate=0.05, noise_multiplier=0.7)), 1
    ):
        seen.add(ledger._order_index(cost_of(plan)))
        reserve(ledger, number, plan=plan)
    return seen


def test_the_order_is_fixed_before_the_first_release_and_a_ledger_that_moves_it_is_noticed() -> None:
    assert len(orders_of(PrivacyLedger(MemoryStore(), Budget(8.0, 1e-5)))) == 1
    assert len(orders_of(ReoptimisingLedger(MemoryStore(), Budget(8.0, 1e-5)))) > 1


@pytest.mark.parametrize(("q", "z", "steps"), [(0.05, 1.0, 40), (0.01, 0.8, 507), (1.0, 11.5664, 60)])
def test_a_repeated_plan_gets_as_many_steps_as_an_accountant_would_allow(q: float, z: float, steps: int) -> None:
    ledger = PrivacyLedger(MemoryStore(), Budget(3.0, 1e-5))
    plan = make_plan(sampling_rate=q, noise_multiplier=z)
    assert ledger.remaining_participations(cost_of(plan)) == steps
    assert rdp_to_epsilon(steps * cost_of(plan), 1e-5) <= 3.0 < rdp_to_epsilon((steps + 1) * cost_of(plan), 1e-5)


@pytest.mark.parametrize("steps", [1, 7])
def test_a_budget_made_for_a_number_of_rounds_lasts_for_exactly_those(steps: int) -> None:
    rounds = 20
    z = noise_multiplier_for(epsilon=2.0, delta=1e-5, sampling_rate=0.3, steps=rounds * steps)
    plan = make_plan(noise_multiplier=z, sampling_rate=0.3, local_steps=steps)
    ledger = PrivacyLedger(MemoryStore(), Budget(2.0, 1e-5))
    for number in range(1, rounds + 1):
        left = ledger.remaining_participations(cost_of(plan))
        assert rounds - number <= left <= rounds - number + 1
        reserve(ledger, number, plan=plan)
    with pytest.raises(BudgetSpentError):
        reserve(ledger, rounds + 1, plan=plan)


def test_without_a_budget_nothing_is_claimed_and_nothing_refused() -> None:
    ledger = PrivacyLedger(MemoryStore(), Budget(math.inf, 1e-5))
    assert math.isinf(reserve(ledger, 1, plan=make_plan(noise_multiplier=0.0)))
    assert math.isinf(reserve(ledger, 2))
    assert math.isinf(ledger.remaining_participations(cost_of(make_plan())))


def test_a_finite_budget_allows_no_plan_without_noise() -> None:
    ledger = PrivacyLedger(MemoryStore(), Budget(1e6, 1e-5))
    with pytest.raises(BudgetSpentError):
        reserve(ledger, 1, plan=make_plan(noise_multiplier=0.0))
    assert ledger.remaining_participations(cost_of(make_plan(noise_multiplier=0.0))) == 0


@pytest.mark.parametrize("cut", range(len(filled().read_log(LOG_NAME)) - len(filled(3).read_log(LOG_NAME))))
def test_a_last_line_torn_at_any_byte_is_cut_off(cut: int) -> None:
    # The power went while the fourth line was being written: the head was not yet.
    store, before = filled(3), filled(3).read_log(LOG_NAME)
    store.logs[LOG_NAME] = filled(4).read_log(LOG_NAME)[: len(before) + cut]
    ledger = PrivacyLedger(store, BUDGET)
    assert ledger.last_round(TASK) == 3
    assert store.read_log(LOG_NAME) == before
    reserve(ledger, 4)
    assert PrivacyLedger(store.after_restart(), BUDGET).last_round(TASK) == 4


def test_a_crash_between_line_and_head_keeps_the_charge() -> None:
    store = filled(3)
    store.logs[LOG_NAME] = filled(4).read_log(LOG_NAME)
    assert PrivacyLedger(store, BUDGET).last_round(TASK) == 4


def lines_of(store: MemoryStore) -> list[bytes]:
    return store.read_log(LOG_NAME).splitlines(keepends=True)


@pytest.mark.parametrize("line", range(4))
@pytest.mark.parametrize("kind", ["removed", "edited", "repeated", "swapped", "blanked"])
def test_a_changed_log_stops_the_device(kind: str, line: int) -> None:
    store = filled(4)
    lines = lines_of(store)
    match kind:
        case "removed":
            del lines[line]
        case "edited":
            lines[line] = lines[line].replace(b'"noise_multiplier":4.0', b'"noise_multiplier":9.0')
        case "repeated":
            lines.insert(line, lines[line])
        case "swapped":
            lines[line], lines[line - 1] = lines[line - 1], lines[line]
        case "blanked":
            lines[line] = b"\n"
    store.logs[LOG_NAME] = b"".join(lines)
    with pytest.raises(LedgerError, match="nothing is trained"):
        PrivacyLedger(store, BUDGET)


@given(position=st.integers(0, len(filled().read_log(LOG_NAME)) - 1), byte=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_no_changed_byte_goes_unseen(position: int, byte: int) -> None:
    store = filled(4)
    raw = bytearray(store.read_log(LOG_NAME))
    changed, raw[position] = raw[position] != byte, byte
    store.logs[LOG_NAME] = bytes(raw)
    if changed:
        with pytest.raises(LedgerError, match="nothing is trained"):
            PrivacyLedger(store, BUDGET)
    else:
        PrivacyLedger(store, BUDGET)


@pytest.mark.parametrize("lost", ["log", "head"])
def test_a_lost_file_is_not_a_fresh_start(lost: str) -> None:
    store = filled(2)
    if lost == "log":
        store.logs.clear()
    else:
        del store.blobs[HEAD_NAME]
    with pytest.raises(LedgerError, match="cut or exchanged"):
        PrivacyLedger(store, BUDGET)


@pytest.mark.parametrize(
    "field",
    [
        {"steps": -1},
        {"steps": 10**400},
        {"sampling_rate": 0.0},
        {"sampling_rate": 7.0},
        {"noise_multiplier": -1.0},
        {"round": "one"},
        {"surprise": 1},
    ],
)
def test_a_line_that_makes_no_sense_stops_the_device(field: dict[str, object]) -> None:
    store = filled(1)
    line = msgspec.json.decode(lines_of(store)[0])
    text = msgspec.json.encode({**line, **{k: v for k, v in field.items() if v != 10**400}})
    if field.get("steps") == 10**400:
        text = text.replace(b'"steps":1', b'"steps":1' + b"0" * 400)
    store.logs[LOG_NAME] = text + b"\n"
    with pytest.raises(LedgerError, match="line 1"):
        PrivacyLedger(store, BUDGET)


def test_a_full_disk_changes_nothing() -> None:
    store = filled(2)
    ledger = PrivacyLedger(store, BUDGET)
    before, spent = store.read_log(LOG_NAME), ledger.spent_epsilon
    store.full = True
    with pytest.raises(StoreError, match="No space"):
        reserve(ledger, 3)
    assert store.read_log(LOG_NAME) == before
    assert (ledger.spent_epsilon, ledger.last_round(TASK)) == (spent, 2)
    store.full = False
    reserve(ledger, 3)
    assert PrivacyLedger(store.after_restart(), BUDGET).last_round(TASK) == 3


@pytest.mark.parametrize("settings_", [(0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)])
def test_budgets_out_of_range_are_refused(settings_: tuple[float, float]) -> None:
    with pytest.raises(LocalMisuseError, match=r"epsilon|delta"):
        Budget(*settings_)
