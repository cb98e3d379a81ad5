"""All that goes dark together: the store's flash, the counter's, and the radio, under one count of operations.

Store and counter are folders of one `VirtualFlash`, so what survives a cut is of one moment; nothing that happens to a
file of one folder touches the other's. Every message and subscription is a boundary of that flash.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from firmware_sim.virtual_flash import VirtualFlash


class Partition:
    """`fl_protocol.durable.Disk`: one folder of a flash as a disk of its own."""

    def __init__(self, flash: VirtualFlash, folder: str) -> None:
        self._flash, self._folder = flash, folder

    def _in(self, name: str) -> str:
        return f"{self._folder}/{name}" if name else self._folder

    def read(self, name: str) -> bytes | None:
        return self._flash.read(self._in(name))

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        return self._flash.read_at(self._in(name), offset, length)

    def size(self, name: str) -> int | None:
        return self._flash.size(self._in(name))

    def write(self, name: str, data: bytes) -> None:
        self._flash.write(self._in(name), data)

    def append(self, name: str, data: bytes) -> None:
        self._flash.append(self._in(name), data)

    def write_at(self, name: str, offset: int, data: bytes) -> None:
        self._flash.write_at(self._in(name), offset, data)

    def truncate(self, name: str, length: int) -> None:
        self._flash.truncate(self._in(name), length)

    def sync(self, name: str) -> None:
        self._flash.sync(self._in(name))

    def rename(self, old: str, new: str) -> None:
        self._flash.rename(self._in(old), self._in(new))

    def remove(self, name: str) -> None:
        self._flash.remove(self._in(name))

    def make_folder(self, name: str) -> None:
        self._flash.make_folder(self._in(name))

    def sync_folder(self, name: str = "") -> None:
        self._flash.sync_folder(self._in(name))

    def names(self, prefix: str = "") -> Sequence[str]:
        start = f"{self._folder}/"
        return [name.removeprefix(start) for name in self._flash.names(start + prefix)]


def formatted_flash(random_seed: str) -> VirtualFlash:
    """A new flash with the two folders."""
    flash = VirtualFlash(random=Random(random_seed))  # noqa: S311 - a simulation's
    for folder in ("store", "counter"):
        flash.make_folder(folder)
    flash.sync_folder()
    return flash


@dataclass
class Radio:
    """The device's connections: whether there is a network, and what is on the air.

    Args:
        sent: told of every message of the device's, in the moment that the broker gets it.
        asked_for: told of every subscription.
    """

    broker: VirtualBroker
    sent: Callable[[str, bytes], None]
    asked_for: Callable[[str], None]
    is_up: bool = True
    was_used: bool = False
    transports: list[PoweredTransport] = field(default_factory=list)

    def connect(self, flash: VirtualFlash, will: tuple[str, bytes]) -> PoweredTransport:
        """A connection, not opened yet."""
        self.transports.append(PoweredTransport(self, flash, will=will))
        return self.transports[-1]

    def go_down(self) -> None:
        """The network is gone."""
        self.is_up = False
        for transport in self.transports:
            transport.drop("the network is gone")

    def come_up(self) -> None:
        """The network is back: connections are made again by themselves."""
        self.is_up = True
        for transport in self.transports:
            if transport.is_wanted:
                transport.reconnect()

    def lose_power(self) -> None:
        """The device is gone from the air without a word."""
        for transport in self.transports:
            transport.drop("the power is gone")
        self.transports.clear()


class PoweredTransport(VirtualTransport):
    """A connection in the power domain of a flash: what is sent is a moment at which the power can go."""

    def __init__(self, radio: Radio, flash: VirtualFlash, *, will: tuple[str, bytes]) -> None:
        super().__init__(radio.broker, will=will)
        self._radio, self._flash, self.is_wanted = radio, flash, False

    def open(self) -> None:
        self.is_wanted = True
        self._flash.boundary("connect", "the broker", self.reconnect)

    def reconnect(self) -> None:
        if self._radio.is_up:
            super().open()

    def close(self) -> None:
        self._flash.boundary("disconnect", "the broker", super().close)
        self.is_wanted = False
        if self in self._radio.transports:
            self._radio.transports.remove(self)

    def subscribe(self, topic_filter: str) -> None:
        def effect() -> None:
            self._radio.was_used = True
            self._radio.asked_for(topic_filter)
            super(PoweredTransport, self).subscribe(topic_filter)

        self._flash.boundary("subscribe", topic_filter, effect)

    def unsubscribe(self, topic_filter: str) -> None:
        self._flash.boundary("unsubscribe", topic_filter, lambda: VirtualTransport.unsubscribe(self, topic_filter))

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expires_s: int | None = None) -> None:
        def effect() -> None:
            if self.is_connected:
                self._radio.was_used = True
                self._radio.sent(topic, payload)
                super(PoweredTransport, self).publish(topic, payload, retain=retain, expires_s=expires_s)

        self._flash.boundary("publish", topic, effect)
