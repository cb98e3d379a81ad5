"""Kinds of faults, as a scenario's ``[[fault]]`` tables say them. Frozen and strict; nothing happens here.

When: ``at_s`` (seconds since the run began) once; with ``every_s`` again and again, from ``at_s`` or the beginning on;
or ``probability``, of a strike in each day, for each device by itself, at any moment of the day. Whom: ``target``. How
long: ``for_s``.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Seconds = Annotated[float, Meta(ge=0)]
Duration = Annotated[float, Meta(gt=0)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1)]


_WHEN = ("at_s", "every_s", "probability")


class OfProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``{profile = "watch"}``: all devices of a profile."""

    profile: Annotated[str, Meta(min_length=1)]


class Timed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """When a fault strikes; see the module."""

    at_s: Seconds | None = None
    every_s: Annotated[float, Meta(ge=1)] | None = None
    probability: Probability | None = None

    def __post_init__(self) -> None:
        by_chance, by_plan = self.probability is not None, self.at_s is not None or self.every_s is not None
        if by_chance == by_plan:
            given = {key: value for key in _WHEN if (value := getattr(self, key)) is not None}
            raise ValueError(
                f"expected at_s (with or without every_s), or every_s, or probability, got {given or 'none'}"
            )
        for key in self.__struct_fields__:
            value = getattr(self, key)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key}: expected a finite number, got {value!r}")
        if self.every_s is not None and self.every_s < self.lasts_s:
            raise ValueError(f"every_s: expected at least for_s ({self.lasts_s:g}), got {self.every_s:g}")

    @property
    def lasts_s(self) -> float:
        """How long a strike lasts; 0: it is over at once."""
        return float(getattr(self, "for_s", 0.0))


class Aimed(Timed, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fault of devices.

    Args:
        target: ``"all"``, a share of the fleet (0 to 1, chosen by the seed), names of devices, or a profile.
    """

    target: Literal["all"] | Probability | tuple[str, ...] | OfProfile = "all"


class Crash(Aimed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="crash"):
    """The daemon is killed; its system starts it again."""


class Hang(Aimed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="hang"):
    """The device does nothing for so long, or until its hardware's watchdog resets it."""

    for_s: Duration = 3600.0


class RebootLoop(Aimed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="reboot_loop"):
    """The device restarts every `reboots_every_s`."""

    for_s: Duration
    reboots_every_s: Duration = 60.0


class ClockSkew(Aimed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="clock_skew"):
    """The clock jumps by `by_s`, negative: back; NTP undoes it where there is NTP."""

    by_s: float


class CorruptedFlash(Aimed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="corrupted_flash"):
    """The flash fails.

    Args: damage: ``bit_flips``, or ``torn`` (a file's end from some page on reads as zeros), at once and for good;
    ``full`` or ``read_only`` for `for_s`. files: patterns (``*``, ``?``) of the names that bits flip in, or that are
    torn. bits: that flip in each file.
    """

    damage: Literal["bit_flips", "torn", "full", "read_only"]
    files: Annotated[tuple[str, ...], Meta(min_length=1)] = ("*",)
    bits: Count = 1
    for_s: Duration = 3600.0


class Packets(Aimed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="packets"):
    """Messages are lost, repeated, swapped or corrupted, each with a probability.

    Args:
        direction: ``up``, away from the device, ``down`` or ``both``.
    """

    for_s: Duration
    drop: Probability = 0.0
    repeat: Probability = 0.0
    reorder: Probability = 0.0
    corrupt: Probability = 0.0
    direction: Literal["up", "down", "both"] = "both"


class SlowLoris(Aimed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="slow_loris"):
    """Uploads trickle in: `gap_s` between two chunks."""

    for_s: Duration
    gap_s: Duration = 30.0


class Partition(Aimed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="partition"):
    """Devices have no network."""

    for_s: Duration


class BrokerRestart(Timed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="broker_restart"):
    """The broker is away for `for_s`, and has forgotten what it is not said to keep."""

    for_s: Duration = 5.0
    keep_retained: bool = True
    keep_sessions: bool = False


class AggregatorKill(Timed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="aggregator_kill"):
    """The aggregator is killed, and started again `for_s` later."""

    for_s: Duration = 10.0


class EnrolmentStorm(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="enrolment_storm"
):
    """All devices first appear within `for_s` of `at_s`."""

    at_s: Seconds = 0.0
    for_s: Duration


class TimeZoneHerd(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="time_zone_herd"
):
    """All wearers live in one time zone."""

    utc_offset_s: Annotated[float, Meta(ge=-43_200, le=50_400)] = 0.0


DeviceFault = Crash | Hang | RebootLoop | ClockSkew | CorruptedFlash | Packets | SlowLoris | Partition
ServiceFault = BrokerRestart | AggregatorKill
Fault = DeviceFault | ServiceFault | EnrolmentStorm | TimeZoneHerd
KINDS: dict[str, type[Fault]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (
        Crash, Hang, RebootLoop, ClockSkew, CorruptedFlash, Packets, SlowLoris, Partition, BrokerRestart,
        AggregatorKill, EnrolmentStorm, TimeZoneHerd,
    )
}  # fmt: skip
