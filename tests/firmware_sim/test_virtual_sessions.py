"""A broker's sessions: free packet ids and the index of filters do what the plain way does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from firmware_sim.virtual_broker import VirtualSession, topic_matches

LEVELS = ["a", "b", "c"]
TOPICS = st.lists(st.sampled_from(LEVELS), min_size=1, max_size=4).map("/".join)
FILTERS = st.builds(
    lambda levels, rest: "/".join([*levels, *rest]),
    st.lists(st.sampled_from([*LEVELS, "+"]), min_size=1, max_size=4),
    st.sampled_from([[], ["#"]]),
) | st.just("#")


@given(st.lists(FILTERS, max_size=6), st.lists(FILTERS, max_size=3), st.lists(TOPICS, max_size=6))
def test_a_message_is_lined_up_once_if_any_filter_matches(
    subscribed: list[str], taken_back: list[str], topics: list[str]
) -> None:
    session = VirtualSession(100)
    for topic_filter in subscribed:
        session.subscribe(topic_filter)
    for topic_filter in taken_back:
        session.unsubscribe(topic_filter)
    left = set(subscribed) - set(taken_back)
    assert set(session.filters) == left
    for topic in topics:
        session.offer(topic, b"")
    expected = [topic for topic in topics if any(topic_matches(one, topic) for one in left)]
    found = []
    while (delivery := session.next_delivery()) is not None:
        found.append(delivery[1])
    assert found == expected


@given(st.lists(st.one_of(st.just("deliver"), st.just("interrupt"), st.integers(1, 6)), max_size=60))
def test_packet_ids_are_the_lowest_free_ones_and_nothing_is_lost(steps: list[str | int]) -> None:
    session, lined_up = VirtualSession(5), [bytes([number]) for number in range(60)]
    for payload in lined_up:
        session.line_up("t", payload)
    taken: dict[int, bytes] = {}
    waiting = list(lined_up)
    for step in steps:
        if step == "deliver":
            delivery = session.next_delivery()
            if len(taken) == 5:
                assert delivery is None
            else:
                lowest = min(set(range(1, 7)) - set(taken))
                assert delivery == (lowest, "t", waiting[0])
                taken[lowest] = waiting.pop(0)
        elif step == "interrupt":
            session.interrupted()
            waiting[:0] = taken.values()
            taken.clear()
        else:
            assert isinstance(step, int)
            session.acknowledged(step)
            taken.pop(step, None)
