"""What the network thread hands over: in order, and never more than the bounds."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from fl_protocol.adapters.inbox import Inbox
from fl_protocol.transport import Connected, Disconnected, Received, TransportEvent


def message(num_bytes: int) -> Received:
    return Received("t", bytes(num_bytes))


def drained(inbox: Inbox) -> list[TransportEvent]:
    found = []
    while (event := inbox.take(0.0)) is not None:
        found.append(event)
    return found


sizes = st.integers(0, 40).map(message)
others = st.sampled_from([Connected(), Disconnected("gone")])


@given(st.lists(st.one_of(sizes, others, st.none()), max_size=60))
def test_what_is_held_is_bounded_and_what_is_not_dropped_comes_in_order(actions: list[TransportEvent | None]) -> None:
    inbox = Inbox(most_events=5, most_bytes=100, room_wait_s=0.0)
    held: list[TransportEvent] = []
    for action in actions:
        if action is None:
            assert inbox.take(0.0) == (held.pop(0) if held else None)
            continue
        held.append(action)
        dropped = inbox.put(action)
        has_room = len(held) <= 5 and sum(len(one.payload) for one in held if isinstance(one, Received)) <= 100
        if isinstance(action, Received):
            assert dropped is (None if has_room else held.pop())
        else:
            assert dropped is (held.pop(0) if len(held) > 5 else None)
    assert drained(inbox) == held


def test_a_message_waits_for_room_and_is_not_dropped() -> None:
    inbox = Inbox(most_events=5, most_bytes=100, room_wait_s=60.0)
    assert inbox.put(message(60)) is None
    dropped: list[TransportEvent | None] = []
    network = threading.Thread(target=lambda: dropped.append(inbox.put(message(61))))
    network.start()
    while not inbox._left._waiters:  # type: ignore[attr-defined]
        pass
    assert inbox.take(0.0) == message(60)
    network.join()
    assert dropped == [None]
    assert inbox.take(0.0) == message(61)


def test_who_takes_waits_for_what_comes() -> None:
    inbox = Inbox(most_events=5, most_bytes=100, room_wait_s=0.0)
    taken: list[TransportEvent | None] = []
    consumer = threading.Thread(target=lambda: taken.append(inbox.take(60.0)))
    consumer.start()
    while not inbox._came._waiters:  # type: ignore[attr-defined]
        pass
    inbox.put(Connected())
    consumer.join()
    assert taken == [Connected()]


def test_who_takes_from_an_empty_one_does_not_wait_longer_than_asked() -> None:
    inbox = Inbox(most_events=5, most_bytes=100, room_wait_s=0.0)
    assert inbox.take(-1.0) is None
    assert inbox.take(0.001) is None
