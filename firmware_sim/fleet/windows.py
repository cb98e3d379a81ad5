"""What hub and shards hand to each other at the edges of a window of virtual time. Frozen, and small when pickled.

Times are seconds since the fleet's virtual beginning.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from firmware_sim.fleet.services import RUNNING, Services


class Upload(NamedTuple):
    """A message that a device published, as it arrives at the broker.

    Args:
        arrives_s: when.
        device: the sender's name on the wire.
        number: of this message among the sender's, so that what arrives at one time has an order.
        values: that are handed over beside it with ``wire = "off"``, uint8 [bytes].
    """

    arrives_s: float
    device: str
    number: int
    topic: str
    payload: bytes
    values: NDArray[np.uint8] | None = None


class Download(NamedTuple):
    """A message from the hub's broker.

    Args:
        device: whom it is for; empty for one that is retained, and for all who subscribe.
    """

    device: str
    topic: str
    payload: bytes


class Registration(NamedTuple):
    """A device that enrols: its name on the wire, and its public key."""

    device: str
    public_key: bytes


class FleetEvent(NamedTuple):
    """Something that a reader of the run may want to know of; see `firmware_sim.fleet_events`."""

    time_s: float
    device: str
    profile: str
    event: str
    round: int = 0
    value: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Window:
    """A stretch of virtual time in which a shard runs alone.

    Args:
        starts_s, ends_s: of it.
        down: what is at the devices' door at its beginning, in order.
        services: what is away in it.
    """

    starts_s: float
    ends_s: float
    down: tuple[Download, ...] = ()
    services: Services = RUNNING


@dataclass(frozen=True)
class WindowReport:
    """What came of a window in one shard.

    Args:
        up: what its devices sent, in any order.
        registrations: devices that enrolled.
        events: what happened, in any order.
        next_s: when something happens next by itself; infinity for never.
        starts: daemons that were started so far.
        awake: devices whose daemon runs now.
    """

    up: tuple[Upload, ...]
    registrations: tuple[Registration, ...]
    events: tuple[FleetEvent, ...]
    next_s: float
    starts: int = 0
    awake: int = 0


class Totals(msgspec.Struct, kw_only=True):
    """What a shard's devices did since the beginning; the totals of shards add up.

    Args:
        awake_hours, eligible_hours, began_hours, delivered_hours: by hour of the run, how many devices.
        blocked, declined, deliveries: by reason or outcome, as `firmware_sim.fleet_metrics.FleetMetrics` has them.
        turns: turns of daemons' loops.
        starts: daemons that were started.
    """

    awake_hours: dict[int, int] = msgspec.field(default_factory=dict)
    eligible_hours: dict[int, int] = msgspec.field(default_factory=dict)
    began_hours: dict[int, int] = msgspec.field(default_factory=dict)
    delivered_hours: dict[int, int] = msgspec.field(default_factory=dict)
    blocked: dict[str, int] = msgspec.field(default_factory=dict)
    declined: dict[str, int] = msgspec.field(default_factory=dict)
    deliveries: dict[str, int] = msgspec.field(default_factory=dict)
    turns: int = 0
    starts: int = 0


def merged_uploads(reports: Iterable[WindowReport]) -> list[Upload]:
    """All shards' uploads by arrival, then device, then order of sending: however many shards there are."""
    return sorted((upload for report in reports for upload in report.up), key=lambda one: one[:3])


def added_up(totals: Iterable[Totals]) -> Totals:
    """The totals of all shards together."""
    result = Totals()
    for one in totals:
        for name in Totals.__struct_fields__:
            mine: Any = getattr(result, name)
            other: Any = getattr(one, name)
            if isinstance(mine, dict):
                for key, count in other.items():
                    mine[key] = mine.get(key, 0) + count
            else:
                setattr(result, name, mine + other)
    return result
