"""Delivery: the same bytes until the receipt for exactly them; no faster than the line and the back-off allow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client import delivery
from device_client.delivery import (
    ANSWER_WITHIN_S,
    ASK_FIRST_CHUNKS,
    FIRST_RETRY_S,
    GRACE_S,
    LEAST_ATTEMPTS,
    LONGEST_EXPIRY_S,
    LONGEST_RETRY_S,
    RETRYABLE,
    WINDOW,
    Deliveries,
)
from device_client.events import Action, Discard, Note, PendingUpdate, Publish
from fl_protocol.chunking import Reassembler, missing_bitmap
from fl_protocol.errors import LocalMisuseError, RefusalReason
from fl_protocol.messages import ChunkMsg, NackMsg, decode
from fl_protocol.topics import parse_upload_topic
from tests.device_client.ports import DEVICE, TENANT
from tests.device_client.session_driver import receipt_for, seeded, some_update

DEADLINE_S = 10_000.0
YEARS_S = 10 * 365.25 * 86400.0
PACKET = 1024 + 256 + 500  # chunks of 500 bytes
FINAL = [reason for reason in RefusalReason if reason not in RETRYABLE and reason is not RefusalReason.TRUNCATED]


def pending(number: int = 1, size: int = 3000) -> PendingUpdate:
    return some_update(number, size, deadline_s=DEADLINE_S)


def nack(update: PendingUpdate, reason: RefusalReason, **changes: object) -> NackMsg:
    fields = {"tenant": TENANT, "device": DEVICE, "update_id": update.update_id, "reason": reason}
    return NackMsg(**{**fields, **changes})  # type: ignore[arg-type]


def published(actions: list[Action]) -> list[Publish]:
    return [action for action in actions if isinstance(action, Publish)]


def events(actions: list[Action]) -> list[str]:
    return [action.event for action in actions if isinstance(action, Note)]


def indices(actions: list[Action]) -> list[int]:
    return [parse_upload_topic(message.topic).chunk_index for message in published(actions)]


def reassembled(messages: list[Publish]) -> bytes | None:
    whole, reassembler = None, Reassembler()
    for message in messages:
        chunk = decode(message.payload, ChunkMsg)
        topic = parse_upload_topic(message.topic)
        assert (topic.device, topic.update_id, topic.chunk_index) == (DEVICE, chunk.transfer_id, chunk.index)
        whole = reassembler.accept(chunk, 0.0) or whole
    return whole


class Line:
    """Deliveries on a line that takes a while for each message; time passes as it is told.

    Args:
        seconds_a_message: until the broker has acknowledged one; None for a broker that never does.
    """

    def __init__(
        self,
        *outbox: PendingUpdate,
        new: PendingUpdate | None = None,
        packet: int | None = PACKET,
        seconds_a_message: float | None = 0.0,
        subject: type[Deliveries] = Deliveries,
        seed: str = "jitter",
        now_s: float = 0.0,
    ) -> None:
        self.subject = subject(tenant=TENANT, entropy=seeded(seed), outbox=outbox)
        if new is not None:
            self.subject.add(new)
        self.now_s, self._each_s = now_s, seconds_a_message
        self._acks_s: list[float] = []
        self.log: list[tuple[float, Action]] = []
        self.most_waiting = 0
        self.subject.connected(packet)

    @property
    def backlog(self) -> int:
        return len(self._acks_s)

    def next_s(self) -> float:
        """When something happens: an acknowledgement, or what the deliveries want to wake for."""
        return min([self.subject.next_wake_s(), *self._acks_s[:1]])

    def look(self) -> list[Action]:
        """Let them do what is due now."""
        while self._acks_s and self._acks_s[0] <= self.now_s:
            self._acks_s.pop(0)
        actions = self.subject.due(self.now_s, backlog=self.backlog)
        for _ in published(actions):
            last_s = self._acks_s[-1] if self._acks_s else self.now_s
            self._acks_s.append(math.inf if self._each_s is None else last_s + self._each_s)
        self.most_waiting = max(self.most_waiting, self.backlog)
        self.log += [(self.now_s, action) for action in actions]
        return actions

    def until(self, end_s: float) -> list[Action]:
        """Live until then."""
        before = len(self.log)
        self.look()
        while (at_s := self.next_s()) <= end_s:
            self.now_s = max(self.now_s, at_s)
            self.look()
        self.now_s = max(self.now_s, end_s)
        return [action for _, action in self.log[before:]]

    def sent(self) -> Iterator[tuple[float, int]]:
        """When which chunk was handed over."""
        for at_s, action in self.log:
            if isinstance(action, Publish):
                yield at_s, parse_upload_topic(action.topic).chunk_index

    def attempts_s(self) -> list[float]:
        return [
            at_s
            for at_s, action in self.log
            if isinstance(action, Note) and action.event in {"update_sent", "update_asked_about"}
        ]


def test_every_resend_carries_the_same_bytes_until_the_receipt() -> None:
    update = pending(size=1900)  # four chunks: it is never asked about
    line = Line(new=update)
    sent = []
    for _ in range(6):
        line.now_s = max(line.now_s, line.subject.next_wake_s())
        messages = published(line.look())
        assert len(messages) == 4
        sent.append([(message.topic, message.payload) for message in messages])
        assert reassembled(messages) == update.envelope
    assert all(again == sent[0] for again in sent)
    assert line.subject.receipt(receipt_for(update)) == [
        Discard(update.update_id, 1, "delivered"),
        Note("update_delivered", {"round": 1}),
    ]
    assert line.until(1e4) == []
    assert len(line.subject) == 0


def test_nothing_is_sent_without_a_connection() -> None:
    subject = Deliveries(tenant=TENANT, entropy=seeded("jitter"), outbox=(pending(),))
    assert subject.due(0.0, backlog=0) == []
    assert subject.next_wake_s() == math.inf
    subject.connected(PACKET)
    assert subject.due(0.0, backlog=0) != []
    subject.disconnected()
    assert subject.due(5000.0, backlog=0) == []
    assert subject.next_wake_s() == math.inf


def test_the_back_off_doubles_with_jitter_and_stays_bounded() -> None:
    waits: dict[str, list[float]] = {}
    for seed in ("a", "b", "c"):
        line = Line(pending(), packet=None, seed=seed)
        line.until(3600.0)
        began_s = line.attempts_s()
        waits[seed] = [after - before for before, after in pairwise(began_s)]
        assert len(waits[seed]) >= 12
        for attempt, wait in enumerate(waits[seed]):
            longest = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0**attempt)
            assert longest / 2 <= wait <= longest + 1e-6
    assert len({tuple(wait) for wait in waits.values()}) == 3


def test_a_reconnection_sends_everything_at_once() -> None:
    line = Line(pending(1), pending(2), packet=None)
    assert len(published(line.until(0.5))) == 2
    line.subject.disconnected()
    assert line.until(5000.0) == []
    line.subject.connected(None)
    assert len(published(line.until(5000.5))) == 2


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
    left_s = [at_s + 4 * seconds_a_message for at_s in began_s]
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


def test_a_large_update_is_asked_about_when_it_may_be_there_in_part() -> None:
    """After a restart: the last chunk alone, and if that brings no answer, the whole; then asked about again."""
    line = Line(pending(size=3000))
    assert indices(line.until(1.0)) == [5]
    assert line.subject.next_wake_s() == pytest.approx(ANSWER_WITHIN_S, abs=1.0)
    assert indices(line.until(ANSWER_WITHIN_S + 1.5)) == [0, 1, 2, 3, 4, 5]
    assert indices(line.until(line.subject.next_wake_s())) == [5]


@pytest.mark.parametrize("chunks", [1, ASK_FIRST_CHUNKS])
def test_a_small_update_is_sent_at_once(chunks: int) -> None:
    assert indices(Line(pending(size=500 * chunks)).until(1.0)) == list(range(chunks))


def test_a_new_large_update_is_sent_at_once_and_asked_about_after_a_reconnection() -> None:
    line = Line(new=pending(size=3000))
    assert indices(line.until(1.0)) == list(range(6))
    line.subject.disconnected()
    line.subject.connected(PACKET)
    assert indices(line.until(2.0)) == [5]


def test_only_what_the_answer_names_is_sent_and_then_it_is_asked_about_again() -> None:
    update = pending(size=5000)
    line = Line(update)
    line.until(10.0)
    missing = missing_bitmap(10, {0, 1, 2, 5, 9})
    line.subject.nack(nack(update, RefusalReason.TRUNCATED, missing=missing), line.now_s)
    assert indices(line.look()) == [3, 4, 6, 7, 8]
    assert indices(line.until(line.subject.next_wake_s() + FIRST_RETRY_S)) == [9]


def test_an_answer_is_not_lost_in_an_update_that_fills_several_windows() -> None:
    update = pending(size=30_000)  # sixty chunks
    line = Line(update, seconds_a_message=0.5)
    line.until(12.0)
    line.subject.nack(nack(update, RefusalReason.TRUNCATED, missing=missing_bitmap(60, {59})), line.now_s)
    assert indices(line.until(45.0)) == list(range(59))
    assert line.most_waiting <= WINDOW


@pytest.mark.parametrize(
    "changes", [{"sealed_digest": b"\x00" * 32}, {"device": "watch-9"}, {"update_id": b"\x99" * 16}]
)
def test_a_receipt_for_anything_else_changes_nothing(changes: dict[str, object]) -> None:
    update = pending()
    line = Line(update)
    actions = line.subject.receipt(receipt_for(update, **changes))
    assert not any(isinstance(action, Discard) for action in actions)
    assert events(actions) == ([] if "update_id" in changes else ["receipt_refused"])
    assert len(line.subject) == 1


def test_a_second_receipt_is_ignored() -> None:
    update = pending()
    line = Line(update)
    assert line.subject.receipt(receipt_for(update))[0] == Discard(update.update_id, 1, "delivered")
    assert line.subject.receipt(receipt_for(update)) == []


@given(present=st.sets(st.integers(0, 5)))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_nack_for_missing_chunks_sends_only_those(present: set[int]) -> None:
    update = pending()
    line = Line(new=update)
    first = published(line.look())
    line.now_s = 1.0
    assert line.subject.nack(nack(update, RefusalReason.TRUNCATED, missing=missing_bitmap(6, present)), 1.0) == []
    again = published(line.look())
    wanted = [index for index in range(6) if index not in present]
    assert [(m.topic, m.payload) for m in again] == [(first[i].topic, first[i].payload) for i in wanted]
    assert len(line.subject) == 1


@given(missing=st.binary(max_size=8192))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_nack_asking_for_chunks_that_never_were_is_harmless(missing: bytes) -> None:
    update = pending()
    line = Line(update)
    line.look()
    line.subject.nack(nack(update, RefusalReason.TRUNCATED, missing=missing), 1.0)
    line.now_s = 1.0
    assert set(indices(line.look())) <= set(range(6))
    line.subject.disconnected()
    assert line.subject.nack(nack(update, RefusalReason.TRUNCATED, missing=missing), 100.0) == []
    assert line.look() == []


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


@pytest.mark.parametrize("reason", FINAL)
def test_a_final_nack_ends_the_delivery_and_says_why(reason: RefusalReason) -> None:
    update = pending()
    line = Line(update, pending(2))
    actions = line.subject.nack(nack(update, reason, detail="why"), 1.0)
    assert actions == [
        Discard(update.update_id, 1, "refused"),
        Note("update_refused", {"round": 1, "reason": reason.value, "detail": "why"}),
    ]
    assert len(line.subject) == 1


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


def test_a_replayed_refusal_does_not_put_the_next_attempt_off_for_ever() -> None:
    update = pending(size=1900)
    line = Line(new=update)
    for second in range(3600):
        line.now_s = float(second)
        line.look()
        line.subject.nack(nack(update, RefusalReason.MALFORMED), line.now_s)
    assert len(line.attempts_s()) >= 10


def test_a_nack_for_another_device_is_ignored() -> None:
    update = pending()
    line = Line(update)
    for reason in RefusalReason:
        assert line.subject.nack(nack(update, reason, device="watch-9"), 1.0) == []
    assert len(line.subject) == 1


def test_an_update_is_offered_for_the_grace_time_and_then_given_up() -> None:
    update = pending()
    line = Line(update, packet=None)
    line.until(DEADLINE_S + GRACE_S)
    assert len(line.subject) == 1
    late_s = DEADLINE_S + GRACE_S + LONGEST_RETRY_S
    assert line.until(late_s)[-2:] == [Discard(update.update_id, 1, "expired"), Note("update_expired", {"round": 1})]
    assert line.subject.next_wake_s() == math.inf


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


def test_messages_expire_with_the_round() -> None:
    assert {m.expires_s for m in published(Line(pending(), now_s=DEADLINE_S - 77.5).look())} == {77}
    assert {m.expires_s for m in published(Line(pending(), now_s=DEADLINE_S + 5.0).look())} == {1}
    far = some_update(1, deadline_s=1e11)
    assert {m.expires_s for m in published(Line(far).look())} == {LONGEST_EXPIRY_S}
    assert LONGEST_EXPIRY_S < 2**32


def test_a_server_that_takes_no_chunk_is_refused_and_nothing_is_sent() -> None:
    subject = Deliveries(tenant=TENANT, entropy=seeded("jitter"), outbox=(pending(),))
    with pytest.raises(LocalMisuseError, match="server_maximum_packet_bytes"):
        subject.connected(100)
    assert subject.due(0.0, backlog=0) == []


def test_an_update_cut_anew_after_a_reconnection_is_the_same_update() -> None:
    update = pending(size=1900)
    line = Line(update)
    for packet, count in ((PACKET, 4), (None, 1), (PACKET + 100, 4)):
        line.subject.connected(packet)
        messages = published(line.look())
        assert len(messages) == count
        assert reassembled(messages) == update.envelope


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
