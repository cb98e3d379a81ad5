"""A broker connection over a simulated radio. What every transport promises is in tests/contracts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from firmware_sim.radio import wire
from firmware_sim.radio.broker_edge import BrokerEdge
from firmware_sim.radio.links import IDEAL, Interval, LinkModel
from firmware_sim.radio.transport import RadioTransport
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from firmware_sim.virtual_device import VirtualClock
from fl_protocol.transport import Connected, Disconnected, Received, TransportEvent
from tests.enrolments import broken_copy
from tests.firmware_sim.radio.links import CELLULAR, WIFI, radio


class Air:
    """A broker, devices on radios, and time that goes from event to event."""

    def __init__(self, kind: Any = RadioTransport) -> None:
        self.clock, self.broker, self.kind = VirtualClock(0.0), VirtualBroker(), kind
        self.edge = BrokerEdge(self.broker, now_s=self.clock.now_s)
        self.watcher = VirtualTransport(self.broker)
        self.watcher.open()
        self.watcher.poll(0.0)
        self.watcher.subscribe("#")

    def device(
        self, link: LinkModel, moves: Sequence[tuple[float, str]] = ((0.0, "home"),), **options: Any
    ) -> RadioTransport:
        device: RadioTransport = self.kind(
            radio({"home": link, "town": CELLULAR}, moves, **options),
            self.edge,
            now_s=self.clock.now_s,
            will=("state/watch", b"gone"),
        )
        device.open()
        return device

    def run(self, device: RadioTransport, until_s: float) -> list[tuple[float, TransportEvent]]:
        """What the device is told until then, and when."""
        told: list[tuple[float, TransportEvent]] = []
        while True:
            self.edge.advance()
            while (event := device.poll(0.0)) is not None:
                told.append((self.clock.time_s, event))
            next_s = min(device.next_event_s(), self.edge.next_event_s())
            if next_s > until_s:
                self.clock.time_s = until_s
                return told
            self.clock.time_s = max(next_s, self.clock.time_s)

    def seen(self) -> list[tuple[str, bytes]]:
        """What came to the broker."""
        seen = []
        while isinstance(event := self.watcher.poll(0.0), Received):
            seen.append((event.topic, event.payload))
        return seen


def _kinds(told: list[tuple[float, TransportEvent]]) -> list[type[TransportEvent]]:
    return [type(event) for _, event in told]


def test_setting_a_connection_up_takes_its_bytes_and_three_round_trips() -> None:
    air = Air()
    device = air.device(WIFI)
    ((at_s, event),) = air.run(device, 60.0)
    up, down = wire.set_up()
    assert isinstance(event, Connected)
    assert at_s == pytest.approx(up / 1000 + down / 2000 + 3 * 0.1)
    assert device.use.joules == pytest.approx(up * 0.001 + down * 0.002 + _ping_joules(1))
    assert device.use.metered_bytes == 0


def _ping_joules(count: int) -> float:
    up, down = wire.ping()
    return count * (up * 0.001 + down * 0.002)


def test_a_message_is_seen_when_it_arrives_and_acknowledged_a_latency_later() -> None:
    air = Air()
    device = air.device(WIFI)
    air.run(device, 20.0)
    device.publish("up/1", bytes(10_000))
    takes_s = wire.publish(4, 10_000).forth / 1000 + 0.05
    air.run(device, 20.0 + takes_s - 0.01)
    assert (air.seen(), device.backlog()) == ([], 1)
    air.run(device, 20.0 + takes_s + 0.01)
    assert (air.seen(), device.backlog()) == ([("up/1", bytes(10_000))], 1)
    air.run(device, 20.0 + takes_s + 0.06)
    assert device.backlog() == 0


def test_a_download_arrives_when_the_radio_has_taken_it() -> None:
    air = Air()
    device = air.device(WIFI)
    air.run(device, 20.0)
    device.subscribe("down/1")
    air.run(device, 25.0)
    air.watcher.publish("down/1", bytes(20_000))
    told = air.run(device, 60.0)
    assert told == [(pytest.approx(25.05 + wire.publish(6, 20_000).forth / 2000), Received("down/1", bytes(20_000)))]


def test_the_connection_ends_with_its_link_and_comes_back_with_another() -> None:
    air = Air()
    device = air.device(WIFI, [(0.0, "home"), (100.0, "tunnel"), (200.0, "town")])
    told = air.run(device, 300.0)
    assert _kinds(told) == [Connected, Disconnected, Connected]
    assert told[1][0] == 100.0
    assert 200 < told[2][0] < 215
    assert air.seen() == [("state/watch", b"gone")]
    assert device.use.metered_bytes > sum(wire.set_up())


def test_what_is_under_way_when_the_link_goes_down_never_comes() -> None:
    air = Air()
    device = air.device(WIFI, [(0.0, "home"), (100.0, "tunnel")])
    air.run(device, 95.0)
    device.publish("up/1", bytes(1_000))
    device.publish("up/2", bytes(10_000))
    device.publish("up/3", bytes(1_000))
    assert device.backlog() == 3
    air.run(device, 1_000.0)
    assert air.seen() == [("up/1", bytes(1_000)), ("state/watch", b"gone")]
    assert device.backlog() == 0
    device.publish("up/4", b"nobody hears")
    assert device.backlog() == 0


def test_a_transport_that_sends_after_its_link_went_down_is_caught() -> None:
    copy = broken_copy("firmware_sim.radio.transport", ("if self._radio.free_s >= self._due_s:", "if False:"))
    air = Air(copy.RadioTransport)
    # The link changes from one second to the next: what waits would go over a connection that is no more.
    device = air.device(WIFI, [(0.0, "home"), (100.0, "town")])
    air.run(device, 95.0)
    device.publish("up/2", bytes(10_000))
    device.publish("up/3", b"small")
    air.run(device, 99.0)
    assert device._radio.state() != _radio_that_stopped(98.0)
    assert device._radio.free_s > 100.0


def _radio_that_stopped(after_s: float) -> bytes:
    """The radio's state where the transport is right: nothing begins after its link went down."""
    air = Air()
    device = air.device(WIFI, [(0.0, "home"), (100.0, "town")])
    air.run(device, 95.0)
    device.publish("up/2", bytes(10_000))
    device.publish("up/3", b"small")
    air.run(device, after_s)
    assert device._radio.free_s == 100.0
    return device._radio.state()


