"""What a radio is connected over, and when: links, duty cycles, intervals. Frozen and validated."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fl_protocol.errors import LocalMisuseError

LinkKind = Literal["wifi", "cellular", "ble_tether", "ethernet"]

_Rate = Annotated[float, Meta(gt=0)]
_NotNegative = Annotated[float, Meta(ge=0)]


_NOT_NEGATIVE = (
    "latency_s", "jitter_s", "loss", "joules_per_byte_up", "joules_per_byte_down", "tail_joules", "tail_s",
)  # fmt: skip


class DutyCycle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """On for `on_s` of every `period_s`; each device at its own moment of the period.

    Args:
        period_s: above 0.
        on_s: above 0, at most `period_s`.
    """

    period_s: _Rate
    on_s: _Rate

    def __post_init__(self) -> None:
        if not 0 < self.on_s <= self.period_s:
            raise LocalMisuseError(f"on_s: expected above 0, at most period_s ({self.period_s:g}), got {self.on_s:g}")

    def edges(self, time_s: float, *, shift_s: float) -> tuple[bool, float]:
        """Whether it is on at a time, and when that changes next.

        Args:
            time_s: Unix seconds.
            shift_s: the device's moment of the period.
        """
        if self.on_s == self.period_s:
            return True, math.inf
        number = math.floor((time_s - shift_s) / self.period_s)
        for period in (number - 1, number, number + 1):  # the quotient is rounded
            begins_s = shift_s + period * self.period_s
            if time_s < begins_s:
                return False, begins_s
            if time_s < begins_s + self.on_s:
                return True, begins_s + self.on_s
        return False, shift_s + (number + 2) * self.period_s


class Interval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From `starts_s` up to, but not at, `ends_s`; Unix seconds."""

    starts_s: float
    ends_s: float

    def __post_init__(self) -> None:
        if not self.starts_s < self.ends_s:
            raise LocalMisuseError(f"ends_s: expected later than starts_s ({self.starts_s:g}), got {self.ends_s:g}")


class LinkModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to the broker.

    Args:
        kind: of the link.
        metered: whether somebody pays by the byte.
        up_bytes_per_s, down_bytes_per_s: above 0.
        latency_s: one way, from device to broker.
        jitter_s: most that is added to it, uniformly.
        loss: probability that a message has to be sent again by TCP, at least 0 and below 1.
        joules_per_byte_up, joules_per_byte_down: while bytes move.
        tail_joules, tail_s: after a transfer the radio stays awake for `tail_s`, which costs `tail_joules`.
        duty: where the link itself comes and goes, as a phone does that a watch is tethered to.
    """

    kind: LinkKind
    metered: bool = False
    up_bytes_per_s: _Rate
    down_bytes_per_s: _Rate
    latency_s: _NotNegative = 0.0
    jitter_s: _NotNegative = 0.0
    loss: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    joules_per_byte_up: _NotNegative = 0.0
    joules_per_byte_down: _NotNegative = 0.0
    tail_joules: _NotNegative = 0.0
    tail_s: _NotNegative = 0.0
    duty: DutyCycle | None = None

    def __post_init__(self) -> None:
        # msgspec checks ranges of what it decodes only.
        for name in ("up_bytes_per_s", "down_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise LocalMisuseError(f"{name}: expected above 0, got {getattr(self, name)!r}")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise LocalMisuseError(f"{name}: expected a number of at least 0, got {getattr(self, name)!r}")
        if not self.loss < 1:
            raise LocalMisuseError(f"loss: expected below 1, got {self.loss!r}")

    @property
    def round_trip_s(self) -> float:
        """There and back, without jitter."""
        return 2 * self.latency_s


IDEAL = LinkModel(kind="ethernet", up_bytes_per_s=math.inf, down_bytes_per_s=math.inf)
"""Takes no time, loses nothing and costs nothing."""
