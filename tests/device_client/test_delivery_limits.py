"""Delivery never costs more than it may: not on a slow line, not under replay, not with a wrong clock."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client import delivery
from device_client.delivery import (
    ANSWER_WITHIN_S,
    FIRST_RETRY_S,
    LARGE_BYTES,
    LEAST_ATTEMPTS,
    LONGEST_RETRY_S,
    RETRYABLE,
    THROTTLED_S,
    WINDOW,
    Deliveries,
)
from device_client.events import Action, Note, PendingUpdate, Publish
from fl_protocol.chunking import missing_bitmap
from fl_protocol.errors import RefusalReason
from fl_protocol.messages import NackMsg
from tests.device_client.delivery_line import (
    PACKET,
    YEARS_S,
    Line,
    events,
    indices,
    nack,
    pending,
    published,
)
from tests.device_client.session_driver import receipt_for, some_update


@pytest.mark.parametrize("seconds_a_message", [0.0, 0.3, 40.0])
def test_no_more_than_a_window_waits_on_the_line(seconds_a_message: float) -> None:
    line = Line(*(pending(number, 30_000) for number in (1, 2, 3)), seconds_a_message=seconds_a_message)
    line.until(3000.0)
    assert line.most_waiting <= WINDOW
    assert len(list(line.sent())) > WINDOW


@pytest.mark.parametrize(("receive_maximum", "window"), [(None, WINDOW), (3, 3), (1, 1), (0, 1), (65_535, WINDOW)])
def test_no_more_waits_on_the_line_than_the_server_takes(receive_maximum: int | None, window: int) -> None:
    line = Line(pending(1, 30_000), seconds_a_message=0.3)
    line.subject.connected(PACKET, receive_maximum=receive_maximum)
    line.until(300.0)
    assert line.most_waiting == window
    assert len(list(line.sent())) > 60


def test_a_broker_that_acknowledges_nothing_is_given_one_window() -> None:
    line = Line(pending(1, 30_000), pending(2, 30_000), pending(3), seconds_a_message=None)
    line.until(100_000.0)
    assert len(list(line.sent())) <= WINDOW
    line.subject.connected(PACKET)  # a new connection is another chance
    line._acks_s.clear()
    assert published(line.look()) != []


def earliest_resends(*, seconds_a_message: float, subject: type[Deliveries] = Deliveries) -> list[tuple[float, float]]:
    """Of a small update on a slow line: how long after its last chunk left it was sent again, and at least should."""
    line = Line(new=pending(size=1900), seconds_a_message=seconds_a_message, subject=subject)
    line.until(3600.0)
    began_s = line.attempts_s()
    sent_s = [at_s for at_s, _ in line.sent()]
    # All four chunks, and later one that asks.
    counts = [sum(here <= at_s < later for at_s in sent_s) for here, later in pairwise([*began_s, math.inf])]
    left_s = [at_s + count * seconds_a_message for at_s, count in zip(began_s, counts, strict=True)]
    least_s = [min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0**attempt) / 2 for attempt in range(len(began_s))]
    return [(later - left, least) for left, later, least in zip(left_s, began_s[1:], least_s, strict=False)]


@pytest.mark.parametrize("seconds_a_message", [0.0, 1.0, 7.0, 60.0])
def test_the_back_off_begins_when_the_last_chunk_has_left(seconds_a_message: float) -> None:
    resends = earliest_resends(seconds_a_message=seconds_a_message)
    assert len(resends) >= 7
    assert all(waited >= least - 1e-6 for waited, least in resends)


def test_a_back_off_that_begins_with_the_first_chunk_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery._Delivery, "look_at_line", lambda _self, _now_s, *, backlog: None)
    assert any(waited < least for waited, least in earliest_resends(seconds_a_message=7.0))


def sent_in_silence(size: int, *, hours: float, subject: type[Deliveries] = Deliveries) -> float:
    """How many times its own size an update is sent to a broker that never says anything."""
    line = Line(new=some_update(1, size, deadline_s=1e11), packet=None, subject=subject)
    return sum(len(message.payload) for message in published(line.until(3600.0 * hours))) / size


@pytest.mark.parametrize("size", [200_000, 1_000_000])
def test_a_silent_broker_has_little_uploaded(size: int) -> None:
    """Three and eleven chunks, of which the last, which asks, is a fiftieth of the whole."""
    assert sent_in_silence(size, hours=24) < 25


class Tireless(Deliveries):
    """Broken: it sends the whole every other time."""

    def _begin_attempt(self, delivery: Any, now_s: float) -> Note:
        delivery.silence %= 2
        return super()._begin_attempt(delivery, now_s)


def test_a_device_that_sends_all_again_and_again_is_caught() -> None:
    assert sent_in_silence(1_000_000, hours=24, subject=Tireless) > 100


def test_a_large_update_is_sent_as_a_whole_ever_more_rarely() -> None:
    line = Line(new=pending(size=3000))
    line.until(20 * LONGEST_RETRY_S)
    sent_s = [at_s for at_s, _ in line.sent()]
    ends_s = [*line.attempts_s(), math.inf]
    whole = [i for i, (here, later) in enumerate(pairwise(ends_s), 1) if sum(here <= s < later for s in sent_s) == 6]
    assert whole == [1, 3, 7, 15, 31]


LARGE = 5 * LARGE_BYTES


def test_a_large_update_waits_for_its_conditions_and_goes_on_where_it_stopped() -> None:
    line = Line(new=some_update(1, LARGE, deadline_s=1e11), packet=None, seconds_a_message=10.0)
    line.subject.connected(None, receive_maximum=2)
    line.subject.hold_large(hold=True)
    assert line.until(3600.0) == []
    assert line.next_s() == math.inf  # nothing to wake up for
    line.subject.hold_large(hold=False)
    assert indices(line.look()) == [0, 1]
    line.subject.hold_large(hold=True)
    assert line.until(7200.0) == []
    line.subject.hold_large(hold=False)
    assert indices(line.until(7210.0)) == [2, 3]


def sent_while_held(size: int, *, subject: type[Deliveries] = Deliveries) -> list[Publish]:
    """What is sent in an hour while large updates are held, although a NACK asks for chunks."""
    update = some_update(1, size, deadline_s=1e11)
    line = Line(update, subject=subject)
    line.subject.hold_large(hold=True)
    line.until(1800.0)
    line.subject.nack(nack(update, RefusalReason.TRUNCATED, missing=missing_bitmap(-(-size // 500), {0})), line.now_s)
    return published(line.until(3600.0))


def test_only_large_updates_are_held_and_no_answer_frees_them() -> None:
    assert sent_while_held(LARGE_BYTES + 1) == []
    assert sent_while_held(LARGE_BYTES) != []


class Unheld(Deliveries):
    """Broken: it sends whatever the network."""

    def _is_held(self, _delivery: Any) -> bool:
        return False


def test_a_device_that_holds_nothing_is_caught() -> None:
    assert sent_while_held(LARGE_BYTES + 1, subject=Unheld) != []


def sent_under_replay(*, hours: float, subject: type[Deliveries] = Deliveries) -> tuple[int, int]:
    """A broker replays one signed NACK ten times a second; chunks sent, with and without that."""
    counts = []
    for replays in (True, False):
        update = pending()
        line = Line(new=update, subject=subject)
        asking = nack(update, RefusalReason.TRUNCATED, missing=missing_bitmap(6, []))
        for tenth in range(int(36_000 * hours)):
            line.now_s = tenth / 10
            if replays:
                line.subject.nack(asking, line.now_s)
            line.look()
        counts.append(len(list(line.sent())))
    return counts[0], counts[1]


def test_a_replayed_nack_has_no_more_sent_than_the_back_off_allows() -> None:
    with_replay, without = sent_under_replay(hours=1.0)
    # The answers back off as the attempts do, so there are about as many of them, each of the whole.
    attempts = 2 + sum(1 for _ in range(20) if _ < 7) + 3600.0 / (LONGEST_RETRY_S / 2)
    assert without <= 6 * attempts
    assert with_replay <= 6 * 2 * attempts


def test_a_device_that_answers_every_nack_at_once_is_caught() -> None:
    class Eager(Deliveries):
        def nack(self, message: NackMsg, now_s: float) -> list[Action]:
            for one in self._open.values():
                one.answered_s, one.least_missing = -math.inf, math.inf
            return super().nack(message, now_s)

    with_replay, _ = sent_under_replay(hours=0.1, subject=Eager)
    assert with_replay > 6 * 2 * 40


def test_answers_that_tell_of_progress_are_not_slowed_down() -> None:
    """A line that loses half of everything: each answer names less, so each is answered within seconds."""
    update = pending(size=8000)  # sixteen chunks
    line, there = Line(new=update), set()
    line.look()
    for step, lost in enumerate([8, 4, 2, 1]):
        there = set(range(16 - lost))
        line.now_s = 10.0 * (step + 1)
        line.subject.nack(nack(update, RefusalReason.TRUNCATED, missing=missing_bitmap(16, there)), line.now_s)
        assert indices(line.look())[:lost] == list(range(16 - lost, 16))[:lost]


def lost_to_meddling(reason: RefusalReason) -> bool:
    """Whether a broker that has each attempt refused for bytes it changed gets rid of an update."""
    update = pending(size=1900)
    line, told = Line(new=update), []
    for _ in range(40):
        line.look()
        told += events(line.subject.nack(nack(update, reason), line.now_s))
        line.subject.nack(nack(update, reason), line.now_s)
        line.now_s = line.subject.next_wake_s()
    if len(line.subject):
        assert told == ["update_garbled"]  # said once, not forty times
        began_s = line.attempts_s()
        assert len(began_s) >= 20
        assert all(after - before >= FIRST_RETRY_S / 2 for before, after in pairwise(began_s))
    return not len(line.subject)


@pytest.mark.parametrize("reason", sorted(RETRYABLE))
def test_bytes_that_were_changed_on_the_way_do_not_lose_an_update(reason: RefusalReason) -> None:
    assert not lost_to_meddling(reason)


def test_a_device_that_takes_every_refusal_for_final_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "RETRYABLE", frozenset())
    assert lost_to_meddling(RefusalReason.MALFORMED)


def test_the_reasons_are_divided_as_the_protocol_page_says() -> None:
    assert sorted(reason.value for reason in RETRYABLE) == ["bad_signature", "malformed", "oversized", "unsealable"]


@pytest.mark.parametrize("reason", [RefusalReason.THROTTLED, RefusalReason.QUARANTINED])
@given(size=st.sampled_from([400, 1900, 30_000]), at_s=st.floats(0, 100))
@settings(max_examples=30)
def test_a_device_that_is_told_to_wait_sends_nothing_for_minutes_and_then_goes_on(
    size: int, at_s: float, reason: RefusalReason
) -> None:
    update = pending(size=size)
    line = Line(new=update, seconds_a_message=0.3)
    line.until(at_s)
    (note,) = line.subject.nack(nack(update, reason, detail="9 transfers"), line.now_s)
    assert isinstance(note, Note)
    assert (note.event, note.fields["detail"]) == (f"update_{reason.value}", "9 transfers")
    throttled_s = line.now_s
    assert published(line.until(throttled_s + THROTTLED_S / 2 - 0.001)) == []
    # Neither a new connection nor a chunk that is asked for has it send earlier.
    line.subject.connected(PACKET)
    line.subject.nack(nack(update, RefusalReason.TRUNCATED, missing=b"\x01"), line.now_s)
    assert published(line.look()) == []
    line.until(throttled_s + THROTTLED_S + 40.0)
    assert line.attempts_s()[-1] >= throttled_s + THROTTLED_S / 2
    assert len(line.subject) == 1
    assert events(line.subject.receipt(receipt_for(update))) == ["update_delivered"]


def test_a_throttled_device_asks_about_a_large_update_before_it_sends_all_of_it_again() -> None:
    update = pending(size=30_000)
    line = Line(new=update)
    line.until(1.0)
    line.subject.nack(nack(update, RefusalReason.THROTTLED), line.now_s)
    line.log.clear()
    line.until(1.0 + THROTTLED_S)
    first_s, *_ = line.attempts_s()
    assert [index for at_s, index in line.sent() if at_s < first_s + ANSWER_WITHIN_S] == [59]


def attempts_under_throttling(*, hours: float) -> int:
    """Attempts while the same NACK is replayed every second."""
    update = pending(size=1900)
    line = Line(new=update)
    for second in range(int(3600 * hours)):
        line.now_s = float(second)
        line.look()
        line.subject.nack(nack(update, RefusalReason.THROTTLED), line.now_s)
    return len(line.attempts_s()) if len(line.subject) else 0


def test_replayed_throttling_slows_a_device_down_and_silences_it_not() -> None:
    assert 2 * 6 <= attempts_under_throttling(hours=2.0) <= 2 * 12 + 1


def test_a_device_that_goes_on_at_its_own_pace_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deliveries, "_slow_down", lambda *_: [])
    assert attempts_under_throttling(hours=2.0) > 2 * 12 + 1


def test_a_replayed_refusal_does_not_put_the_next_attempt_off_for_ever() -> None:
    update = pending(size=1900)
    line = Line(new=update)
    for second in range(3600):
        line.now_s = float(second)
        line.look()
        line.subject.nack(nack(update, RefusalReason.MALFORMED), line.now_s)
    assert len(line.attempts_s()) >= 10


def offers_under_a_clock_that_is_ahead() -> int:
    """How often an update is offered by a device whose clock says that its round was over years ago."""
    line = Line(pending(size=400), now_s=YEARS_S)
    actions = line.until(YEARS_S + 86400.0)
    assert isinstance(actions[-1], Note)
    assert len(line.attempts_s()) == sum(isinstance(action, Publish) for action in actions)
    last_s, gone_s = line.attempts_s()[-1], line.log[-1][0]
    assert gone_s - last_s >= LONGEST_RETRY_S / 2  # the last offer had its time, too
    return len(line.attempts_s())


def test_the_clock_alone_throws_nothing_away() -> None:
    assert offers_under_a_clock_that_is_ahead() == LEAST_ATTEMPTS


def test_a_device_that_believes_its_clock_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "LEAST_ATTEMPTS", 0)
    with pytest.raises((AssertionError, IndexError)):
        offers_under_a_clock_that_is_ahead()


def after_the_clock_was_set_back(update: PendingUpdate) -> Line:
    """A delivery in the middle of its back-off when the clock jumps back by ten years."""
    line = Line(new=update, now_s=2 * YEARS_S)
    line.until(2 * YEARS_S + 100.0)
    line.subject.nack(nack(update, RefusalReason.TRUNCATED, missing=b"\x0f"), line.now_s)
    assert indices(line.until(line.now_s + 1.0)) == [0, 1, 2, 3]
    line.log.clear()
    line.now_s = YEARS_S
    return line


def offers_after_the_clock_was_set_back() -> int:
    """Attempts within an hour."""
    line = after_the_clock_was_set_back(some_update(1, 1900, deadline_s=1e11))
    line.until(YEARS_S + 3600.0)
    return len(line.attempts_s())


def test_a_clock_that_is_set_back_stalls_no_delivery() -> None:
    assert offers_after_the_clock_was_set_back() >= 3600.0 / LONGEST_RETRY_S - 1


def test_a_clock_that_is_set_back_leaves_no_nack_unanswered() -> None:
    update = some_update(1, 1900, deadline_s=1e11)
    line = after_the_clock_was_set_back(update)
    line.subject.nack(nack(update, RefusalReason.TRUNCATED, missing=b"\x01"), line.now_s)
    assert indices(line.look()) == [0]


def test_a_delivery_that_waits_for_the_years_to_pass_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "LONGEST_RETRY_S", math.inf)  # what a waiting time is held against
    assert offers_after_the_clock_was_set_back() == 0


def held_chunk_bytes(subject: Deliveries) -> int:
    return sum(len(chunk.data) for chunk in subject._cut[1])


def test_the_chunks_of_one_update_at_most_are_held_beside_the_outbox() -> None:
    updates = [pending(number, 40_000) for number in range(1, 9)]
    line, most = Line(*updates), 0
    for second in range(2000):
        line.now_s = float(second)
        line.look()
        update = updates[second % 8]
        line.subject.nack(nack(update, RefusalReason.TRUNCATED, missing=missing_bitmap(80, [])), line.now_s)
        most = max(most, held_chunk_bytes(line.subject))
    assert most == 40_000
    line.subject.disconnected()
    assert held_chunk_bytes(line.subject) == 0


steps = st.lists(
    st.tuples(
        st.sampled_from(["tick", "wake", "connect", "disconnect", "receipt", "nack", "add", "back", "ahead"]),
        st.integers(0, 9),
        st.sampled_from(sorted(RefusalReason)),
    ),
    max_size=60,
)


def check_wakes(sequence: list[tuple[str, int, RefusalReason]]) -> None:
    """After time has come to what they wanted to wake for, they sleep on: no busy loop, whatever came before."""
    line = Line(pending(1), pending(2, 30_000), packet=PACKET, seconds_a_message=None, now_s=YEARS_S)
    for kind, number, reason in sequence:
        subject, update = line.subject, pending(number)
        backlog = number if number < 8 else 0
        match kind:
            case "tick":
                line.now_s += 10.0 ** (number - 4)
            case "wake":
                line.now_s = min(max(line.now_s, subject.next_wake_s()), 3 * YEARS_S)
            case "connect":
                subject.connected([None, PACKET, 5000][number % 3])
            case "disconnect":
                subject.disconnected()
            case "receipt":
                subject.receipt(receipt_for(update))
            case "nack":
                subject.nack(nack(update, reason, missing=bytes([number])), line.now_s)
            case "add":
                subject.add(update)
            case "back" | "ahead":
                line.now_s += (-1.0 if kind == "back" else 1.0) * 10.0**number
        subject.due(line.now_s, backlog=backlog)
        assert subject.next_wake_s() > line.now_s


@given(sequence=steps)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_whoever_wakes_for_a_delivery_may_sleep_again(sequence: list[tuple[str, int, RefusalReason]]) -> None:
    check_wakes(sequence)


def test_a_delivery_that_spins_while_the_line_is_busy_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "FIRST_RETRY_S", 0.0)  # how soon a busy line is looked at again
    with pytest.raises(AssertionError):
        check_wakes([("connect", 1, RefusalReason.MALFORMED), ("add", 5, RefusalReason.MALFORMED)])
