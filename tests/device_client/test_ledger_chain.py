"""The ledger's log and counter: whatever is changed, cut, lost or put back is noticed; a power cut alone never is."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client.errors import BudgetSpentError, LedgerError, StoreError
from device_client.ledger import LOG_NAME, Budget, Counter, LogStore, PrivacyLedger, Reservation
from device_client.ledger.chain import CountedLog, Written, read_log
from device_client.ledger.lines import GENESIS, decode_line, digest_of
from device_client.ledger.spending import Spending
from tests.device_client.ledger_ports import (
    BUDGET,
    DAY_S,
    OTHER,
    START_S,
    TASK,
    MemoryCounter,
    Open,
    filled,
    reserve,
)
from tests.device_client.ports import MemoryStore, make_plan

KEY = b"\x11" * 32


def lines_of(store: MemoryStore) -> list[bytes]:
    return store.read_log(LOG_NAME).splitlines(keepends=True)


def with_log(raw: bytes) -> MemoryStore:
    return MemoryStore(logs={LOG_NAME: raw})


# --- what a power cut leaves ------------------------------------------------------------------------------------------

LINE_BYTES = len(filled(4)[0].read_log(LOG_NAME)) - len(filled(3)[0].read_log(LOG_NAME))


@pytest.mark.parametrize("cut", range(LINE_BYTES))
def test_a_last_line_torn_at_any_byte_is_cut_off(cut: int) -> None:
    # The power went while the fourth line was being written: it was not counted yet.
    (store, counter), before = filled(3), filled(3)[0].read_log(LOG_NAME)
    store.logs[LOG_NAME] = filled(4)[0].read_log(LOG_NAME)[: len(before) + cut]
    ledger = PrivacyLedger(store, counter, BUDGET)
    assert ledger.last_round(TASK) == 3
    reserve(ledger, 4)
    assert store.read_log(LOG_NAME) == filled(4)[0].read_log(LOG_NAME)
    assert PrivacyLedger(store.after_restart(), counter.after_restart(), BUDGET).last_round(TASK) == 4


@pytest.mark.parametrize(
    "left", [b"\0" * 50 + b"\n", b"\n", b"\n\n\xff\n", b'{"kind":"reservation"}\n{', b"\xff\n" * 9]
)
def test_garbage_after_the_counted_lines_is_cut_off(left: bytes) -> None:
    (store, counter), before = filled(3), filled(3)[0].read_log(LOG_NAME)
    store.logs[LOG_NAME] = before + left
    ledger = PrivacyLedger(store, counter, BUDGET)
    reserve(ledger, 4)
    assert store.read_log(LOG_NAME) == filled(4)[0].read_log(LOG_NAME)


def test_a_power_cut_between_log_and_counter_keeps_the_charge() -> None:
    store, counter = filled(4)[0], filled(3)[1]
    ledger = PrivacyLedger(store, counter, BUDGET)
    assert ledger.last_round(TASK) == 4
    reserve(ledger, 5)
    assert counter.advances == 2  # the fourth line is counted before a fifth is written


def test_opening_a_ledger_writes_nothing() -> None:
    store, counter = filled(4)[0], filled(3)[1]
    store.logs[LOG_NAME] += b"torn"
    store.full = counter.full = True
    assert PrivacyLedger(store, counter, BUDGET).last_round(TASK) == 4
    assert store.read_log(LOG_NAME).endswith(b"torn")


class HalfDeadStore(MemoryStore):
    """Its disk fails after taking the line, and cannot take it back."""

    def append_log(self, name: str, line: bytes) -> None:
        super().append_log(name, line)
        if self.full:
            raise AssertionError
        if len(lines_of(self)) == 2:
            self.full = True
            raise StoreError("Input/output error")


def test_a_line_that_failed_but_stayed_is_not_built_upon() -> None:
    store, counter = HalfDeadStore(), MemoryCounter()
    ledger = PrivacyLedger(store, counter, BUDGET)
    reserve(ledger, 1)
    with pytest.raises(StoreError):
        reserve(ledger, 2)
    assert len(lines_of(store)) == 2
    assert PrivacyLedger(store.after_restart(), counter.after_restart(), BUDGET).last_round(TASK) == 2
    store.full = False
    store.logs[LOG_NAME] += lines_of(store)[1][:20]
    with pytest.raises(StoreError):
        reserve(ledger, 3)  # cuts off both, and fails in the same way
    assert [msgspec.json.decode(line)["round"] for line in lines_of(store)] == [1, 3]
    assert PrivacyLedger(store.after_restart(), counter.after_restart(), BUDGET).last_round(TASK) == 3


# --- what somebody did ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", range(4))
@pytest.mark.parametrize("kind", ["removed", "edited", "repeated", "swapped", "blanked"])
def test_a_changed_log_stops_the_device(kind: str, line: int) -> None:
    store, counter = filled(4)
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
    with pytest.raises(LedgerError, match="nothing is trained"):
        PrivacyLedger(with_log(b"".join(lines)), counter, BUDGET)


def check_an_edited_line_is_noticed(open_ledger: Open) -> None:
    store, counter = filled(4)
    edited = store.read_log(LOG_NAME).replace(b'"noise_multiplier":4.0', b'"noise_multiplier":9.0', 1)
    with pytest.raises(LedgerError):
        open_ledger(with_log(edited), counter, BUDGET)


def check_an_old_store_is_noticed(open_ledger: Open) -> None:
    with pytest.raises(LedgerError):
        open_ledger(filled(2)[0], filled(4)[1], BUDGET)


class ChainlessLedger(PrivacyLedger):
    """Broken: it looks at the last line only, and trusts the others."""

    def __init__(self, store: LogStore, counter: Counter, budget: Budget) -> None:
        data = store.read_log(LOG_NAME).splitlines()
        lines = [decode_line(line) for line in data]
        digests = [GENESIS, *(digest_of(line) for line in data)]
        length_bytes = len(store.read_log(LOG_NAME))
        self._log, self.budget = CountedLog(store, counter, Written(lines, length_bytes, digests, None, None)), budget
        self._spending = Spending(budget)
        for line in lines:
            self._spending.take(line)


class CounterlessLedger(PrivacyLedger):
    """Broken: it makes itself a counter that fits whatever it finds."""

    def __init__(self, store: LogStore, counter: Counter, budget: Budget) -> None:
        del counter
        fresh = MemoryCounter()
        try:
            super().__init__(store, fresh, budget)
        except LedgerError:
            CountedLog(store, fresh, read_log(store, fresh)).count()
            super().__init__(store, fresh, budget)


@pytest.mark.parametrize(
    ("check", "broken"),
    [(check_an_edited_line_is_noticed, ChainlessLedger), (check_an_old_store_is_noticed, CounterlessLedger)],
)
def test_a_ledger_that_forgets_chain_or_counter_is_caught(check: Callable[[Open], None], broken: Open) -> None:
    check(PrivacyLedger)
    with pytest.raises(pytest.fail.Exception):
        check(broken)


@given(position=st.integers(0, len(filled()[0].read_log(LOG_NAME)) - 1), byte=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_no_changed_byte_goes_unseen(position: int, byte: int) -> None:
    store, counter = filled(4)
    raw = bytearray(store.read_log(LOG_NAME))
    changed, raw[position] = raw[position] != byte, byte
    if changed:
        with pytest.raises(LedgerError, match="nothing is trained"):
            PrivacyLedger(with_log(bytes(raw)), counter, BUDGET)
    else:
        PrivacyLedger(with_log(bytes(raw)), counter, BUDGET)


@pytest.mark.parametrize(
    ("rounds_in_log", "rounds_counted", "words"),
    [
        (0, 1, "it has 0 lines, its counter has counted 1; an old copy of the store was put back"),
        (2, 4, "it has 2 lines, its counter has counted 4; an old copy of the store was put back"),
        (4, None, "4 lines but its counter is missing: that file was lost or moved"),
        (4, 2, "4 lines, its counter has counted 2: an old copy of the counter was put back"),
        (4, 0, "4 lines, its counter has counted 0: an old copy of the counter was put back"),
    ],
)
def test_what_was_lost_or_put_back_is_named(rounds_in_log: int, rounds_counted: int | None, words: str) -> None:
    store = filled(rounds_in_log)[0] if rounds_in_log else MemoryStore()
    match rounds_counted:
        case None:
            counter = MemoryCounter()
        case 0:
            counter = MemoryCounter()
            CountedLog(MemoryStore(), counter, read_log(MemoryStore(), counter)).count()
        case _:
            counter = filled(rounds_counted)[1]
    with pytest.raises(LedgerError, match=words) as error:
        PrivacyLedger(store, counter, BUDGET)
    assert "nothing is trained" in str(error.value)
    assert "covey-device ledger accept-counter" in str(error.value)


def test_another_devices_log_is_noticed() -> None:
    store, counter = MemoryStore(), MemoryCounter()
    ledger = PrivacyLedger(store, counter, BUDGET)
    for number in range(1, 5):
        reserve(ledger, number, task=OTHER)
    with pytest.raises(LedgerError, match="its line 4 is not the one"):
        PrivacyLedger(filled(4)[0], counter, BUDGET)


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x94\x01\x00", msgspec.msgpack.encode([2, 0, GENESIS, None])])
def test_a_counter_that_makes_no_sense_stops_the_device(data: bytes) -> None:
    with pytest.raises(LedgerError, match="counter makes no sense"):
        PrivacyLedger(filled(1)[0], MemoryCounter(data), BUDGET)


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
        {"format": 2},
        {"kind": "gift"},
        {"purpose": "fun"},
        {"at_s": None},
    ],
)
def test_a_line_that_makes_no_sense_stops_the_device(field: dict[str, object]) -> None:
    store, counter = filled(1)
    line = msgspec.json.decode(lines_of(store)[0])
    text = msgspec.json.encode({**line, **{k: v for k, v in field.items() if v != 10**400}})
    if field.get("steps") == 10**400:
        text = text.replace(b'"steps":1', b'"steps":1' + b"0" * 400)
    with pytest.raises(LedgerError, match="line 1"):
        PrivacyLedger(with_log(text + b"\n"), counter, BUDGET)


def test_time_that_goes_backwards_in_the_log_stops_the_device() -> None:
    store, counter = filled(1)
    first = lines_of(store)[0]
    entry = msgspec.json.decode(first, type=Reservation)
    earlier = msgspec.structs.replace(entry, round=2, at_s=entry.at_s - 1, previous=digest_of(first[:-1]))
    with pytest.raises(LedgerError, match="line 2 does not follow"):
        PrivacyLedger(with_log(first + msgspec.json.encode(earlier) + b"\n"), counter, BUDGET)


# --- what a person may accept -----------------------------------------------------------------------------------------

MONTHLY = Budget(3.0, 1e-5, period_s=30 * DAY_S)
FOUND = [(filled(4)[0], MemoryCounter()), (filled(2)[0], filled(4)[1]), (filled(4)[0], filled(2)[1])]
IDS = ["counter lost", "old store", "old counter"]


def copy_of(found: tuple[MemoryStore, MemoryCounter]) -> tuple[MemoryStore, MemoryCounter]:
    return found[0].after_restart(), found[1].after_restart()


@pytest.mark.parametrize("found", FOUND, ids=IDS)
def test_what_a_person_accepts_closes_the_period_and_stays_in_the_log(found: tuple[MemoryStore, MemoryCounter]) -> None:
    store, counter = copy_of(found)
    before = store.read_log(LOG_NAME)
    known = len(before.splitlines())
    ledger = PrivacyLedger.reanchor(store, counter, MONTHLY, now_s=START_S + DAY_S)
    assert store.read_log(LOG_NAME).startswith(before)
    assert len(ledger.reservations) == known
    assert ledger.spent_epsilon == 3.0  # whatever is missing, it was no more than that
    assert ledger.remaining_participations(ledger.reservations[-1].rdp()) == 0
    for opened in (ledger, PrivacyLedger(store.after_restart(), counter.after_restart(), MONTHLY)):
        with pytest.raises(
            BudgetSpentError, match=r"counter was accepted on 2027-01-16 .* this period counts as spent"
        ):
            reserve(opened, 9, now_s=START_S + 29 * DAY_S)
        with pytest.raises(BudgetSpentError):
            opened.reserve_count(task=OTHER, round_number=9, plan=make_plan(), noise_multiplier=99.0, now_s=START_S)
        (acceptance,) = opened.acceptances
        assert "counter" in acceptance.found
    assert reserve(ledger, 9, now_s=START_S + 31 * DAY_S) < 3.0
    assert ledger.spent_epsilon_ever >= ledger.spent_epsilon


@pytest.mark.parametrize("found", FOUND, ids=IDS)
def test_with_one_period_for_ever_nothing_is_trained_after_an_acceptance(
    found: tuple[MemoryStore, MemoryCounter],
) -> None:
    store, counter = copy_of(found)
    ledger = PrivacyLedger.reanchor(store, counter, BUDGET, now_s=START_S)
    with pytest.raises(BudgetSpentError, match="one period for ever"):
        reserve(ledger, 9, now_s=START_S + 10_000 * DAY_S)


def test_a_log_that_was_lost_altogether_can_be_accepted_and_closes_a_whole_period() -> None:
    store, counter = MemoryStore(), filled(4)[1]
    ledger = PrivacyLedger.reanchor(store, counter, MONTHLY, now_s=START_S - 999 * DAY_S)
    assert ledger.acceptances[0].counted == 4
    with pytest.raises(BudgetSpentError):
        reserve(ledger, 9, now_s=START_S + 29 * DAY_S)  # from the counter's time on, although the clock was behind
    reserve(ledger, 9, now_s=START_S + 31 * DAY_S)


def test_a_damaged_counter_can_be_accepted() -> None:
    store, counter = filled(4)[0], MemoryCounter(b"\xff")
    ledger = PrivacyLedger.reanchor(store, counter, MONTHLY, now_s=START_S)
    assert "makes no sense" in ledger.acceptances[0].found
    PrivacyLedger(store.after_restart(), counter.after_restart(), MONTHLY)


def test_a_broken_chain_cannot_be_accepted_nor_what_needs_no_acceptance() -> None:
    store, counter = filled(4)
    with pytest.raises(LedgerError, match="nothing to accept"):
        PrivacyLedger.reanchor(store, counter, BUDGET, now_s=START_S)
    edited = store.read_log(LOG_NAME).replace(b"4.0", b"9.0", 1)
    for left in (counter, MemoryCounter()):
        with pytest.raises(LedgerError, match="line 2 does not follow"):
            PrivacyLedger.reanchor(with_log(edited), left, BUDGET, now_s=START_S)
    with pytest.raises(LedgerError, match="line 5 cannot be read"):  # without a counter nobody knows what was torn
        PrivacyLedger.reanchor(with_log(store.read_log(LOG_NAME) + b"{}\n"), MemoryCounter(), BUDGET, now_s=START_S)


@pytest.mark.parametrize("found", FOUND, ids=IDS)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_acceptance_that_was_cut_short_is_not_taken_for_one(
    moment: str, found: tuple[MemoryStore, MemoryCounter]
) -> None:
    store, counter = copy_of(found)
    store.full, counter.full = moment == "before", moment == "after"
    with pytest.raises(StoreError):
        PrivacyLedger.reanchor(store, counter, MONTHLY, now_s=START_S)
    store.full = counter.full = False
    with pytest.raises(LedgerError):
        PrivacyLedger(store.after_restart(), counter.after_restart(), MONTHLY)
    ledger = PrivacyLedger.reanchor(store, counter, MONTHLY, now_s=START_S)
    assert ledger.spent_epsilon == 3.0
