"""Radios for tests: a place that changes at given times, links with round figures."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from firmware_sim.radio.links import LinkModel
from firmware_sim.radio.radio import Radio

WIFI = LinkModel(
    kind="wifi", up_bytes_per_s=1000, down_bytes_per_s=2000, latency_s=0.05, joules_per_byte_up=0.001,
    joules_per_byte_down=0.002,
)  # fmt: skip
CELLULAR = LinkModel(
    kind="cellular", metered=True, up_bytes_per_s=500, down_bytes_per_s=500, latency_s=0.1, tail_joules=10, tail_s=10
)


def radio(
    links: Mapping[str, LinkModel | None], moves: Sequence[tuple[float, str]] = ((0.0, "home"),), **options: Any
) -> Radio:
    """A radio whose device is at each place from a time on."""
    times = [from_s for from_s, _ in moves]

    def next_change_s(time_s: float) -> float:
        index = bisect_right(times, time_s)
        return times[index] if index < len(times) else math.inf

    return Radio(
        links,
        place=lambda time_s: moves[max(0, bisect_right(times, time_s) - 1)][1],
        next_place_change_s=next_change_s,
        **{"seed": 7, "device": "watch-1", **options},
    )
