"""A shard's side of the broker: who gets what, in which order, and what arrives when."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_sim.fleet.edge import ShardEdge
from firmware_sim.fleet.windows import Download
from fl_protocol.errors import LocalMisuseError
from tests.enrolments import broken_copy


class Client:
    """A device's end that notes what it gets."""

    def __init__(self, name: str, told: list[tuple[str, str, bytes]] | None = None) -> None:
        self.name, self.told, self.sent = name, told if told is not None else [], 0
        self.cuts: list[float] = []

    def next_number(self) -> int:
        self.sent += 1
        return self.sent

    def deliver(self, topic: str, payload: bytes, sent_s: float) -> None:
        del sent_s
        self.told.append((self.name, topic, payload))

    def cut(self, reason: str, at_s: float) -> None:
        del reason
        self.cuts.append(at_s)


def an_edge() -> ShardEdge:
    return ShardEdge(began_s=1000.0, now_s=lambda: 1000.0)


def test_what_is_retained_comes_at_once_and_is_forgotten_when_it_is_emptied() -> None:
    edge, client = an_edge(), Client("a")
    edge.take(Download("", "fl/round/t", b"1"))
    edge.connect(client, will=None, at_s=1000.0)
    edge.subscribe(client, "fl/round/t", arrives_s=1000.0)
    edge.subscribe(client, "fl/round/+", arrives_s=1000.0)
    assert client.told == [("a", "fl/round/t", b"1")] * 2
    edge.take(Download("", "fl/round/t", b""))
    late = Client("b")
    edge.connect(late, will=None, at_s=1000.0)
    edge.subscribe(late, "fl/round/+", arrives_s=1000.0)
    edge.subscribe(late, "fl/round/t", arrives_s=1000.0)
    assert not late.told


@pytest.mark.parametrize("topic_filter", ["#", "a/#", "+/a", "a/+/b"])
def test_other_filters_than_a_device_has_are_refused(topic_filter: str) -> None:
    with pytest.raises(LocalMisuseError, match="expected a topic"):
        an_edge().subscribe(Client("a"), topic_filter, arrives_s=0.0)


@given(st.permutations(["a", "b", "c", "d"]))
def test_a_message_goes_to_all_in_the_order_of_their_names_however_they_came(names: list[str]) -> None:
    edge, told = an_edge(), list[tuple[str, str, bytes]]()
    for number, name in enumerate(names):
        client = Client(name, told)
        edge.connect(client, will=None, at_s=1000.0)
        edge.subscribe(client, "x/+" if number % 2 else "x/y", arrives_s=1000.0)
        edge.subscribe(client, "x/y", arrives_s=1000.0)  # who has asked twice gets it once
    edge.take(Download("", "x/y", b"m"))
    assert told == [(name, "x/y", b"m") for name in "abcd"]


def test_a_disconnection_drops_what_would_arrive_later_and_keeps_what_has_arrived() -> None:
    edge, client = an_edge(), Client("a")
    edge.connect(client, will=None, at_s=1000.0)
    for second in (1.0, 5.0, 9.0):
        edge.publish(client, "up", bytes([int(second)]), retain=False, arrives_s=1000.0 + second)
    edge.disconnect(client, at_s=1005.0, clean=False)
    assert [one.arrives_s for one in edge.take_uploads(math.inf)] == [1.0, 5.0]


def test_the_end_of_an_old_connection_does_not_touch_the_new_one_of_the_same_name() -> None:
    edge, old, new = an_edge(), Client("a"), Client("a")
    edge.connect(old, will=None, at_s=1000.0)
    edge.subscribe(old, "x/+", arrives_s=1000.0)
    edge.connect(new, will=None, at_s=1000.0)
    edge.take(Download("a", "x/1", b"not asked for"))
    edge.subscribe(new, "x/+", arrives_s=1000.0)
    edge.publish(new, "up", b"m", retain=False, arrives_s=1009.0)
    edge.disconnect(old, at_s=1000.0, clean=True)
    edge.take(Download("a", "x/1", b"m"))
    assert [payload for _, _, payload in new.told] == [b"m"]
    assert not old.told
    assert len(edge.take_uploads(math.inf)) == 1


def uploads_of_a_window(edge: ShardEdge) -> list[list[float]]:
    """What is taken in two windows, of uploads that arrive in and after the first."""
    client = Client("a")
    edge.connect(client, will=None, at_s=1000.0)
    for second in (0.5, 1.0, 1.5):
        edge.publish(client, "up", b"m", retain=False, arrives_s=1000.0 + second)
    edge.publish(client, "presence", b"m", retain=True, arrives_s=1000.2)
    return [[one.arrives_s for one in edge.take_uploads(end_s)] for end_s in (1.0, 2.0, 3.0)]


def test_an_upload_is_not_seen_before_the_window_in_which_it_arrives() -> None:
    assert uploads_of_a_window(an_edge()) == [[0.5], [1.0, 1.5], []]


def test_an_edge_that_hands_over_what_has_not_arrived_is_caught() -> None:
    broken = broken_copy("firmware_sim.fleet.edge", ("if one.arrives_s < until_s]", "]"))
    assert uploads_of_a_window(broken.ShardEdge(began_s=1000.0, now_s=lambda: 1000.0)) != [[0.5], [1.0, 1.5], []]


def test_the_next_arrival_is_known_so_that_its_window_is_not_skipped() -> None:
    edge, client = an_edge(), Client("a")
    assert edge.next_arrival_s() == math.inf
    edge.connect(client, will=None, at_s=1000.0)
    edge.publish(client, "up", b"m", retain=False, arrives_s=1007.0)
    edge.publish(client, "up", b"m", retain=False, arrives_s=1004.0)
    assert edge.next_arrival_s() == 4.0


@pytest.mark.parametrize("keep_retained", [True, False])
def test_a_broker_that_goes_down_cuts_everybody_and_takes_nobody_until_it_is_back(keep_retained: bool) -> None:
    edge, client = an_edge(), Client("a")
    edge.take(Download("", "x/y", b"m"))
    edge.connect(client, will=None, at_s=1000.0)
    edge.subscribe(client, "x/y", arrives_s=1000.0)
    edge.go_down(keep_retained=keep_retained)
    assert client.cuts == [1000.0]
    assert edge.connect(client, will=None, at_s=1000.0) is None
    edge.come_up()
    assert edge.connect(client, will=None, at_s=1000.0) is not None
    edge.take(Download("", "x/z", b"m"))
    assert len(client.told) == 1  # its subscriptions are gone
    edge.subscribe(client, "x/y", arrives_s=1000.0)
    assert len(client.told) == 1 + keep_retained
