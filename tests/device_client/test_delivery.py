"""Delivery: the same bytes until the receipt for exactly them, and what each answer of the aggregator does."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client.delivery import (
    ANSWER_WITHIN_S,
    ASK_FIRST_CHUNKS,
    FIRST_RETRY_S,
    GRACE_S,
    LONGEST_EXPIRY_S,
    LONGEST_RETRY_S,
    RETRYABLE,
    WINDOW,
    Deliveries,
)
from device_client.events import Discard, Note
from fl_protocol.chunking import missing_bitmap
from fl_protocol.errors import LocalMisuseError, RefusalReason
from fl_protocol.topics import update_label
from tests.device_client.delivery_line import (
    DEADLINE_S,
    PACKET,
    Line,
    events,
    indices,
    nack,
    pending,
    published,
    reassembled,
)
from tests.device_client.ports import TENANT
from tests.device_client.session_driver import receipt_for, seeded, some_update

FINAL = sorted(
    set(RefusalReason) - RETRYABLE - {RefusalReason.TRUNCATED, RefusalReason.THROTTLED, RefusalReason.QUARANTINED}
)
LABEL = update_label(pending().update_id)


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
        Note("update_delivered", {"update": LABEL, "round": 1}),
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
    assert indices(line.until(43.5)) == list(range(59))
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
    asked = {"update": update.update_id[:6].hex(), "round": 1, "missing": len({*range(6)} - {*present})}
    told = line.subject.nack(nack(update, RefusalReason.TRUNCATED, missing=missing_bitmap(6, present)), 1.0)
    assert told == [Note("update_incomplete", asked)]
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


@pytest.mark.parametrize("reason", FINAL)
def test_a_final_nack_ends_the_delivery_and_says_why(reason: RefusalReason) -> None:
    update = pending()
    line = Line(update, pending(2))
    actions = line.subject.nack(nack(update, reason, detail="why"), 1.0)
    assert actions == [
        Discard(update.update_id, 1, "refused"),
        Note("update_refused", {"update": LABEL, "round": 1, "reason": reason.value, "detail": "why"}),
    ]
    assert len(line.subject) == 1


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
    expired = Note("update_expired", {"update": LABEL, "round": 1})
    assert line.until(late_s)[-2:] == [Discard(update.update_id, 1, "expired"), expired]
    assert line.subject.next_wake_s() == math.inf


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
