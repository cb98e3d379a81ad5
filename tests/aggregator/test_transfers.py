"""Half-received updates under one cap for all devices, and the acknowledgements that wait for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import transfers as transfers_module
from aggregator.intake import IntakeLimits
from aggregator.transfers import HeldMessages, Transfers
from fl_protocol.chunking import split
from fl_protocol.errors import RefusedError
from fl_protocol.messages import ChunkMsg, encode
from fl_protocol.topics import upload_topic
from fl_protocol.transport import Received
from tests.aggregator.desk import a_desk, id_of
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import TENANT

WHOLE = bytes(range(256)) * 12
SIZE = 300


def chunks(name: str, whole: bytes = WHOLE) -> list[ChunkMsg]:
    return list(split(id_of(name), whole, data_bytes=SIZE))


def check_the_least_recently_progressing_gives_way(module: ModuleType) -> None:
    held = module.Transfers(10 * SIZE)
    for number, name in enumerate("abcde"):
        for chunk in chunks(name)[:2]:
            assert held.accept(name, chunk, float(number)) is None
    assert held.held_bytes == 10 * SIZE
    held.accept("a", chunks("a")[2], 6.0)  # which leaves no room: b has gone longest without a new chunk
    assert ("b", id_of("b")) not in held
    assert ("a", id_of("a")) in held
    held.accept("c", chunks("c")[0], 7.0)  # not new
    held.accept("d", chunks("d")[2], 8.0)
    held.accept("d", chunks("d")[3], 8.0)
    assert ("c", id_of("c")) not in held
    assert ("e", id_of("e")) in held
    assert held.held_bytes == sum(one.held_bytes for one in held._open.values()) <= 10 * SIZE


def test_one_that_repeats_what_it_has_sent_does_not_keep_its_place_by_that() -> None:
    check_the_least_recently_progressing_gives_way(transfers_module)


@pytest.mark.parametrize(
    "change",
    [
        ("if mine.held_bytes != before:", "if True:"),
        ("self._open.popitem(last=False)", "self._open.popitem(last=True)"),
        ("while self._held_bytes > self._most_bytes:", "while False:"),
    ],
    ids=["repeats count", "the newest gives way", "no cap"],
)
def test_a_broken_copy_is_caught(change: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, KeyError)):
        check_the_least_recently_progressing_gives_way(broken_copy("aggregator.transfers", change))


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from("abcdef"), st.sampled_from("xyz"), st.integers(0, 10), st.sampled_from(["good", "bad"])
        ),
        max_size=120,
    ),
    most=st.integers(1, 20),
)
@settings(max_examples=80, deadline=None)
def test_what_is_held_never_exceeds_the_cap_and_is_counted_right(
    steps: list[tuple[str, str, int, str]], most: int
) -> None:
    held, whole = Transfers(most * SIZE), []
    for time, (device, name, index, kind) in enumerate(steps):
        mine = chunks(f"{device}{name}", WHOLE if kind == "good" else WHOLE[::-1])
        try:
            done = held.accept(device, mine[index % len(mine)], float(time))
        except RefusedError:
            done = None
        if done is not None:
            whole.append(b"".join(done))
        assert held.held_bytes == sum(one.held_bytes for one in held._open.values())
        assert held.held_bytes <= most * SIZE
        assert all(len(one) for one in held._open.values())
        if time % 17 == 16:
            held.forget_before(float(time - 10))
            assert held.held_bytes == sum(one.held_bytes for one in held._open.values())
    assert set(whole) <= {WHOLE, WHOLE[::-1]}


def test_a_whole_comes_out_as_it_went_in_whatever_the_order() -> None:
    held = Transfers(10**6)
    mine = chunks("a")
    came = [held.accept("a", chunk, 0.0) for chunk in [*mine[::-2], *mine[-2::-2]]]
    assert came[:-1] == [None] * (len(mine) - 1)
    assert b"".join(came[-1] or ()) == WHOLE
    assert held.held_bytes == 0
    assert held._open == {}


def test_what_is_quiet_is_told_with_what_is_missing_and_then_dropped() -> None:
    held = Transfers(10**6)
    for name, at_s in (("a", 1.0), ("b", 5.0)):
        held.accept(name, chunks(name)[0], at_s)
    assert [key for key, _ in held.quiet_since(5.0)] == [("a", id_of("a"))]
    ((_, missing),) = held.quiet_since(5.0)
    assert missing == b"\xfe\x07"
    held.forget_before(5.0)
    assert list(held._open) == ["b"]
    assert held.held_bytes == SIZE


def message(number: int) -> Received:
    return Received("topic", str(number).encode())


def key(name: str) -> tuple[str, bytes]:
    return name, id_of(name)


def test_messages_are_held_until_their_update_is_done_with() -> None:
    held = HeldMessages(10)
    for number in range(6):
        assert held.hold(key("ab"[number % 2]), message(number)) == []
    assert held.release(key("a")) == [message(0), message(2), message(4)]
    assert held.release(key("a")) == []
    assert held.release_all() == [message(1), message(3), message(5)]
    assert held.release_all() == []


def test_beyond_the_most_the_update_begun_first_is_given_up_whole() -> None:
    held = HeldMessages(4)
    for number, name in enumerate("abab"):
        assert held.hold(key(name), message(number)) == []
    assert held.hold(key("c"), message(4)) == [message(0), message(2)]
    assert held.release(key("a")) == []
    assert [held.hold(key("c"), message(number)) for number in (5, 6)] == [[], [message(1), message(3)]]
    assert held.release_all() == [message(4), message(5), message(6)]


def check_a_held_message_is_given_up_when_many_have_come_behind_it(module: ModuleType) -> None:
    held = module.HeldMessages(10, most_behind=3)
    held.hold(key("a"), message(0))
    assert held.passed_by(1) == []
    held.hold(key("b"), message(1))
    assert held.passed_by(2) == []
    assert held.hold(key("a"), message(2)) == []  # going on does not keep it its place
    assert held.passed_by(1) == [message(0), message(2)]
    assert held.release(key("a")) == []
    assert held.passed_by(100) == [message(1)]
    assert held.passed_by(100) == []


def test_a_held_message_is_given_up_when_many_have_come_behind_it() -> None:
    check_a_held_message_is_given_up_when_many_have_come_behind_it(transfers_module)


def test_a_slow_update_that_holds_up_the_acknowledgements_of_all_others_is_caught() -> None:
    copy = broken_copy("aggregator.transfers", ("self._came += messages", "pass"))
    with pytest.raises(AssertionError):
        check_a_held_message_is_given_up_when_many_have_come_behind_it(copy)


@given(steps=st.lists(st.tuples(st.sampled_from(["hold", "release", "all"]), st.sampled_from("abcdef")), max_size=80))
def test_every_message_is_acknowledged_once_and_never_more_than_the_most_are_held(steps: list[Any]) -> None:
    held, given_back, count = HeldMessages(7), [], 0
    for action, name in steps:
        if action == "hold":
            given_back += held.hold(key(name), message(count))
            count += 1
        else:
            given_back += held.release(key(name)) if action == "release" else held.release_all()
        assert held._count == sum(len(messages) for messages in held._held.values()) <= 7
    given_back += held.release_all()
    assert sorted(int(one.payload) for one in given_back) == list(range(count))


# At the MQTT boundary.


def flood_of_halves(folder: Path, devices: int, limits: IntakeLimits) -> Any:
    """Many devices that begin updates and end none, and then an honest one."""
    desk = a_desk(folder, limits=limits)
    names = [f"many-{index}" for index in range(devices)]
    desk.register(*names)
    most = 0
    for round_of in range(3):
        for name in names:
            update_id = id_of(f"{name} {round_of}")
            half = ChunkMsg(
                transfer_id=update_id, index=0, count=2, total_bytes=120_000, digest=bytes(32), data=bytes(70_000)
            )
            desk.broker.publish(upload_topic(TENANT, name, update_id, 0), encode(half), retain=False)
        desk.settle(2)
        most = max(most, desk.intake()._transfers.held_bytes)
    return desk, most


def check_memory_is_bounded_over_all_devices(folder: Path, look: Callable[[Any], None] = lambda _desk: None) -> None:
    limits = IntakeLimits(reassembly_bytes=2**21)
    desk, most = flood_of_halves(folder, 100, limits)
    look(desk)
    assert 2**20 < most <= 2**21
    assert desk.send_good("watch-1") == 1


def test_many_devices_half_sent_updates_take_no_more_than_the_cap(tmp_path: Path) -> None:
    check_memory_is_bounded_over_all_devices(tmp_path)


def test_an_intake_without_a_cap_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loose = broken_copy("aggregator.transfers", ("while self._held_bytes > self._most_bytes:", "while False:"))
    monkeypatch.setattr("aggregator.intake.Transfers", loose.Transfers)
    with pytest.raises(AssertionError):
        check_memory_is_bounded_over_all_devices(tmp_path)
