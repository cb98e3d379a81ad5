"""How much one device may send: its allowance, that it comes back, and that it costs no other device anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.intake import NAME_EVERY_S, TELL_REFUSALS_EVERY_S, IntakeLimits
from aggregator.throttle import MOST_DEVICES, Repetitions, Throttle
from fl_protocol.errors import RefusalReason
from fl_protocol.messages import ChunkMsg, NackMsg, encode
from fl_protocol.topics import upload_topic
from fl_protocol.transport import Received
from tests.aggregator.desk import Desk, a_desk, built_with, id_of, make_update, messages, sum_of
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import TENANT

KIB = 1024


def takes(
    throttle: Throttle, num_bytes: int = 10 * KIB, *, at_s: float = 0.0, begins: bool = False, device: str = "a"
) -> bool:
    return not throttle.why_not(device, num_bytes, begins=begins, now_s=at_s)


def test_a_minute_brings_so_many_bytes_and_so_many_updates() -> None:
    throttle = Throttle(bytes_a_minute=100 * KIB, transfers_a_minute=3)
    assert [takes(throttle) for _ in range(12)] == [True] * 10 + [False] * 2
    assert throttle.why_not("a", 10, begins=False, now_s=0.0) == "it sent more than 102400 bytes in a minute"
    assert [takes(throttle, 1, begins=True, device="b") for _ in range(5)] == [True] * 3 + [False] * 2
    assert throttle.why_not("b", 1, begins=True, now_s=0.0) == "it began more than 3 updates in a minute"
    assert takes(throttle, 1, device="b")  # what it has begun it may end


def test_tiny_chunks_are_charged_as_the_work_that_they_are() -> None:
    throttle = Throttle(bytes_a_minute=5 * KIB, transfers_a_minute=3)
    assert [takes(throttle, num_bytes) for num_bytes in (0, 1, KIB - 1, KIB, 2, 3)] == [True] * 5 + [False]


def test_the_allowance_fills_up_with_time_and_never_beyond_a_minutes() -> None:
    throttle = Throttle(bytes_a_minute=60 * KIB, transfers_a_minute=60)
    assert takes(throttle, 60 * KIB)
    assert not takes(throttle, KIB)
    assert not takes(throttle, 6 * KIB, at_s=5.0)
    assert takes(throttle, 6 * KIB, at_s=6.0)
    assert [takes(throttle, 60 * KIB, at_s=1e6) for _ in range(2)] == [True, False]


def test_what_is_refused_is_not_charged() -> None:
    throttle = Throttle(bytes_a_minute=60 * KIB, transfers_a_minute=60)
    for _ in range(100):
        assert not takes(throttle, 61 * KIB)
    assert takes(throttle, 60 * KIB)


def test_a_clock_that_is_set_back_gives_nothing_and_takes_nothing() -> None:
    throttle = Throttle(bytes_a_minute=60 * KIB, transfers_a_minute=60)
    assert takes(throttle, 30 * KIB, at_s=1e6)
    assert takes(throttle, 30 * KIB, at_s=0.0)
    assert not takes(throttle, KIB, at_s=0.0)
    assert takes(throttle, 30 * KIB, at_s=31.0)


def check_forgetting_changes_nothing(kind: type[Throttle]) -> None:
    forgets, remembers = (kind(bytes_a_minute=60 * KIB, transfers_a_minute=3) for _ in range(2))
    for device, at_s in (("a", 0.0), ("b", 20.0), ("a", 30.0), ("c", 61.0), ("b", 79.0), ("a", 91.0), ("b", 300.0)):
        forgets.forget(at_s)
        for num_bytes in (50 * KIB, 20 * KIB):
            taken = [takes(one, num_bytes, at_s=at_s, begins=True, device=device) for one in (forgets, remembers)]
            assert taken[0] == taken[1], (device, at_s)
    assert list(forgets._devices) == ["b"]


def test_a_device_is_forgotten_once_that_changes_nothing() -> None:
    check_forgetting_changes_nothing(Throttle)


def test_a_throttle_that_forgets_what_a_device_has_sent_is_caught() -> None:
    copy = broken_copy("aggregator.throttle", ("FULL_AFTER_S:\n                break", "10.0:\n                break"))
    with pytest.raises(AssertionError):
        check_forgetting_changes_nothing(copy.Throttle)


def test_only_so_many_devices_are_remembered() -> None:
    throttle = Throttle(bytes_a_minute=60 * KIB, transfers_a_minute=60)
    for number in range(MOST_DEVICES + 100):
        takes(throttle, device=f"device-{number}")
    assert len(throttle._devices) == MOST_DEVICES


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 15), st.booleans()), max_size=60),
)
def test_everything_is_told_or_counted_and_nothing_more_often_than_it_may(
    steps: list[tuple[str, int, bool]],
) -> None:
    repetitions, now_s, happened = Repetitions(10.0), 0.0, Counter[str]()
    told: list[tuple[str, float, int]] = []

    def note(fields: Mapping[str, Any]) -> None:
        told.append((fields["device"], now_s, 1 + fields.get("repeated", 0)))

    for device, wait_s, looks in steps:
        now_s += wait_s
        happened[device] += 1
        if (fields := repetitions.tell((device, "why"), {"device": device}, now_s)) is not None:
            note(fields)
        if looks:
            list(map(note, repetitions.overdue(now_s)))
    for _ in range(2):
        now_s += 10.0
        list(map(note, repetitions.overdue(now_s)))
    assert repetitions._said == {}
    for device in "ab":
        mine = [(at_s, count) for name, at_s, count in told if name == device]
        assert sum(count for _, count in mine) == happened[device]
        assert all(after_s - before_s >= 10.0 for (before_s, _), (after_s, _) in pairwise(mine))


# At the MQTT boundary, on a whole worker.

LIMITS = IntakeLimits(device_bytes_a_minute=200_000, device_transfers_a_minute=60)


def check_ten_thousand_transfers(folder: Path) -> None:
    desk = a_desk(folder, limits=LIMITS)
    for number in range(10_000):
        update_id = id_of(f"flood {number}")
        half = ChunkMsg(transfer_id=update_id, index=0, count=2, total_bytes=500, digest=bytes(32), data=bytes(300))
        desk.broker.publish(upload_topic(TENANT, "watch-0", update_id, 0), encode(half), retain=False)
        if number % 500 == 0:
            desk.settle()
    desk.settle(60)
    check_it_was_named_and_nobody_else_suffered(desk)


def check_a_hundred_megabytes(folder: Path) -> None:
    desk = a_desk(folder, limits=LIMITS)
    envelope = bytes(90_000 * 12)
    begun = messages(envelope, update_id=id_of("flood"), data_bytes=90_000)
    sent = 0
    while sent < 100_000_000:
        for message in begun[:-1]:
            desk.broker.publish(message.topic, message.payload, retain=False)
            sent += len(message.payload)
        desk.settle(1)
    desk.settle()
    assert desk.intake()._transfers.held_bytes <= LIMITS.device_bytes_a_minute
    check_it_was_named_and_nobody_else_suffered(desk)


def check_it_was_named_and_nobody_else_suffered(desk: Desk) -> None:
    """One note and one NACK a minute; others' updates count as ever; and after a minute its own does too."""
    assert [event["device"] for event in desk.journal.named("device_throttled")] == ["watch-0"]
    answers = desk.said()
    throttled = [one for one in answers if isinstance(one, NackMsg) and one.reason is RefusalReason.THROTTLED]
    assert [one.device for one in throttled] == ["watch-0"]
    assert {one.device for one in answers} == {"watch-0"}
    assert desk.refusals()["throttled"] == 1
    assert desk.send_good("watch-1") == 1
    assert [one.device for one in desk.said()] == ["watch-1"]
    desk.clock.time_s += NAME_EVERY_S
    assert desk.take(messages(make_update())) == 1
    assert desk.total().total.tobytes() == sum_of(1.0, 1.0).tobytes()


