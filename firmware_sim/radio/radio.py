"""One device's radio: which link it has when, and when what is sent over it arrives. Pure, seeded, small when asleep.

A device's transfers queue: the air is one. Jitter and loss follow from the device's key and the transfer's number, so
that neither sleep nor other devices change them. Over TCP a lost packet costs a retransmission: a round trip that
doubles each time (RFC 6298, 5.5), and a segment's energy. A transfer is lost for good only when its link goes down
before it has arrived.

A radio stays awake for a while after a transfer, which costs the tail energy; a transfer that begins in the tail pays
only for what it prolongs it by (J. Huang et al., "A Close Examination of Performance and Power Characteristics of 4G
LTE Networks", MobiSys 2012, section 4).
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from firmware_sim.labelled_chance import key_of, uniform
from firmware_sim.radio.links import DutyCycle, Interval, LinkModel
from firmware_sim.radio.wire import SEGMENT_BYTES, SEGMENT_HEADER_BYTES, WireBytes
from fl_protocol.errors import LocalMisuseError

_MOST_RETRANSMISSIONS = 15
"""As Linux gives up (net.ipv4.tcp_retries2)."""
_HORIZON_S = 43_200.0
"""So far ahead changes that leave the link as it was are looked over; one beyond that is named as the next change."""
_STATE = struct.Struct("<dddQ")
_LOSS, _JITTER, _DUTY = range(3)


class Transfer(NamedTuple):
    """What becomes of one transfer.

    Args:
        arrives_s: when its last byte is there; None: the link went down before.
        free_s: when the radio may send the next one.
        joules: that it cost the device, its tail included.
        link: that it went over; None if there was none.
    """

    arrives_s: float | None
    free_s: float
    joules: float
    link: LinkModel | None


class Radio:
    """One device's radio.

    Args:
        links: the link at each place; None, or no entry: no network there.
        place: where the device is, by Unix seconds.
        next_place_change_s: when it goes elsewhere, strictly after a time; infinity if never.
        duty_cycle: when the radio is on; None: always.
        outages: when there is no network at all.
        seed: of the run.
        device: its name.
    """

    __slots__ = (
        "_arrived_s", "_duty_cycle", "_free_s", "_key", "_links", "_next_place_change_s", "_number", "_outages",
        "_place", "_span",
    )  # fmt: skip

    def __init__(
        self,
        links: Mapping[str, LinkModel | None],
        *,
        place: Callable[[float], str],
        next_place_change_s: Callable[[float], float],
        duty_cycle: DutyCycle | None = None,
        outages: Sequence[Interval] = (),
        seed: int | str,
        device: str,
    ) -> None:
        self._links, self._place, self._next_place_change_s = links, place, next_place_change_s
        self._duty_cycle = duty_cycle
        self._outages = _merged(outages)
        self._key = key_of(seed, "radio", device)
        self._free_s, self._number = -math.inf, 0
        self._arrived_s = {True: -math.inf, False: -math.inf}
        self._span: tuple[float, float, LinkModel | None] = (math.inf, math.inf, None)

    def link_at(self, time_s: float) -> LinkModel | None:
        """The link at a time, if there is one."""
        begins_s, ends_s, link = self._span
        return link if begins_s <= time_s < ends_s else self._look(time_s)[0]

    def next_change_s(self, time_s: float) -> float:
        """When the link is another one than at `time_s`, strictly after it; infinity if never.

        One that is half a day away may be named early, when it changes nothing; none is named late.
        """
        begins_s, ends_s, link = self._span
        if not begins_s <= time_s < ends_s:
            link, ends_s = self._look(time_s)
            while ends_s - time_s < _HORIZON_S:
                later, until_s = self._look(ends_s)
                if later != link:
                    break
                ends_s = until_s
            self._span = (time_s, ends_s, link)
        return ends_s

    def send(self, num_bytes: int, now_s: float, *, up: bool = True, back_bytes: int = 0) -> Transfer:
        """Send, or receive.

        Args:
            num_bytes: on the wire (`firmware_sim.radio.wire`).
            now_s: when it is handed over; it leaves when all before it have left.
            up: away from the device.
            back_bytes: that answer it in the other direction: they take energy, and no time of their own.
        """
        begins_s = max(now_s, self._free_s)
        link = self.link_at(begins_s)
        if link is None:
            return Transfer(None, begins_s, 0.0, None)
        number, self._number = self._number, self._number + 1
        rate = link.up_bytes_per_s if up else link.down_bytes_per_s
        losses = self._losses(link, number)
        again = losses * min(num_bytes, SEGMENT_BYTES + SEGMENT_HEADER_BYTES)
        waits_s = link.round_trip_s * (2**losses - 1)
        leaves_s = begins_s + (num_bytes + again) / rate + waits_s
        arrives_s = leaves_s + link.latency_s + link.jitter_s * uniform(self._key, _JITTER, number)
        # TCP hands over in order: what jitter lets overtake waits.
        arrives_s = max(arrives_s, self._arrived_s[up])
        return self._settle(
            link, begins_s, leaves_s, arrives_s, _energy(link, num_bytes + again, back_bytes, up=up), up=up
        )

    def connect(self, cost: WireBytes, now_s: float) -> Transfer:
        """Set a connection up: TCP's, TLS 1.3's and MQTT's round trips, one after the other (RFC 8446, figure 1).

        Args:
            cost: `firmware_sim.radio.wire.set_up`.
            now_s: when it is begun.
        """
        begins_s = max(now_s, self._free_s)
        link = self.link_at(begins_s)
        if link is None:
            return Transfer(None, begins_s, 0.0, None)
        number, self._number = self._number, self._number + 1
        turns = 3 + 2 ** self._losses(link, number) - 1
        moves_s = cost.forth / link.up_bytes_per_s + cost.back / link.down_bytes_per_s
        jitter_s = link.jitter_s * uniform(self._key, _JITTER, number)
        ends_s = begins_s + moves_s + turns * link.round_trip_s + jitter_s
        return self._settle(link, begins_s, ends_s, ends_s, _energy(link, *cost, up=True), up=True)

    def pings(self, count: int, cost: WireBytes, *, every_s: float, last_s: float) -> float:
        """Pings of a silent connection, told afterwards; joules.

        Args:
            count: how many, at least 1.
            cost: of one, `firmware_sim.radio.wire.ping`.
            every_s: time between two.
            last_s: when the last one was.
        """
        link = self.link_at(last_s - (count - 1) * every_s)
        if link is None:
            return 0.0
        tails = self._tail(link, max(self._free_s, last_s - (count - 1) * every_s))
        later = link.tail_joules * (min(1.0, every_s / link.tail_s) if link.tail_s else 1.0)
        self._free_s = max(self._free_s, last_s)
        return count * _energy(link, *cost, up=True) + tails + (count - 1) * later

    @property
    def free_s(self) -> float:
        """When all that was handed over has left; minus infinity before anything was."""
        return self._free_s

    def state(self) -> bytes:
        """What has to be kept of a radio that sleeps: 32 bytes."""
        return _STATE.pack(self._free_s, self._arrived_s[True], self._arrived_s[False], self._number)

    def restore(self, state: bytes) -> None:
        """Go on where `state` was taken.

        Raises:
            LocalMisuseError: it is not such a state.
        """
        if len(state) != _STATE.size:
            raise LocalMisuseError(f"state: expected {_STATE.size} bytes, got {len(state)}")
        self._free_s, self._arrived_s[True], self._arrived_s[False], self._number = _STATE.unpack(state)

    def _look(self, time_s: float) -> tuple[LinkModel | None, float]:
        """The link at a time, and until when it is sure to be the same."""
        ends_s, is_out = self._next_place_change_s(time_s), False
        index = bisect_right(self._outages, time_s, key=lambda one: one.starts_s)
        if index and time_s < self._outages[index - 1].ends_s:
            is_out, ends_s = True, min(ends_s, self._outages[index - 1].ends_s)
        elif index < len(self._outages):
            ends_s = min(ends_s, self._outages[index].starts_s)
        link = self._links.get(self._place(time_s))
        if is_out or link is None:
            return None, ends_s
        for cycle, label in ((self._duty_cycle, 0), (link.duty, 1)):
            if cycle is not None:
                shift_s = cycle.period_s * uniform(self._key, _DUTY, label)
                is_on, edge_s = cycle.edges(time_s, shift_s=shift_s)
                ends_s = min(ends_s, edge_s)
                if not is_on:
                    return None, ends_s
        return link, ends_s

    def _losses(self, link: LinkModel, number: int) -> int:
        """How often a transfer has to be sent again: each time anew with the link's probability."""
        if link.loss == 0:
            return 0
        chance = uniform(self._key, _LOSS, number)
        return min(_MOST_RETRANSMISSIONS, int(math.log(chance) / math.log(link.loss))) if chance else 0

    def _settle(
        self, link: LinkModel, begins_s: float, leaves_s: float, arrives_s: float, joules: float, *, up: bool
    ) -> Transfer:
        """Take the radio until it has left, or until the link goes down under it."""
        joules += self._tail(link, begins_s)
        down_s = self.next_change_s(begins_s)
        if arrives_s > down_s:
            share = min(1.0, (down_s - begins_s) / (leaves_s - begins_s)) if leaves_s > begins_s else 1.0
            self._free_s = min(leaves_s, down_s)
            return Transfer(None, self._free_s, share * joules, link)
        self._free_s, self._arrived_s[up] = leaves_s, arrives_s
        return Transfer(arrives_s, leaves_s, joules, link)

    def _tail(self, link: LinkModel, begins_s: float) -> float:
        """Energy by which a transfer that begins now prolongs the time awake."""
        if link.tail_s == 0:
            return link.tail_joules
        return link.tail_joules * min(1.0, (begins_s - self._free_s) / link.tail_s)


def _energy(link: LinkModel, num_bytes: int, back_bytes: int, *, up: bool) -> float:
    """Energy of the bytes alone."""
    there, back = link.joules_per_byte_up, link.joules_per_byte_down
    return num_bytes * there + back_bytes * back if up else num_bytes * back + back_bytes * there


def _merged(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """The same times, apart from each other and in order."""
    merged: list[Interval] = []
    for one in sorted(intervals, key=lambda one: one.starts_s):
        if merged and one.starts_s <= merged[-1].ends_s:
            merged[-1] = Interval(merged[-1].starts_s, max(merged[-1].ends_s, one.ends_s))
        else:
            merged.append(one)
    return tuple(merged)
