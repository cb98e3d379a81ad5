"""Messages that a network loses, repeats, swaps and corrupts; uploads that trickle; a flash that fails."""

from __future__ import annotations

from collections import Counter

import pytest

from firmware_sim.faults.flash_damage import damage
from firmware_sim.faults.kinds import CorruptedFlash
from firmware_sim.faults.packets import FaultyTransport, PacketRates
from firmware_sim.faults.trickling_edge import TricklingEdge
from firmware_sim.labelled_chance import key_of
from firmware_sim.radio.broker_edge import BrokerEdge
from firmware_sim.radio.links import IDEAL
from firmware_sim.radio.transport import RadioTransport
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from firmware_sim.virtual_device import VirtualClock
from firmware_sim.virtual_flash import VirtualFlash
from fl_protocol.transport import Connected, Received
from tests.firmware_sim.radio.links import radio

COUNT = 2000


def _sent(rates: PacketRates, *, up: bool, key: int = 1) -> list[tuple[int, bytes]]:
    """What comes of messages 0 to COUNT - 1, each with its number as payload and once more in its topic."""
    broker = VirtualBroker()
    plain, inner = VirtualTransport(broker), VirtualTransport(broker)

    def always() -> PacketRates:
        return rates

    faulty = FaultyTransport(inner, up=always, key=key) if up else FaultyTransport(inner, down=always, key=key)
    sender, receiver = (faulty, plain) if up else (plain, faulty)
    for one in (plain, faulty):
        one.open()
        assert one.poll(0.0) == Connected()
    receiver.subscribe("#")
    for number in range(COUNT):
        sender.publish(str(number), number.to_bytes(4, "big"))
    faulty.poll(0.0) if up else None  # what was overtaken last leaves when the device looks
    came = []
    while isinstance(event := receiver.poll(0.0), Received):
        came.append((int(event.topic), event.payload))
    return came


@pytest.mark.parametrize("up", [True, False])
def test_each_fault_comes_as_often_as_was_asked(up: bool) -> None:
    # Binomial(2000, 0.2): more than six standard deviations away has a probability of 2e-9.
    margin = 108
    lost = _sent(PacketRates(drop=0.2), up=up)
    assert abs(COUNT - len(lost) - 400) < margin
    twice = Counter(number for number, _ in _sent(PacketRates(repeat=0.2), up=up))
    assert set(twice) == set(range(COUNT))
    assert abs(sum(count == 2 for count in twice.values()) - 400) < margin
    wrong = [(n, raw) for n, raw in _sent(PacketRates(corrupt=0.2), up=up) if raw != n.to_bytes(4, "big")]
    assert abs(len(wrong) - 400) < margin
    assert {(n ^ int.from_bytes(raw, "big")).bit_count() for n, raw in wrong} == {1}
    swapped = [number for number, _ in _sent(PacketRates(reorder=0.2), up=up)]
    assert sorted(swapped) == list(range(COUNT))
    assert swapped != sorted(swapped)


def test_a_network_without_faults_changes_nothing() -> None:
    expected = [(number, number.to_bytes(4, "big")) for number in range(COUNT)]
    assert _sent(PacketRates(), up=True) == _sent(PacketRates(), up=False) == expected


def test_chance_follows_the_connection_and_the_message() -> None:
    rates = PacketRates(drop=0.2, repeat=0.2, reorder=0.2, corrupt=0.2)
    assert _sent(rates, up=True, key=3) == _sent(rates, up=True, key=3)
    assert _sent(rates, up=True, key=3) != _sent(rates, up=True, key=4)
    lost = {n for n, _ in _sent(PacketRates(drop=0.2), up=True, key=3)}
    with_others = {n for n, _ in _sent(PacketRates(drop=0.2, repeat=0.5, reorder=0.5), up=True, key=3)}
    assert lost == with_others


# Uploads that trickle.


def test_uploads_trickle_and_nothing_else_does() -> None:
    clock, broker = VirtualClock(0.0), VirtualBroker()
    edge = BrokerEdge(broker, now_s=clock.now_s)
    watcher = VirtualTransport(broker)
    watcher.open()
    watcher.subscribe("#")
    watcher.poll(0.0)
    slow = TricklingEdge(edge, gap_s=lambda at_s: 30.0 if at_s < 1_000 else 0.0, upload_prefix="fl/v1/clinic/up/")
    device = RadioTransport(radio({"home": IDEAL}), slow, now_s=clock.now_s)
    device.open()
    assert device.poll(0.0) == Connected()
    for index in range(3):
        device.publish(f"fl/v1/clinic/up/0/watch/id/{index}", b"chunk")
    device.publish("fl/v1/clinic/state/watch", b"here")
    device.close()
    came = {}
    for clock.time_s in (0.0, 29.0, 30.0, 59.0, 60.0):
        edge.advance()
        came[clock.time_s] = []
        while isinstance(event := watcher.poll(0.0), Received):
            came[clock.time_s].append(event.topic[-1])
    assert came == {0.0: ["0", "h"], 29.0: [], 30.0: ["1"], 59.0: [], 60.0: ["2"]}


# A flash that fails.


def _flash() -> VirtualFlash:
    flash = VirtualFlash(capacity_bytes=1_000_000)
    flash.make_folder("outbox")
    for name, length in (("ledger", 500), ("outbox/a", 10_000), ("outbox/b", 100), ("empty", 0)):
        flash.write(name, b"\xff" * length)
        flash.sync(name)
    for folder in ("", "outbox"):
        flash.sync_folder(folder)
    return flash


def test_bits_flip_in_the_named_files_only_and_for_good() -> None:
    flash = _flash()
    operations = flash.operations
    struck = damage(flash, CorruptedFlash(at_s=0, damage="bit_flips", files=("outbox/*",), bits=3), key=key_of(1))
    assert struck == ["outbox/a", "outbox/b"]
    assert flash.operations == operations
    for name in struck:
        assert sum(8 - byte.bit_count() for byte in flash.read(name) or b"") == 3
        assert flash.durable()[name] == flash.read(name)
    assert flash.read("ledger") == b"\xff" * 500


def test_a_torn_file_keeps_its_length_and_loses_its_end() -> None:
    flash = _flash()
    fault = CorruptedFlash(at_s=0, damage="torn", files=("outbox/a",))
    assert damage(flash, fault, key=key_of(5)) == ["outbox/a"]
    content = flash.read("outbox/a") or b""
    start = len(content.rstrip(b"\0"))
    assert len(content) == 10_000
    assert start in {0, 4096, 8192}
    assert content[:start] == b"\xff" * start


def test_the_same_strike_does_the_same_to_the_same_flash() -> None:
    fault = CorruptedFlash(at_s=0, damage="bit_flips", bits=5)
    contents = []
    for key in (7, 7, 8):
        flash = _flash()
        damage(flash, fault, key=key)
        contents.append(flash.durable())
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize("kind", ["full", "read_only"])
def test_a_full_or_read_only_flash_refuses(kind: str) -> None:
    flash = _flash()
    fault = CorruptedFlash(at_s=0, damage=kind)  # type: ignore[arg-type]
    assert damage(flash, fault, key=1) == []
    with pytest.raises(OSError, match=r"No space left|Read-only"):
        flash.append("ledger", b"more")