@pytest.mark.parametrize("check", [check_ten_thousand_transfers, check_a_hundred_megabytes])
def test_a_device_that_sends_too_much_is_named_once_a_minute(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.parametrize("check", [check_ten_thousand_transfers, check_a_hundred_megabytes])
def test_an_intake_without_a_throttle_is_caught(check: Callable[[Path], None], tmp_path: Path) -> None:
    intake = broken_copy("aggregator.intake", ("slowed = self._throttle", "slowed = '' and self._throttle"))
    with built_with(Intake=intake.Intake), pytest.raises(AssertionError):
        check(tmp_path)


def test_an_intake_that_names_it_at_every_chunk_is_caught(tmp_path: Path) -> None:
    intake = broken_copy(
        "aggregator.intake",
        ("if not happened_within(NAME_EVERY_S,", "if True or not happened_within(NAME_EVERY_S,"),
    )
    with built_with(Intake=intake.Intake), pytest.raises(AssertionError):
        check_a_hundred_megabytes(tmp_path)


def flood(desk: Desk, some: Iterable[Received]) -> None:
    for number, message in enumerate(some):
        desk.broker.publish(message.topic, message.payload, retain=False)
        if number % 50 == 49:
            desk.settle(1)
    desk.settle(3)


def check_bad_chunks_cost_one_line_and_one_nack(folder: Path) -> None:
    """All are counted; the journal and the broker hear of one, and of how many it stands for."""
    desk = a_desk(folder)
    chunks = messages(make_update())
    desk.take(chunks[:1])
    flood(desk, [Received(chunks[1].topic, b"x")] * 200)
    assert [event.get("repeated", 0) for event in desk.journal.named("update_refused")] == [0]
    assert [one.reason for one in desk.said() if isinstance(one, NackMsg)] == [RefusalReason.MALFORMED]
    # It had its answer, and is done; a second later it would have another.
    desk.clock.time_s += 1.0
    flood(desk, [Received(chunks[1].topic, b"x")] * 10)
    assert [one.reason for one in desk.said() if isinstance(one, NackMsg)] == [RefusalReason.MALFORMED]
    desk.let_pass(TELL_REFUSALS_EVERY_S + 1.0)
    lines = desk.journal.named("update_refused")
    assert len(lines) == 2
    counted = desk.refusals()["malformed"]
    assert sum(1 + event.get("repeated", 0) for event in lines) == counted
    assert counted + desk.refusals().get("throttled", 0) > 50
    desk.clock.time_s += NAME_EVERY_S
    assert desk.take(chunks) == 1


def test_bad_chunks_without_end_cost_one_line_and_one_nack(tmp_path: Path) -> None:
    check_bad_chunks_cost_one_line_and_one_nack(tmp_path)


def check_strangers_share_a_line(folder: Path) -> None:
    desk = a_desk(folder)
    strangers = [upload_topic(TENANT, f"stranger-{number}", id_of("x"), 0) for number in range(200)]
    flood(desk, [Received(topic, b"x") for topic in strangers])
    flood(desk, [Received("fl/v1/clinic/up/00/watch-0/zz/0", b"x")] * 3)  # not of any shard
    assert len(desk.journal.named("update_refused")) <= 2
    desk.let_pass(TELL_REFUSALS_EVERY_S + 1.0)
    lines = [event for event in desk.journal.named("update_refused") if event["reason"] == "unknown_device"]
    assert [event.get("repeated", 0) for event in lines] == [0, 198]
    assert desk.refusals()["unknown_device"] == 200
    assert desk.said() == []


def test_strangers_of_many_names_share_a_line(tmp_path: Path) -> None:
    check_strangers_share_a_line(tmp_path)


TALKATIVE = [
    (
        check_bad_chunks_cost_one_line_and_one_nack,
        "if happened_within(REFUSE_EVERY_S,",
        "if False and happened_within(REFUSE_EVERY_S,",
    ),
    (check_bad_chunks_cost_one_line_and_one_nack, "Repetitions(TELL_REFUSALS_EVERY_S)", "Repetitions(0.0)"),
    (check_strangers_share_a_line, 'who = "" if', "who = device if"),
]


@pytest.mark.parametrize(("check", "right", "wrong"), TALKATIVE)
def test_an_intake_that_tells_of_every_chunk_is_caught(
    check: Callable[[Path], None], right: str, wrong: str, tmp_path: Path
) -> None:
    intake = broken_copy("aggregator.intake", (right, wrong))
    with built_with(Intake=intake.Intake), pytest.raises(AssertionError):
        check(tmp_path)
