"""How much and how often one device may send: a bucket of bytes and one of begun updates for each. Pure.

An honest device sends one update a round and repeats it rarely. One that begins update after update, or sends without
end, costs others their place; beyond its allowance its chunks are dropped unread, and it is named. Nor may senders fill
the journal: of refusals that are alike, most are only counted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fl_protocol.recency import happened_within

MOST_DEVICES = 100_000
"""Devices that are remembered; the one heard of least recently is forgotten, with a full allowance."""

FULL_AFTER_S = 60.0
"""After which a device that was silent may send as much as one that was never heard of."""
LEAST_CHUNK_BYTES = 1024
"""What a chunk is charged at least: an empty one is as much work as one of this size."""


@dataclass
class _Allowance:
    """What a device may still send."""

    bytes_left: float
    transfers_left: float
    as_of_s: float


class Throttle:
    """See the module docstring; each allowance is what a minute brings, and fills up within a minute.

    Args:
        bytes_a_minute: of chunks, each at least `LEAST_CHUNK_BYTES`.
        transfers_a_minute: updates begun.
    """

    def __init__(self, *, bytes_a_minute: int, transfers_a_minute: int) -> None:
        self._bytes, self._transfers = float(bytes_a_minute), float(transfers_a_minute)
        self._devices: OrderedDict[str, _Allowance] = OrderedDict()

    def why_not(self, device: str, num_bytes: int, *, begins: bool, now_s: float) -> str:
        """Charge a chunk to its device.

        Args:
            device: its sender.
            num_bytes: of the chunk.
            begins: whether it begins an update that is not being received.
            now_s: Unix seconds.

        Returns:
            Why it is not taken, in words; empty if it is.
        """
        left, charged = self._allowance(device, now_s), max(num_bytes, LEAST_CHUNK_BYTES)
        if begins and left.transfers_left < 1:
            return f"it began more than {self._transfers:g} updates in a minute"
        if left.bytes_left < charged:
            return f"it sent more than {self._bytes:g} bytes in a minute"
        left.bytes_left -= charged
        left.transfers_left -= begins
        return ""

    def forget(self, now_s: float) -> None:
        """Forget devices whose allowance is full again: that is what one that is not known has."""
        while self._devices:
            device, left = next(iter(self._devices.items()))
            if now_s - left.as_of_s < FULL_AFTER_S:
                break
            del self._devices[device]

    def _allowance(self, device: str, now_s: float) -> _Allowance:
        """A device's allowance as of now."""
        left = self._devices.get(device)
        if left is None:
            left = self._devices[device] = _Allowance(self._bytes, self._transfers, now_s)
            if len(self._devices) > MOST_DEVICES:
                self._devices.popitem(last=False)
        self._devices.move_to_end(device)
        # A clock that was set back gives nothing, and does not take until it has caught up.
        minutes = max(0.0, now_s - left.as_of_s) / FULL_AFTER_S
        left.bytes_left = min(self._bytes, left.bytes_left + minutes * self._bytes)
        left.transfers_left = min(self._transfers, left.transfers_left + minutes * self._transfers)
        left.as_of_s = now_s
        return left


@dataclass
class _Said:
    """When something was told, and what was left out since: how often, and the last of it."""

    at_s: float
    num_left_out: int = 0
    fields: Mapping[str, object] | None = None


class Repetitions:
    """Which of the things that are told over and over are told, and how many were left out. Pure.

    Every one is either told or counted in the `repeated` of one that is: 1 + `repeated` add up to all of them.

    Args:
        every_s: what is alike is told at most this often.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._said: dict[tuple[str, str], _Said] = {}

    def tell(self, kind: tuple[str, str], fields: Mapping[str, object], now_s: float) -> Mapping[str, object] | None:
        """Something happened.

        Args:
            kind: what is alike; the caller sees to it that there are not too many.
            fields: of what is to be told.
            now_s: Unix seconds.

        Returns:
            The fields to tell, with `repeated` if some were left out; None to tell nothing now.
        """
        said = self._said.get(kind)
        if said is None or not happened_within(self._every_s, said.at_s, now_s):
            self._said[kind] = _Said(now_s)
            return _with_repeated(fields, said.num_left_out if said is not None else 0)
        said.num_left_out, said.fields = said.num_left_out + 1, fields
        return None

    def overdue(self, now_s: float) -> Iterator[Mapping[str, object]]:
        """Fields of what was left out and not told for long, the last of each kind; forgets what is over."""
        over = {kind: said for kind, said in self._said.items() if not happened_within(self._every_s, said.at_s, now_s)}
        for kind, said in over.items():
            if said.fields is None:
                del self._said[kind]
                continue
            self._said[kind] = _Said(now_s)
            yield _with_repeated(said.fields, said.num_left_out - 1)


def _with_repeated(fields: Mapping[str, object], count: int) -> Mapping[str, object]:
    """Says how many more it stands for, if any."""
    return {**fields, "repeated": count} if count else fields
