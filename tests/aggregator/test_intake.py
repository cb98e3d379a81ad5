"""Uploads: what is admitted, what is refused and why, and that nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from aggregator import intake as intake_module
from aggregator.errors import DatabaseError
from aggregator.ingest import AcceptedUpdate, AdmittedUpdate, OpenRoundKeys, admit, verify_header
from aggregator.intake import FORGET_AFTER_S, RECEIPT_EVERY_S, STALLED_AFTER_S, Intake
from aggregator.store import AggregatorStore
from fl_protocol.chunking import missing_indices, split
from fl_protocol.errors import RefusalReason
from fl_protocol.messages import ChunkMsg, NackMsg, ReceiptMsg, UpdateEnvelopeMsg, UpdateHeaderMsg, decode, encode
from fl_protocol.topics import upload_topic
from fl_protocol.transport import Received
from tests.aggregator.desk import DIGEST, D, Desk, device_key, make_update, messages, values, with_header
from tests.fl_protocol.examples import TENANT

ID = b"\x10" * 16
GOOD = make_update(round=3)
Make = Callable[[], list[Received]]


def garbage() -> list[Received]:
    return [Received(upload_topic(TENANT, "watch-0", ID, 0), b"\x00garbage")]


def whole_is_garbage() -> list[Received]:
    return messages(b"not an envelope")


def wrong_topic() -> list[Received]:
    return messages(GOOD, update_id=b"\x11" * 16)


def wrong_chunk() -> list[Received]:
    chunk = next(split(b"\x12" * 16, GOOD, data_bytes=700))
    return [Received(upload_topic(TENANT, "watch-0", ID, 0), encode(chunk))]


def contradicting_chunks() -> list[Received]:
    second = decode(messages(GOOD)[1].payload, ChunkMsg)
    return [messages(GOOD)[0], Received(messages(GOOD)[1].topic, encode(replace(second, digest=b"\x00" * 32)))]


def altered_chunk() -> list[Received]:
    chunks = [decode(m.payload, ChunkMsg) for m in messages(GOOD)]
    chunks[1] = replace(chunks[1], data=bytes(len(chunks[1].data)))
    return [Received(m.topic, encode(c)) for m, c in zip(messages(GOOD), chunks, strict=True)]


def signed_by_another() -> list[Received]:
    return messages(make_update(round=3, key=device_key("watch-1")))


def for_another_device() -> list[Received]:
    return messages(make_update("watch-1", round=3))


def altered_header() -> list[Received]:
    outer = decode(GOOD, UpdateEnvelopeMsg)
    header = encode(replace(decode(outer.header, UpdateHeaderMsg), round=4))
    return messages(encode(replace(outer, header=header)))


def other_sealed_bytes() -> list[Received]:
    outer = decode(GOOD, UpdateEnvelopeMsg)
    return messages(encode(replace(outer, sealed=outer.sealed[:-1] + b"\x00")))


def sealed_for_another_round() -> list[Received]:
    return messages(with_header(make_update(round=2), device_key("watch-0"), round=3))


def an_older_update_of_another_task() -> list[Received]:
    """What a broker kept from another study of the device; a final refusal would cost it its new update."""
    return messages(make_update(round=3, task="other", update_id=b"\x13" * 16))


def too_few_values() -> list[Received]:
    return messages(make_update(round=3, num_parameters=9, body=bytes(36)))


def not_finite() -> list[Received]:
    return messages(make_update(round=3, body=np.array([np.nan] + [0] * (D - 1), "<f4").tobytes()))


def oversized() -> list[Received]:
    chunk = ChunkMsg(transfer_id=ID, index=0, count=3, total_bytes=3 * 1000, digest=bytes(32), data=bytes(1000))
    raw = encode(chunk).replace(b"\xabtotal_bytes\xcd\x0b\xb8", b"\xabtotal_bytes\xce\x7f\xff\xff\xff")
    return [Received(upload_topic(TENANT, "watch-0", ID, 0), raw)]


BAD: list[tuple[str, Make, RefusalReason]] = [
    ("garbage", garbage, RefusalReason.MALFORMED),
    ("no envelope", whole_is_garbage, RefusalReason.MALFORMED),
    ("another topic", wrong_topic, RefusalReason.MALFORMED),
    ("another transfer", wrong_chunk, RefusalReason.MALFORMED),
    ("contradicting chunks", contradicting_chunks, RefusalReason.MALFORMED),
    ("an altered chunk", altered_chunk, RefusalReason.MALFORMED),
    ("a size beyond the cap", oversized, RefusalReason.MALFORMED),
    ("other sealed bytes", other_sealed_bytes, RefusalReason.MALFORMED),
    ("signed by another device", signed_by_another, RefusalReason.BAD_SIGNATURE),
    ("another device's update", for_another_device, RefusalReason.BAD_SIGNATURE),
    ("an altered header", altered_header, RefusalReason.BAD_SIGNATURE),
    ("another task's update under this one's topic", an_older_update_of_another_task, RefusalReason.MALFORMED),
    ("another task", lambda: messages(make_update(round=3, task="other")), RefusalReason.WRONG_TASK),
    ("another tenant", lambda: messages(make_update(round=3, tenant="other")), RefusalReason.WRONG_TASK),
    ("a round to come", lambda: messages(make_update(round=4)), RefusalReason.WRONG_ROUND),
    ("a round gone by", lambda: messages(make_update(round=2)), RefusalReason.ROUND_CLOSED),
    ("another model", lambda: messages(make_update(round=3, model_digest=b"\x02" * 32)), RefusalReason.WRONG_MODEL),
    ("sealed for another round", sealed_for_another_round, RefusalReason.UNSEALABLE),
    ("too few values", too_few_values, RefusalReason.WRONG_LENGTH),
    ("not finite", not_finite, RefusalReason.NOT_FINITE),
]


@pytest.mark.parametrize(("make", "reason"), [pytest.param(m, r, id=name) for name, m, r in BAD])
def test_a_bad_update_is_refused_for_its_reason_and_the_round_goes_on(
    tmp_path: Path, make: Make, reason: RefusalReason
) -> None:
    desk = Desk(tmp_path)
    assert desk.take(make()) == 0
    assert desk.stored() == []
    (answer,) = desk.said()
    assert isinstance(answer, NackMsg)
    assert (answer.reason, answer.device) == (reason, "watch-0")
    assert desk.store.refusals() == {reason.value: 1}
    # The same device's good update, and another's, are still welcome.
    assert desk.send_good("watch-1") == 1
    assert desk.take(messages(GOOD)) == 1
    assert [type(message) for message in desk.said()] == [ReceiptMsg, ReceiptMsg]
    assert len(desk.stored()) == 2


def test_a_second_update_in_a_round_is_refused(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    assert desk.take(messages(GOOD)) == 1
    desk.said()
    other = make_update(round=3, update_id=b"\x20" * 16, body=values(9.0))
    assert desk.take(messages(other, update_id=b"\x20" * 16)) == 0
    (answer,) = desk.said()
    assert isinstance(answer, NackMsg)
    assert answer.reason is RefusalReason.SECOND_UPDATE
    assert len(desk.stored()) == 1


def test_an_accepted_id_with_other_content_gets_the_receipt_of_what_was_accepted(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.take(messages(GOOD))
    desk.clock.time_s += RECEIPT_EVERY_S
    assert desk.take(messages(make_update(round=3, body=values(9.0)))) == 0
    first, second = desk.said()
    assert first == second
    np.testing.assert_array_equal(desk.stored()[0], np.full(D, 1.0))


@pytest.mark.parametrize("copies", [True, False], ids=["the same sealed bytes", "bytes of its own"])
def test_an_id_that_was_accepted_from_another_device_is_a_replay(tmp_path: Path, *, copies: bool) -> None:
    desk = Desk(tmp_path)
    desk.take(messages(GOOD))
    desk.said()
    envelope = with_header(GOOD, device_key("watch-1"), device="watch-1") if copies else make_update("watch-1", round=3)
    assert desk.take(messages(envelope, "watch-1")) == 0
    (answer,) = desk.said()
    assert isinstance(answer, NackMsg)
    assert (answer.reason, answer.device) == (RefusalReason.REPLAYED, "watch-1")


def test_with_no_round_open_updates_are_refused(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.current = None
    assert desk.take(messages(GOOD)) == 0
    (answer,) = desk.said()
    assert isinstance(answer, NackMsg)
    assert answer.reason is RefusalReason.ROUND_CLOSED


def test_an_unknown_sender_is_counted_and_gets_no_answer(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    assert desk.take(messages(make_update("stranger", round=3), "stranger")) == 0
    assert desk.said() == []
    assert set(desk.store.refusals()) == {"unknown_device"}
    assert desk.intake._transfers == {}


@pytest.mark.parametrize(
    "topic", ["", "fl/v1/clinic/up", "fl/v1/other/up/00/watch-0/00/0", "fl/v1/clinic/up/00/watch-0/zz/0", "é" * 500]
)
def test_a_topic_that_is_none_is_counted_and_gets_no_answer(tmp_path: Path, topic: str) -> None:
    desk = Desk(tmp_path)
    assert desk.take([Received(topic, b"x")]) == 0
    assert desk.said() == []
    assert desk.store.refusals() == {"malformed": 1}


def test_missing_chunks_are_asked_for_and_then_forgotten(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    chunks = messages(GOOD)
    assert desk.take([chunks[0]]) == 0
    desk.intake.ask_for_missing_chunks()
    assert desk.said() == []
    desk.clock.time_s += STALLED_AFTER_S + 1
    desk.intake.ask_for_missing_chunks()
    desk.intake.ask_for_missing_chunks()
    (answer,) = desk.said()
    assert isinstance(answer, NackMsg)
    assert answer.reason is RefusalReason.TRUNCATED
    assert missing_indices(answer.missing, len(chunks)) == list(range(1, len(chunks)))
    assert desk.take(chunks[1:]) == 1
    desk.intake.ask_for_missing_chunks()
    assert [type(message) for message in desk.said()] == [ReceiptMsg]
    assert desk.intake._transfers == {}
    # One that never completes is asked for a while and then dropped.
    second = messages(make_update("watch-2", round=3), "watch-2")
    desk.take(second[:1])
    for _ in range(40):
        desk.clock.time_s += STALLED_AFTER_S
        desk.intake.ask_for_missing_chunks()
    assert 5 <= len(desk.said()) <= FORGET_AFTER_S / STALLED_AFTER_S + 1
    assert desk.intake._transfers == {}
    assert desk.intake._nacked_s == {}


class FailingStore(AggregatorStore):
    """A database whose disk is full."""

    def transaction(self) -> object:  # type: ignore[override]
        raise DatabaseError("the database does not take this change: disk full")


def test_a_failing_database_sends_no_receipt_and_raises_nothing(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    true_store = desk.intake.store
    for failing in (True, False):
        if failing:
            desk.intake.store = FailingStore(f"sqlite:///{tmp_path / 'aggregator.db'}", "watch")
        else:
            desk.intake.store = true_store
        assert desk.take(messages(GOOD)) == (0 if failing else 1)
        assert [type(message) for message in desk.said()] == ([] if failing else [ReceiptMsg])
    assert desk.journal.named("store_failed")


# What no correct intake may break, and broken copies that break it.


def check_duplicates_get_a_receipt_and_count_once(make: Callable[..., Intake], folder: Path) -> None:
    desk = Desk(folder, make)
    assert desk.take(messages(GOOD)) == 1
    for again in (messages(GOOD), messages(GOOD, data_bytes=500), messages(GOOD)):  # cut anew after a reconnection
        desk.clock.time_s += RECEIPT_EVERY_S
        assert desk.take(again) == 0
        desk.current = None  # and also after the round is closed
    receipts = desk.said()
    assert len(receipts) == 4
    assert len({encode(receipt) for receipt in receipts}) == 1
    assert len(desk.stored()) == 1


def check_only_the_registered_key_may_send(make: Callable[..., Intake], folder: Path) -> None:
    desk = Desk(folder, make)
    assert desk.take(signed_by_another()) == 0
    assert desk.stored() == []
    assert not [message for message in desk.said() if isinstance(message, ReceiptMsg)]


def check_a_receipt_means_committed(make: Callable[..., Intake], folder: Path) -> None:
    desk = Desk(folder, make)

    def failing(*_arguments: object, **_fields: object) -> None:
        raise DatabaseError("the database does not take this change: disk full")

    desk.store.add_update = failing  # type: ignore[method-assign]
    desk.take(messages(GOOD))
    assert desk.said() == []


CHECKS = [
    check_duplicates_get_a_receipt_and_count_once,
    check_only_the_registered_key_may_send,
    check_a_receipt_means_committed,
]


class ForgetfulIntake(Intake):
    """Broken: never recognises what it accepted before."""

    def take(self, message: Received, current: OpenRoundKeys | None) -> bool:
        self.store.accepted = lambda update_id: None  # type: ignore[method-assign]
        self.store.has_update_from = lambda device, round_number: False  # type: ignore[method-assign]
        return super().take(message, current)


class TrustingIntake(Intake):
    """Broken: believes every header."""

    def take(self, message: Received, current: OpenRoundKeys | None) -> bool:
        true_verify = verify_header

        def believe(whole: bytes, **_expected: object) -> tuple[UpdateHeaderMsg, bytes]:
            envelope = decode(whole, UpdateEnvelopeMsg)
            return decode(envelope.header, UpdateHeaderMsg), envelope.sealed

        intake_module.verify_header = believe  # type: ignore[attr-defined]
        try:
            return super().take(message, current)
        finally:
            intake_module.verify_header = true_verify  # type: ignore[attr-defined]


class HastyIntake(Intake):
    """Broken: says thank you before it has put the update away."""

    def take(self, message: Received, current: OpenRoundKeys | None) -> bool:
        true_admit = admit

        def thank_first(header: UpdateHeaderMsg, sealed: bytes, **rest: object) -> object:
            decision = true_admit(header, sealed, **rest)  # type: ignore[arg-type]
            if isinstance(decision, AdmittedUpdate):
                sealed_digest, now_s = header.sealed_digest, self.now_s()
                self._receipt(AcceptedUpdate(header.update_id, header.device, header.round, sealed_digest, now_s))
            return decision

        intake_module.admit = thank_first  # type: ignore[attr-defined, assignment]
        try:
            return super().take(message, current)
        finally:
            intake_module.admit = true_admit  # type: ignore[attr-defined]


@pytest.mark.parametrize("check", CHECKS)
def test_the_intake_passes(check: Callable[[Callable[..., Intake], Path], None], tmp_path: Path) -> None:
    check(Intake, tmp_path)


@pytest.mark.parametrize(
    ("check", "broken"), list(zip(CHECKS, [ForgetfulIntake, TrustingIntake, HastyIntake], strict=True))
)
def test_a_broken_intake_is_caught(
    check: Callable[[Callable[..., Intake], Path], None], broken: Callable[..., Intake], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        check(broken, tmp_path)


def test_a_device_removed_and_registered_anew_sends_with_its_new_key(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.store.add_device("watch-0", device_key("watch-4").public_key().public_bytes_raw(), 1.0)
    assert desk.take(messages(GOOD)) == 0
    assert desk.take(messages(make_update(round=3, key=device_key("watch-4")))) == 1


def test_the_values_that_are_stored_are_the_values_that_were_sealed(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    sent = np.random.default_rng(0).normal(size=D).astype("<f4")
    desk.take(messages(make_update(round=3, body=sent.tobytes())))
    np.testing.assert_array_equal(desk.stored()[0], sent)
    assert desk.store.model(0).digest == DIGEST
