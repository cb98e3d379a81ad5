"""A network that loses, repeats, swaps and corrupts messages, laid over any transport. Pure.

What happens to a message follows from the connection's key and the message's number. Design, section 1: the broker is
untrusted, so all of this may happen, and to TLS as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from firmware_sim.labelled_chance import bits, uniform
from fl_protocol.transport import Disconnected, Received, Transport, TransportEvent

_UP, _DOWN = range(2)
_DROP, _REPEAT, _CORRUPT, _REORDER, _BIT = range(5)


@dataclass(frozen=True)
class PacketRates:
    """How often, by chance, a network does each of these to a message: probabilities."""

    drop: float = 0.0
    repeat: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0

    def along_with(self, other: PacketRates) -> PacketRates:
        """Both at once, each by itself."""
        return PacketRates(
            _either(self.drop, other.drop),
            _either(self.repeat, other.repeat),
            _either(self.reorder, other.reorder),
            _either(self.corrupt, other.corrupt),
        )


class FaultyTransport:
    """`fl_protocol.transport.Transport` over another one.

    Args:
        inner: the connection.
        down: what happens to messages on their way in.
        up: what happens to those on their way out.
        key: of this connection (`firmware_sim.labelled_chance.key_of`); a device that connects again gets another one.
    """

    def __init__(
        self,
        inner: Transport,
        *,
        down: Callable[[], PacketRates] = PacketRates,
        up: Callable[[], PacketRates] = PacketRates,
        key: int,
    ) -> None:
        self._inner, self._down, self._up, self._key = inner, down, up, key
        self._numbers = [0, 0]
        self._later: deque[TransportEvent] = deque()
        self._held: list[Callable[[], None]] = []

    def open(self) -> None:
        """Open the connection."""
        self._inner.open()

    def poll(self, timeout_s: float) -> TransportEvent | None:
        """The next event that comes through."""
        self._release()
        while True:
            event = self._inner.poll(timeout_s)
            if event is None:
                return self._later.popleft() if self._later else None
            if isinstance(event, Disconnected):
                self._later.clear()
            if not isinstance(event, Received):
                return event
            passed = self._pass_down(event)
            if passed is not None:
                return passed

    def subscribe(self, topic_filter: str) -> None:
        """Subscribe."""
        self._inner.subscribe(topic_filter)

    def unsubscribe(self, topic_filter: str) -> None:
        """Unsubscribe."""
        self._inner.unsubscribe(topic_filter)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expires_s: int | None = None) -> None:
        """Publish, if the network lets it through."""
        rates, number = self._up(), self._next(_UP)
        if self._happens(rates.drop, _UP, number, _DROP):
            return
        if payload and self._happens(rates.corrupt, _UP, number, _CORRUPT):
            payload = self._corrupted(payload, _UP, number)
        times = 2 if self._happens(rates.repeat, _UP, number, _REPEAT) else 1

        def send() -> None:
            for _ in range(times):
                self._inner.publish(topic, payload, retain=retain, expires_s=expires_s)

        if self._happens(rates.reorder, _UP, number, _REORDER):
            self._held.append(send)
        else:
            send()
            self._release()

    def acknowledge(self, message: Received) -> None:
        """Acknowledge."""
        self._inner.acknowledge(message)

    def backlog(self) -> int:
        """Of the connection, and what is held back."""
        return self._inner.backlog() + len(self._held)

    def close(self) -> None:
        """Close the connection."""
        self._release()
        self._inner.close()

    def _release(self) -> None:
        """Send what another message has overtaken, or might have."""
        held, self._held = self._held, []
        for send in held:
            send()

    def _pass_down(self, message: Received) -> Received | None:
        """What comes through of a message now."""
        rates, number = self._down(), self._next(_DOWN)
        if self._happens(rates.drop, _DOWN, number, _DROP):
            self._inner.acknowledge(message)  # it never came as far as the broker, which would send it again
            return None
        if self._happens(rates.repeat, _DOWN, number, _REPEAT):
            self._later.append(message)
        if message.payload and self._happens(rates.corrupt, _DOWN, number, _CORRUPT):
            payload = self._corrupted(message.payload, _DOWN, number)
            message = Received(message.topic, payload, message.delivery)
        if self._happens(rates.reorder, _DOWN, number, _REORDER):
            self._later.append(message)
            return None
        return message

    def _next(self, direction: int) -> int:
        """A message's number."""
        self._numbers[direction] += 1
        return self._numbers[direction]

    def _happens(self, probability: float, direction: int, number: int, what: int) -> bool:
        return probability > 0 and uniform(self._key, direction, number, what) < probability

    def _corrupted(self, payload: bytes, direction: int, number: int) -> bytes:
        """With one bit flipped."""
        bit = bits(self._key, direction, number, _BIT) % (8 * len(payload))
        raw = bytearray(payload)
        raw[bit // 8] ^= 1 << bit % 8
        return bytes(raw)


def _either(one: float, other: float) -> float:
    """Probability that at least one of two happens."""
    return 1 - (1 - one) * (1 - other)
