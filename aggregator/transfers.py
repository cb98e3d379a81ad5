"""Half-received updates of all devices, under one cap, and the acknowledgements that wait for them. Pure.

Each device has caps of its own (`fl_protocol.chunking.Reassembler`); this one is for all of them together. Where it
leaves no room, the device that has gone longest without a new chunk gives way: it sends again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from fl_protocol.chunking import Reassembler
from fl_protocol.messages import ChunkMsg
from fl_protocol.transport import Received

Key = tuple[str, bytes]
"""A device and its update's id."""


class Transfers:
    """See the module docstring.

    Args:
        most_bytes: most that all half-received updates take together.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._open: OrderedDict[str, Reassembler] = OrderedDict()
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of all half-received updates."""
        return self._held_bytes

    def __contains__(self, key: Key) -> bool:
        device, update_id = key
        return device in self._open and update_id in self._open[device]

    def accept(self, device: str, chunk: ChunkMsg, now_s: float) -> list[bytes] | None:
        """Take one chunk; all of an update's data in order when it was the last one missing. Raises RefusedError."""
        mine = self._open.setdefault(device, Reassembler())
        before = mine.held_bytes
        try:
            return mine.accept_part(chunk, now_s)
        finally:
            self._held_bytes += mine.held_bytes - before
            if mine.held_bytes != before:  # one that repeats what it has sent does not keep its place by that
                self._open.move_to_end(device)
            if not len(mine):
                del self._open[device]
            while self._held_bytes > self._most_bytes:
                _, given_up = self._open.popitem(last=False)
                self._held_bytes -= given_up.held_bytes

    def forget_before(self, heard_s: float) -> None:
        """Drop updates whose last chunk came before this time."""
        for device, mine in list(self._open.items()):
            before = mine.held_bytes
            mine.forget_before(heard_s)
            self._held_bytes += mine.held_bytes - before
            if not len(mine):
                del self._open[device]

    def quiet_since(self, heard_s: float) -> Iterator[tuple[Key, bytes]]:
        """Updates whose last chunk came before this time, each with a bitmap of what is missing."""
        for device, mine in self._open.items():
            for update_id in mine.quiet_since(heard_s):
                yield (device, update_id), mine.missing(update_id)


class HeldMessages:
    """Messages that the broker is not told yet to forget: their update is not committed.

    A broker sends only so many messages before it wants some acknowledged, and acknowledgements go out in the order in
    which messages came. So the oldest are given up when too many are held, or too many have come behind one: the
    receipt is what proves delivery, and a device without one sends again.

    Args:
        most: messages that are held.
        most_behind: messages, held or not, that may come after the first one of an update.
    """

    def __init__(self, most: int, *, most_behind: int | None = None) -> None:
        self._most, self._most_behind = most, most_behind
        self._held: OrderedDict[Key, list[Received]] = OrderedDict()
        self._begun: dict[Key, int] = {}
        self._count = self._came = 0

    def hold(self, key: Key, message: Received) -> list[Received]:
        """Hold one; what has to be acknowledged in its place."""
        self._held.setdefault(key, []).append(message)
        self._begun.setdefault(key, self._came)
        self._count += 1
        given_up: list[Received] = []
        while self._count > self._most:
            given_up += self._pop_oldest()
        return given_up

    def passed_by(self, messages: int) -> list[Received]:
        """So many more have come; what has to be acknowledged, so that they are not held up by it."""
        self._came += messages
        given_up: list[Received] = []
        while self._most_behind is not None and self._held:
            if self._came - self._begun[next(iter(self._held))] <= self._most_behind:
                break
            given_up += self._pop_oldest()
        return given_up

    def release(self, key: Key) -> list[Received]:
        """What is held for an update, to be acknowledged when it is committed or refused."""
        released = self._held.pop(key, [])
        self._begun.pop(key, None)
        self._count -= len(released)
        return released

    def release_all(self) -> list[Received]:
        """Everything: the broker has stopped sending, and may be waiting for these."""
        released = [message for held in self._held.values() for message in held]
        self._held.clear()
        self._begun.clear()
        self._count = 0
        return released

    def _pop_oldest(self) -> list[Received]:
        """Give up the update that was begun first."""
        key, given_up = self._held.popitem(last=False)
        del self._begun[key]
        self._count -= len(given_up)
        return given_up
