"""Delivery: the same bytes until the receipt for exactly them, with back-off, within the grace time."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client.delivery import FIRST_RETRY_S, GRACE_S, LONGEST_RETRY_S, Deliveries
from device_client.events import Action, Discard, Note, PendingUpdate, Publish
from fl_protocol.chunking import Reassembler, missing_bitmap
from fl_protocol.errors import LocalMisuseError, RefusalReason
from fl_protocol.messages import ChunkMsg, NackMsg, ReceiptMsg, decode
from fl_protocol.topics import parse_upload_topic
from tests.device_client.ports import DEVICE, TASK, TENANT
from tests.virtual_fleet import SeededEntropy

DEADLINE_S = 10_000.0
PACKET = 1024 + 256 + 500  # chunks of 500 bytes


def pending(number: int = 1, size: int = 3000) -> PendingUpdate:
    envelope = hashlib.shake_256(bytes([number])).digest(size)
    return PendingUpdate(
        update_id=bytes([number]) * 16,
        task=TASK,
        round=number,
        envelope=envelope,
        sealed_digest=hashlib.sha256(envelope).digest(),
        deadline_s=DEADLINE_S,
    )


def deliveries(*outbox: PendingUpdate, seed: str = "jitter") -> Deliveries:
    return Deliveries(tenant=TENANT, device=DEVICE, entropy=SeededEntropy(seed), outbox=outbox)


def receipt(update: PendingUpdate, **changes: object) -> ReceiptMsg:
    fields: dict[str, object] = {
        "tenant": TENANT,
        "task": TASK,
        "round": update.round,
        "device": DEVICE,
        "update_id": update.update_id,
        "sealed_digest": update.sealed_digest,
        "accepted_s": 1.0,
    }
    return ReceiptMsg(**{**fields, **changes})  # type: ignore[arg-type]


def nack(update: PendingUpdate, reason: RefusalReason, **changes: object) -> NackMsg:
    fields = {"tenant": TENANT, "device": DEVICE, "update_id": update.update_id, "reason": reason}
    return NackMsg(**{**fields, **changes})  # type: ignore[arg-type]


def published(actions: list[Action]) -> list[Publish]:
    return [action for action in actions if isinstance(action, Publish)]


def events(actions: list[Action]) -> list[str]:
    return [action.event for action in actions if isinstance(action, Note)]


def reassembled(messages: list[Publish]) -> bytes | None:
    whole, reassembler = None, Reassembler()
    for message in messages:
        chunk = decode(message.payload, ChunkMsg)
        topic = parse_upload_topic(message.topic)
        assert (topic.device, topic.update_id, topic.chunk_index) == (DEVICE, chunk.transfer_id, chunk.index)
        whole = reassembler.accept(chunk, 0.0) or whole
    return whole


def test_every_resend_carries_the_same_bytes_until_the_receipt() -> None:
    update, subject, now_s = pending(), deliveries(), 0.0
    subject.add(update)
    assert subject.due(now_s) == []  # not connected
    assert subject.next_wake_s() is None
    subject.connected(PACKET)
    sent = []
    for _ in range(6):
        now_s = max(now_s, subject.next_wake_s() or 0.0)
        messages = published(subject.due(now_s))
        assert len(messages) == 6
        sent.append([(message.topic, message.payload) for message in messages])
        assert reassembled(messages) == update.envelope
    assert all(again == sent[0] for again in sent)
    assert events(subject.receipt(receipt(update))) == ["update_delivered"]
    assert subject.due(now_s + 1e4) == []
    assert len(subject) == 0


def test_the_back_off_doubles_with_jitter_and_stays_bounded() -> None:
    waits: dict[str, list[float]] = {}
    for seed in ("a", "b", "c"):
        subject, now_s = deliveries(pending(), seed=seed), 0.0
        subject.connected(None)
        waits[seed] = []
        for _ in range(12):
            subject.due(now_s)
            wake_s = subject.next_wake_s()
            assert wake_s is not None
            waits[seed].append(wake_s - now_s)
            assert subject.due(wake_s - 1e-6) == []
            now_s = wake_s
        for attempt, wait in enumerate(waits[seed]):
            longest = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0**attempt)
            assert longest / 2 <= wait <= longest
    assert len({tuple(wait) for wait in waits.values()}) == 3


def test_a_reconnection_sends_everything_at_once() -> None:
    subject = deliveries(pending(1), pending(2))
    subject.connected(None)
    assert len(published(subject.due(0.0))) == 2
    assert published(subject.due(1.0)) == []
    subject.disconnected()
    assert subject.due(5000.0) == []
    subject.connected(None)
    assert len(published(subject.due(1.5))) == 2


@pytest.mark.parametrize(
    "changes", [{"sealed_digest": b"\x00" * 32}, {"device": "watch-9"}, {"update_id": b"\x99" * 16}]
)
def test_a_receipt_for_anything_else_changes_nothing(changes: dict[str, object]) -> None:
    update = pending()
    subject = deliveries(update)
    actions = subject.receipt(receipt(update, **changes))
    assert not any(isinstance(action, Discard) for action in actions)
    assert len(subject) == 1


def test_a_second_receipt_is_ignored() -> None:
    update = pending()
    subject = deliveries(update)
    assert subject.receipt(receipt(update))[0] == Discard(update.update_id)
    assert subject.receipt(receipt(update)) == []


@given(present=st.sets(st.integers(0, 5)))
@settings(max_examples=30, deadline=None)
def test_a_nack_for_missing_chunks_sends_only_those(present: set[int]) -> None:
    update = pending()
    subject = deliveries(update)
    subject.connected(PACKET)
    first = published(subject.due(0.0))
    again = published(subject.nack(nack(update, RefusalReason.TRUNCATED, missing=missing_bitmap(6, present)), 1.0))
    wanted = [index for index in range(6) if index not in present]
    assert [(m.topic, m.payload) for m in again] == [(first[i].topic, first[i].payload) for i in wanted]
    assert len(subject) == 1


@given(missing=st.binary(max_size=64))
@settings(max_examples=50, deadline=None)
def test_a_nack_asking_for_chunks_that_never_were_is_harmless(missing: bytes) -> None:
    update = pending()
    subject = deliveries(update)
    assert subject.nack(nack(update, RefusalReason.TRUNCATED, missing=missing), 1.0) == []  # not connected
    subject.connected(PACKET)
    assert len(published(subject.nack(nack(update, RefusalReason.TRUNCATED, missing=missing), 1.0))) <= 6


def test_a_replayed_nack_is_answered_once_in_a_while_only() -> None:
    update = pending()
    subject = deliveries(update)
    subject.connected(PACKET)
    subject.due(0.0)
    asking = nack(update, RefusalReason.TRUNCATED, missing=missing_bitmap(6, []))
    sent = [len(published(subject.nack(asking, 1.0 + second / 10))) for second in range(100)]
    assert sent[0] == 6
    assert sum(sent) == 6 * 2  # at 1.0 s and FIRST_RETRY_S later, not a hundred times
    assert sent.index(6, 1) == int(10 * FIRST_RETRY_S)


@pytest.mark.parametrize("reason", [reason for reason in RefusalReason if reason is not RefusalReason.TRUNCATED])
def test_every_other_nack_is_final(reason: RefusalReason) -> None:
    update = pending()
    subject = deliveries(update, pending(2))
    actions = subject.nack(nack(update, reason, detail="why"), 1.0)
    assert actions[0] == Discard(update.update_id)
    assert isinstance(actions[1], Note)
    assert actions[1].fields == {"round": 1, "reason": reason.value, "detail": "why"}
    assert len(subject) == 1


def test_a_nack_for_another_device_is_ignored() -> None:
    update = pending()
    subject = deliveries(update)
    assert subject.nack(nack(update, RefusalReason.MALFORMED, device="watch-9"), 1.0) == []
    assert len(subject) == 1


def test_an_update_is_offered_for_the_grace_time_and_then_given_up() -> None:
    update = pending()
    subject = deliveries(update)
    subject.connected(None)
    late = published(subject.due(DEADLINE_S + GRACE_S - 1))
    assert [message.expires_s for message in late] == [1]
    actions = subject.due(DEADLINE_S + GRACE_S + 1)
    assert actions[0] == Discard(update.update_id)
    assert events(actions) == ["update_expired"]
    assert subject.next_wake_s() is None


def test_messages_expire_with_the_round() -> None:
    subject = deliveries(pending())
    subject.connected(None)
    assert {message.expires_s for message in published(subject.due(DEADLINE_S - 77.5))} == {77}


def test_a_server_that_takes_no_chunk_is_refused_and_nothing_is_sent() -> None:
    subject = deliveries(pending())
    with pytest.raises(LocalMisuseError, match="server_maximum_packet_bytes"):
        subject.connected(100)
    assert subject.due(0.0) == []


def test_an_update_cut_anew_after_a_reconnection_is_the_same_update() -> None:
    update = pending()
    subject = deliveries(update)
    for packet, count in ((PACKET, 6), (None, 1), (PACKET + 100, 5)):
        subject.connected(packet)
        messages = published(subject.due(0.0))
        assert len(messages) == count
        assert reassembled(messages) == update.envelope
