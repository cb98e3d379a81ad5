"""Uploads: what is taken, what is refused and why, and that nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from sqlalchemy import insert

from aggregator.batches import FULL_BATCH
from aggregator.errors import BlobError, DatabaseError
from aggregator.ingest import RoundInForce, TaskInForce, open_sealed, place, verify_header
from aggregator.intake import (
    FORGET_AFTER_S,
    MOST_HELD_MESSAGES,
    MOST_HELD_MESSAGES_OF_WHOLE,
    MOST_MESSAGES_OF_ONE,
    STALLED_AFTER_S,
    Intake,
    IntakeLimits,
)
from aggregator.register_cache import KNOWN_FOR_S
from aggregator.store import schema
from aggregator.store.devices import RegisteredKey
from aggregator.store.updates import AcceptedUpdate
from fl_protocol.chunking import missing_indices, split
from fl_protocol.errors import RefusalReason, RefusedError
from fl_protocol.messages import ChunkMsg, ReceiptMsg, UpdateEnvelopeMsg, UpdateHeaderMsg, decode, encode
from fl_protocol.topics import upload_topic
from fl_protocol.transport import Received
from tests.aggregator.desk import (
    DEVICES,
    DIGEST,
    ID,
    ROUND_KEY,
    D,
    Desk,
    a_desk,
    broken_committer,
    built_with,
    device_key,
    id_of,
    make_update,
    messages,
    reasons,
    sum_of,
    values,
    with_header,
)
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import TASK, TENANT

GOOD = make_update()
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


def wrong_index() -> list[Received]:
    return [replace_topic(messages(GOOD)[1], upload_topic(TENANT, "watch-0", ID, 0))]


def replace_topic(message: Received, topic: str) -> Received:
    return Received(topic, message.payload)


def contradicting_chunks() -> list[Received]:
    second = decode(messages(GOOD)[1].payload, ChunkMsg)
    return [messages(GOOD)[0], Received(messages(GOOD)[1].topic, encode(replace(second, digest=b"\x00" * 32)))]


def altered_chunk() -> list[Received]:
    chunks = [decode(m.payload, ChunkMsg) for m in messages(GOOD)]
    chunks[1] = replace(chunks[1], data=bytes(len(chunks[1].data)))
    return [Received(m.topic, encode(c)) for m, c in zip(messages(GOOD), chunks, strict=True)]


def signed_by_another() -> list[Received]:
    return messages(make_update(key=device_key("watch-1")))


def for_another_device() -> list[Received]:
    return messages(make_update("watch-1"))


def altered_header() -> list[Received]:
    outer = decode(GOOD, UpdateEnvelopeMsg)
    header = encode(replace(decode(outer.header, UpdateHeaderMsg), round=4))
    return messages(encode(replace(outer, header=header)))


def other_sealed_bytes() -> list[Received]:
    outer = decode(GOOD, UpdateEnvelopeMsg)
    return messages(encode(replace(outer, sealed=outer.sealed[:-1] + bytes([outer.sealed[-1] ^ 1]))))


def sealed_for_another_round() -> list[Received]:
    return messages(with_header(make_update(round=2), device_key("watch-0"), round=3))


def an_older_update_of_another_task() -> list[Received]:
    """What a broker kept from another study of the device; a final refusal would cost it its new update."""
    return messages(make_update(task="other", update_id=b"\x13" * 16))


def too_few_values() -> list[Received]:
    return messages(make_update(num_parameters=9, body=bytes(36)))


def one_value(number: float) -> bytes:
    return np.array([number] + [0] * (D - 1), "<f4").tobytes()


def oversized() -> list[Received]:
    chunk = ChunkMsg(transfer_id=ID, index=0, count=3, total_bytes=3 * 1000, digest=bytes(32), data=bytes(1000))
    raw = encode(chunk).replace(b"\xabtotal_bytes\xcd\x0b\xb8", b"\xabtotal_bytes\xce\x7f\xff\xff\xff")
    return [Received(upload_topic(TENANT, "watch-0", ID, 0), raw)]


def sent(**fields: Any) -> Make:
    return lambda: messages(make_update(**fields))


BAD: list[tuple[str, Make, RefusalReason]] = [
    ("garbage", garbage, RefusalReason.MALFORMED),
    ("no envelope", whole_is_garbage, RefusalReason.MALFORMED),
    ("another topic", wrong_topic, RefusalReason.MALFORMED),
    ("another transfer", wrong_chunk, RefusalReason.MALFORMED),
    ("another chunk's place", wrong_index, RefusalReason.MALFORMED),
    ("contradicting chunks", contradicting_chunks, RefusalReason.MALFORMED),
    ("an altered chunk", altered_chunk, RefusalReason.MALFORMED),
    ("a size beyond the cap", oversized, RefusalReason.MALFORMED),
    ("other sealed bytes", other_sealed_bytes, RefusalReason.MALFORMED),
    ("signed by another device", signed_by_another, RefusalReason.BAD_SIGNATURE),
    ("another device's update", for_another_device, RefusalReason.BAD_SIGNATURE),
    ("an altered header", altered_header, RefusalReason.BAD_SIGNATURE),
    ("another task's update under this one's topic", an_older_update_of_another_task, RefusalReason.MALFORMED),
    ("another task", sent(task="other"), RefusalReason.WRONG_TASK),
    ("another tenant", sent(tenant="other"), RefusalReason.WRONG_TASK),
    ("a round to come", sent(round=4), RefusalReason.WRONG_ROUND),
    ("a round gone by", sent(round=2), RefusalReason.ROUND_CLOSED),
    ("another model", sent(model_digest=b"\x02" * 32), RefusalReason.WRONG_MODEL),
    ("sealed for another round", sealed_for_another_round, RefusalReason.UNSEALABLE),
    ("too few values", too_few_values, RefusalReason.WRONG_LENGTH),
    ("NaN", sent(body=one_value(np.nan)), RefusalReason.NOT_FINITE),
    ("infinity", sent(body=one_value(-np.inf)), RefusalReason.NOT_FINITE),
    ("too long to be added up", sent(body=one_value(1025.0)), RefusalReason.TOO_LONG),
    ("too long for float32", sent(body=one_value(3e38)), RefusalReason.TOO_LONG),
    ("an encoding that was not offered", sent(body=bytes(2 * D + 1), encoding="float16"), RefusalReason.WRONG_ENCODING),
]


@pytest.mark.parametrize(("make", "reason"), [pytest.param(m, r, id=name) for name, m, r in BAD])
def test_a_bad_update_is_refused_for_its_reason_and_the_round_goes_on(
    tmp_path: Path, make: Make, reason: RefusalReason
) -> None:
    desk = a_desk(tmp_path)
    assert desk.take(make()) == 0
    assert desk.accepted() == []
    assert desk.total().count == 0
    answer = desk.nack()
    assert (answer.reason, answer.device) == (reason, "watch-0")
    assert desk.refusals() == {reason.value: 1}
    assert desk.transport().num_held == 0
    # The same device's good update, and another's, are still welcome.
    assert desk.send_good("watch-1") == 1
    assert desk.take(messages(GOOD)) == 1
    assert len(desk.receipts()) == 2
    assert desk.total().total.tobytes() == sum_of(1.0, 1.0).tobytes()


def test_the_checks_come_in_their_order() -> None:
    """Nothing is believed before the signature: of two faults the one that is checked first is told."""
    bad_key = device_key("watch-1")
    for changes in ({"task": "other"}, {"round": 2}, {"model_digest": bytes(32)}):
        envelope = make_update(key=bad_key, **changes)
        assert why_refused(envelope) is RefusalReason.BAD_SIGNATURE
    assert why_refused(make_update(update_id=b"\x13" * 16, task="other")) is RefusalReason.MALFORMED
    assert why_refused(make_update(task="other", round=2)) is RefusalReason.WRONG_TASK
    assert why_refused(make_update(round=2, model_digest=bytes(32))) is RefusalReason.ROUND_CLOSED
    assert why_refused(make_update(model_digest=bytes(32), num_parameters=9, body=bytes(36))) is (
        RefusalReason.WRONG_MODEL
    )


def why_refused(envelope: bytes) -> RefusalReason | None:
    """Why `aggregator.ingest` refuses an update of watch-0 to round 3."""
    task = TaskInForce(TASK, D, open_round=3, rounds={3: RoundInForce(3, DIGEST, ROUND_KEY)})
    key = device_key("watch-0").public_key()
    try:
        whole = verify_header(envelope, tenant=TENANT, device="watch-0", device_key=key, update_id=ID)
        open_sealed(whole, place(whole.header, {TASK: task}))
    except RefusedError as refusal:
        return refusal.reason
    return None


def test_a_second_update_in_a_round_is_refused(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    assert desk.take(messages(GOOD)) == 1
    desk.said()
    other = make_update(update_id=b"\x20" * 16, body=values(9.0))
    assert desk.take(messages(other, update_id=b"\x20" * 16)) == 0
    assert desk.nack().reason is RefusalReason.SECOND_UPDATE
    assert desk.total().total.tobytes() == sum_of(1.0).tobytes()


def test_an_accepted_id_with_other_content_gets_the_receipt_of_what_was_accepted(tmp_path: Path) -> None:
    """A chunk proves nothing: the receipt is true of what was committed, and says which bytes those were."""
    desk = a_desk(tmp_path)
    desk.take(messages(GOOD))
    desk.clock.time_s += 2.0
    assert desk.take(messages(make_update(body=values(9.0)))) == 0
    first, second = desk.receipts()
    assert first == second
    assert desk.total().total.tobytes() == sum_of(1.0).tobytes()


@pytest.mark.parametrize("copies", [True, False], ids=["the same sealed bytes", "bytes of its own"])
def test_an_id_that_was_accepted_from_another_device_is_a_replay(tmp_path: Path, *, copies: bool) -> None:
    desk = a_desk(tmp_path)
    desk.take(messages(GOOD))
    desk.said()
    envelope = with_header(GOOD, device_key("watch-1"), device="watch-1") if copies else make_update("watch-1")
    assert desk.take(messages(envelope, "watch-1")) == 0
    answer = desk.nack()
    assert (answer.reason, answer.device) == (RefusalReason.REPLAYED, "watch-1")


def test_with_no_round_open_updates_are_refused(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    desk.close_round()
    assert desk.take(messages(GOOD)) == 0
    assert desk.nack().reason is RefusalReason.ROUND_CLOSED


def test_an_unknown_sender_is_counted_and_gets_no_answer(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    assert desk.take(messages(make_update("stranger"), "stranger")) == 0
    assert desk.said() == []
    assert set(desk.refusals()) == {"unknown_device"}
    assert held_by(desk.intake()) == 0
    assert desk.transport().num_held == 0


def held_by(intake: Intake) -> int:
    """Updates that an intake has something of."""
    return len(intake._transfers._open) + intake.batches.num_gathered + len(intake._held._held)


@pytest.mark.parametrize(
    "topic",
    ["", "fl/v1/clinic/up", "fl/v1/other/up/00/watch-0/00/0", "fl/v1/clinic/up/00/watch-0/zz/0", "\u00e9" * 500],
)
def test_a_topic_that_is_none_is_counted_and_gets_no_answer(tmp_path: Path, topic: str) -> None:
    desk = a_desk(tmp_path)
    desk.intake().take([Received(topic, b"x")])
    assert desk.said() == []
    assert desk.refusals() == {"malformed": 1}


# When a name may be used.


def test_a_pseudonym_sends_in_its_time_and_at_no_other(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    now_s = desk.clock.time_s
    with desk.store.database.transaction() as connection:
        connection.execute(
            insert(schema.device_periods).values(
                device="watch-0", not_before_s=now_s + 100.0, not_after_s=now_s + 200.0
            )
        )
    for at_s, counts in ((now_s, 0), (now_s + 99.0, 0), (now_s + 100.0, 1)):
        desk.clock.time_s = at_s
        assert desk.take(messages(GOOD)) == counts
    desk.said()
    desk.clock.time_s = now_s + 201.0
    desk.open_round(4)
    assert desk.take(messages(make_update(round=4, update_id=id_of("later")), update_id=id_of("later"))) == 0
    assert desk.said() == []
    assert desk.refusals() == {"unknown_device": 2 * len(messages(GOOD)) + len(messages(GOOD))}


def test_a_device_that_is_thrown_out_between_its_chunks_and_the_commit_does_not_count(tmp_path: Path) -> None:
    """The cache of names spares work; the register decides."""
    desk = a_desk(tmp_path)
    chunks = messages(GOOD)
    desk.take(chunks[:-1])
    with desk.store.database.transaction() as connection:
        connection.execute(schema.devices.delete().where(schema.devices.c.device == "watch-0"))
    assert desk.take(chunks[-1:]) == 0
    assert desk.said() == []
    assert desk.refusals() == {"unknown_device": 1}


def test_a_device_registered_anew_sends_with_its_new_key(tmp_path: Path) -> None:
    """Also when its old key is still in the cache."""
    desk = a_desk(tmp_path)
    desk.take(messages(GOOD)[:1])
    desk.store.devices.add("watch-0", device_key("watch-4").public_key().public_bytes_raw(), 1.0)
    assert desk.take(messages(GOOD)) == 0
    assert desk.take(messages(make_update(key=device_key("watch-4")))) == 1


# Transfers that stop half-way.


def test_missing_chunks_are_asked_for_and_then_forgotten(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    chunks = messages(GOOD)
    assert desk.take([chunks[0]]) == 0
    assert desk.said() == []
    desk.let_pass(STALLED_AFTER_S + 1)
    answer = desk.nack()
    assert answer.reason is RefusalReason.TRUNCATED
    assert missing_indices(answer.missing, len(chunks)) == list(range(1, len(chunks)))
    assert desk.take(chunks[1:]) == 1
    assert len(desk.receipts()) == 1
    assert held_by(desk.intake()) == 0
    # One that never completes is asked for a while and then dropped.
    second = messages(make_update("watch-2"), "watch-2")
    desk.take(second[:1])
    desk.let_pass(4 * FORGET_AFTER_S)
    assert 5 <= len(desk.said()) <= FORGET_AFTER_S / STALLED_AFTER_S + 1
    assert held_by(desk.intake()) == 0
    assert desk.intake()._nacked_s == {}


# The acknowledgement that lets the broker forget.


def test_a_chunk_is_acknowledged_only_after_its_update_is_committed(tmp_path: Path) -> None:
    check_acknowledgements_follow_the_commit(tmp_path)


def check_acknowledgements_follow_the_commit(folder: Path) -> None:
    desk = a_desk(folder)
    committed: list[int] = []
    desk.transport().watch = lambda: committed.append(len(desk.accepted()))
    desk.take(messages(GOOD)[:-1])
    assert committed == []
    desk.take(messages(GOOD)[-1:])
    assert committed == [1] * len(messages(GOOD))
    assert desk.transport().num_held == 0


def test_an_intake_that_acknowledges_what_it_has_only_put_aside_is_caught(tmp_path: Path) -> None:
    hasty = broken_copy(
        "aggregator.intake",
        (
            "self._acknowledge(self._held_whole.hold((update.device, update.update_id), message))",
            "self._acknowledge(messages)",
        ),
    )
    with built_with(Intake=hasty.Intake), pytest.raises(AssertionError):
        check_acknowledgements_follow_the_commit(tmp_path)


def test_what_a_killed_worker_had_not_committed_comes_again_from_the_broker(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    chunks = messages(GOOD)
    desk.take(chunks[:2])
    desk.kill()
    for message in chunks[2:]:
        desk.broker.publish(message.topic, message.payload, retain=False)
    desk.start()
    assert len(desk.receipts()) == 1
    assert desk.total().count == 1
    assert desk.transport().num_held == 0


def test_when_the_broker_goes_quiet_what_is_held_is_released(tmp_path: Path) -> None:
    """A broker that has sent all it may before an acknowledgement would wait for ever."""
    desk = a_desk(tmp_path, receive_maximum=3)
    chunks = messages(GOOD, data_bytes=300)
    assert len(chunks) > 4
    for message in chunks:
        desk.broker.publish(message.topic, message.payload, retain=False)
    desk.let_pass(len(chunks) * 1.0)
    assert len(desk.receipts()) == 1
    assert desk.total().count == 1


def test_beyond_the_cap_the_update_begun_first_is_released(tmp_path: Path) -> None:
    desk = a_desk(tmp_path, limits=IntakeLimits(device_transfers_a_minute=1000))
    chunks = messages(GOOD, data_bytes=300)
    desk.take(chunks[:2])
    sizes = []
    # Other devices begin ever new updates.
    for number in range(MOST_HELD_MESSAGES):
        device, update_id = DEVICES[1 + number % 4], id_of(f"half {number}")
        half = messages(make_update(device, update_id=update_id), device, update_id=update_id, data_bytes=300)[:1]
        for message in half:
            desk.broker.publish(message.topic, message.payload, retain=False)
        if number % 100 == 99:
            desk.settle(1)
            sizes.append(desk.intake()._held._count)
    assert max(sizes) <= MOST_HELD_MESSAGES
    first_two = {message.topic for message in chunks[:2]}
    assert {message.topic for message in desk.transport().acknowledged} >= first_two


# When the database fails.


def check_a_killed_worker_gets_what_it_could_not_commit_again(folder: Path) -> None:
    desk = a_desk(folder)
    fail_commits(desk, BlobError("disk full"))
    desk.take(messages(GOOD))
    desk.let_pass(5.0)  # the broker has long gone quiet
    desk.kill()
    desk.blobs.watch = lambda _moment: None
    desk.start()
    desk.let_pass(1.0)
    assert len(desk.receipts()) == 1  # and its device did not have to send it again
    assert desk.transport().num_held == 0


def test_a_killed_worker_gets_what_it_could_not_commit_again(tmp_path: Path) -> None:
    check_a_killed_worker_gets_what_it_could_not_commit_again(tmp_path)


def test_an_intake_that_lets_the_broker_forget_what_is_whole_is_caught(tmp_path: Path) -> None:
    copy = broken_copy(
        "aggregator.intake",
        ("self._acknowledge(self._held.release_all())", "self._acknowledge(self._held_whole.release_all())"),
    )
    with built_with(Intake=copy.Intake), pytest.raises(AssertionError):
        check_a_killed_worker_gets_what_it_could_not_commit_again(tmp_path)


def test_of_whole_updates_only_so_many_messages_are_held(tmp_path: Path) -> None:
    desk = a_desk(tmp_path, limits=IntakeLimits(device_transfers_a_minute=10_000))
    intake, transport = desk.intake(), desk.transport()
    for index in range(MOST_HELD_MESSAGES_OF_WHOLE + 8):
        update_id = id_of(f"whole {index}")
        (message,) = messages(GOOD, update_id=update_id, data_bytes=4096)
        desk.broker.publish(message.topic, message.payload, retain=False)
        event = transport.poll(0.0)
        assert isinstance(event, Received)
        intake.take([event])
    assert intake._held_whole._count == transport.num_held == MOST_HELD_MESSAGES_OF_WHOLE


def test_of_a_whole_update_in_many_messages_none_is_held(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    chunks = messages(bytes(256 * MOST_MESSAGES_OF_ONE + 1), data_bytes=256)
    assert len(chunks) == MOST_MESSAGES_OF_ONE + 1
    for count in (MOST_MESSAGES_OF_ONE, MOST_MESSAGES_OF_ONE + 1):
        for message in chunks[:count]:
            desk.broker.publish(message.topic, message.payload, retain=False)
        while (event := desk.transport().poll(0.0)) is not None:
            assert isinstance(event, Received)
            desk.intake().take([event])
        assert desk.transport().num_held == (count if count == MOST_MESSAGES_OF_ONE else 0)


def fail_commits(desk: Desk, error: Exception) -> None:
    def watch(moment: str) -> None:
        if moment == "before put":
            raise error

    desk.blobs.watch = watch


def check_a_receipt_means_committed(folder: Path) -> None:
    desk = a_desk(folder)
    for error in (DatabaseError("the database does not take this change: disk full"), BlobError("disk full")):
        fail_commits(desk, error)
        assert desk.take(messages(GOOD)) == 0
        assert desk.said() == []
        assert len(desk.journal.named("degraded")) == 1
        desk.let_pass(1.5)
    desk.blobs.watch = lambda _moment: None
    desk.let_pass(2.0)
    assert len(desk.receipts()) == 1
    assert desk.total().total.tobytes() == sum_of(1.0).tobytes()
    assert [event["after"] for event in desk.journal.named("recovered")] == ["disk full"]


def test_what_is_whole_is_kept_while_the_database_fails_and_then_committed(tmp_path: Path) -> None:
    check_a_receipt_means_committed(tmp_path)


def test_only_so_many_updates_wait_for_the_database(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    intake, update = desk.intake(), GOOD
    extra = messages(update, update_id=ID, data_bytes=4096)
    assert len(extra) == 1
    names = [f"many-{index}" for index in range(2 * FULL_BATCH + 10)]
    desk.register(*names)
    for name in names:
        intake.take([Received(upload_topic(TENANT, name, ID, 0), extra[0].payload)])
    assert intake.batches.num_gathered == 2 * FULL_BATCH
    assert len(desk.journal.named("update_dropped")) == 10


# What no correct intake may break, and broken copies that break it.


def check_duplicates_get_a_receipt_and_count_once(folder: Path) -> None:
    desk = a_desk(folder)
    assert desk.take(messages(GOOD)) == 1
    for again in (messages(GOOD), messages(GOOD, data_bytes=500), messages(GOOD)):  # cut anew after a reconnection
        desk.clock.time_s += 2.0
        assert desk.take(again) == 0
    desk.close_round()  # and also after the round is closed
    desk.clock.time_s += 2.0
    assert desk.take(messages(GOOD, data_bytes=4096)) == 0
    receipts = desk.receipts()
    assert len(receipts) == 5
    assert len({encode(receipt) for receipt in receipts}) == 1
    assert len(desk.accepted()) == 1


def check_only_the_registered_key_may_send(folder: Path) -> None:
    desk = a_desk(folder)
    assert desk.take(signed_by_another()) == 0
    assert desk.accepted() == []
    assert not [message for message in desk.said() if isinstance(message, ReceiptMsg)]


def check_nothing_is_kept_of_strangers(folder: Path) -> None:
    desk = a_desk(folder)
    desk.take(messages(make_update("stranger"), "stranger")[:2])
    assert held_by(desk.intake()) == 0
    assert desk.intake()._transfers.held_bytes == 0
    assert desk.intake()._throttle._devices == {}


BREAKS: list[tuple[Callable[[Path], None], str, str, str]] = [
    (
        check_duplicates_get_a_receipt_and_count_once,
        "aggregator.committer",
        "if (before := known.get((header.task, header.update_id))) is not None:",
        "if (before := None) is not None:",
    ),
    (
        check_only_the_registered_key_may_send,
        "aggregator.ingest",
        "or not opener.is_signed(envelope.header, envelope.signature, device_key)",
        "",
    ),
    (
        check_a_receipt_means_committed,
        "aggregator.intake",
        "if not self.batches.add(update):",
        "self._receipt(_accepted(update, self._now_s()))\n        if not self.batches.add(update):",
    ),
    (
        check_nothing_is_kept_of_strangers,
        "aggregator.intake",
        "if not self._register.is_registered(topic.device, self._now_s()):",
        "if False:",
    ),
]


@pytest.mark.parametrize("check", [one[0] for one in BREAKS])
def test_the_intake_passes(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_intake_is_caught(
    broken: tuple[Callable[[Path], None], str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, module, right, wrong = broken
    copy = broken_copy(module, (right, wrong))
    parts: dict[str, Any] = {}
    if module == "aggregator.committer":
        parts = {"Committer": broken_committer((right, wrong))}
    elif module == "aggregator.ingest":
        monkeypatch.setattr("aggregator.committer.verify_header", copy.verify_header)
    else:
        copy.__dict__["_accepted"] = _as_accepted
        parts = {"Intake": copy.Intake}
    with built_with(**parts), pytest.raises(AssertionError):
        check(tmp_path)


def _as_accepted(update: Any, now_s: float) -> Any:
    header = decode(decode(update.envelope, UpdateEnvelopeMsg).header, UpdateHeaderMsg)
    return AcceptedUpdate(header.task, header.update_id, header.device, header.round, header.sealed_digest, now_s)


def test_the_values_that_are_added_up_are_the_values_that_were_sealed(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    raw = np.random.default_rng(0).normal(size=D).astype("<f4")
    desk.take(messages(make_update(body=raw.tobytes())))
    assert desk.total().total.tobytes() == sum_of(raw).tobytes()


def test_several_updates_of_a_step_are_committed_together(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    batch = [
        message
        for name in DEVICES
        for message in messages(make_update(name, update_id=id_of(name)), name, update_id=id_of(name))
    ]
    puts = len(desk.blobs.kinds)
    assert desk.take(batch) == len(DEVICES)
    assert desk.blobs.kinds[puts:] == ["sum"]
    assert reasons(desk.said()) == [None] * len(DEVICES)


def test_a_name_is_looked_up_once_in_a_while_and_not_for_each_chunk(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    looked: list[set[str]] = []
    devices = desk.services["worker"].store.devices
    find = devices.find

    def watched(names: Iterable[str]) -> dict[str, RegisteredKey]:
        looked.append(set(names))
        return find(names)

    devices.find = watched  # type: ignore[method-assign]
    for chunk in messages(GOOD):
        desk.take([chunk])
    assert looked == [{"watch-0"}]
    desk.clock.time_s += KNOWN_FOR_S
    desk.take(messages(GOOD)[:1])
    assert looked == [{"watch-0"}] * 2