def test_a_device_that_dies_sends_no_more_and_leaves_its_will() -> None:
    air = Air()
    device = air.device(WIFI)
    air.run(device, 20.0)
    device.publish("up/1", bytes(10_000))
    air.run(device, 21.0)
    device.drop("the battery is empty")
    told = air.run(device, 100.0)
    assert _kinds(told) == [Disconnected]
    assert air.seen() == [("state/watch", b"gone")]


def test_a_goodbye_waits_for_what_was_handed_over_before_it() -> None:
    air = Air()
    device = air.device(WIFI)
    air.run(device, 20.0)
    device.publish("up/1", bytes(10_000))
    device.close()
    assert air.run(device, 100.0) == []
    assert air.seen() == [("up/1", bytes(10_000))]


def test_a_broker_that_is_away_is_asked_ever_more_rarely() -> None:
    air = Air()
    air.edge.is_up = False
    device = air.device(IDEAL)
    told = air.run(device, 100.0)
    assert [at_s for at_s, _ in told] == [0, 1, 3, 7, 15, 31, 63]
    assert {type(event) for _, event in told} == {Disconnected}
    air.edge.is_up = True
    assert _kinds(air.run(device, 200.0)) == [Connected]


def test_a_broker_s_restart_reaches_every_device() -> None:
    air = Air()
    device = air.device(IDEAL)
    air.run(device, 10.0)
    air.broker.restart(keep_retained=True)
    assert _kinds(air.run(device, 20.0)) == [Disconnected, Connected]


def _cut_off_in_the_middle_of_a_download(kind: Any) -> list[type[TransportEvent]]:
    air = Air(kind)
    device = air.device(WIFI)
    air.run(device, 20.0)
    device.subscribe("down/1")
    air.run(device, 25.0)
    air.watcher.publish("down/1", bytes(20_000))
    air.run(device, 28.0)
    air.broker.restart(keep_retained=True)
    return _kinds(air.run(device, 60.0))


def test_a_download_that_a_restart_cuts_off_never_arrives() -> None:
    assert _cut_off_in_the_middle_of_a_download(RadioTransport) == [Disconnected, Connected]


def test_a_transport_that_delivers_what_had_not_arrived_is_caught() -> None:
    change = ("for one in self._events if one[0] <= at_s]", "for one in self._events]")
    copy = broken_copy("firmware_sim.radio.transport", change)
    assert Received in _cut_off_in_the_middle_of_a_download(copy.RadioTransport)


def test_a_silent_connection_pings_twice_a_minute() -> None:
    air = Air()
    device = air.device(WIFI, [(0.0, "home"), (3_610.0, "nowhere")])
    air.run(device, 25.0)
    before = device.use.joules
    air.run(device, 4_000.0)
    assert device.use.joules - before == pytest.approx(_ping_joules(120), rel=0.01)


def test_pings_keep_a_cellular_radio_awake_a_third_of_the_time() -> None:
    air = Air()
    device = air.device(CELLULAR, [(0.0, "home"), (3_620.0, "nowhere")])
    air.run(device, 25.0)
    before = device.use.joules
    air.run(device, 4_000.0)
    assert device.use.joules - before == pytest.approx(120 * 10, rel=0.02)


def test_two_runs_are_alike_to_the_last_bit() -> None:
    def run() -> list[tuple[float, TransportEvent]]:
        air = Air()
        link = replace(WIFI, loss=0.2, jitter_s=0.5)
        device = air.device(link, [(0.0, "home"), (500.0, "town")], outages=[Interval(100, 150)])
        told = air.run(device, 30.0)
        for number in range(20):
            device.subscribe("down/#")
            air.watcher.publish(f"down/{number}", bytes(500), retain=True)
            device.publish(f"up/{number}", bytes(500))
            told += air.run(device, 30.0 + 40 * number)
        return [*told, (device.use.joules, Disconnected(repr(air.seen())))]

    assert run() == run()


def test_looking_more_often_changes_nothing() -> None:
    def run(*, looks_every_s: float) -> tuple[list[TransportEvent], list[tuple[str, bytes]], float]:
        air = Air()
        link = replace(WIFI, loss=0.2, jitter_s=0.5)
        device = air.device(link, [(0.0, "home"), (500.0, "nowhere"), (600.0, "town")], outages=[Interval(100, 150)])
        told = []
        for number in range(60):
            for look in range(1, round(20 / looks_every_s) + 1):
                told += [event for _, event in air.run(device, 20.0 * number + look * looks_every_s)]
                assert device.backlog() <= number
                assert device.use.joules >= 0
            device.publish(f"up/{number}", bytes(500))
        return told, air.seen(), device.use.joules

    seldom, often = run(looks_every_s=20), run(looks_every_s=0.5)
    assert len(seldom[1]) > 40
    assert seldom[:2] == often[:2]
    assert seldom[2] == pytest.approx(often[2])


def test_a_radio_without_any_link_waits_for_ever() -> None:
    air = Air()
    device = RadioTransport(radio({}), air.edge, now_s=air.clock.now_s)
    device.open()
    assert air.run(device, 1e6) == []
    assert device.next_event_s() == math.inf
    assert device.use.joules == 0
