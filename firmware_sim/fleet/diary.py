"""What a device tells its journal, as the fleet counts it: totals by hour and reason, and the events worth a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.fleet.windows import FleetEvent, Totals

_HOUR_S = 3600.0
_AWAKE, _ELIGIBLE, _BEGAN, _DELIVERED = range(4)
_TOLD = frozenset(
    {
        "charged",
        "participation_ended",
        "store_failed",
        "study_stopped",
        "training_paused",
        "update_delivered",
        "update_expired",
        "update_given_up",
        "update_refused",
        "work_given_up",
    }
)
"""Journal's events that become a line of the table of events."""

_EVERY_END = "the daemon is stopped"
"""Why a daemon stops its studies when it ends as it should: worth no line."""


class Diary:
    """`fl_protocol.adapters.journal.Journal` of one device for one life of its daemon.

    Args:
        record: the device's.
        now_s: seconds of the shard's time; the device's own clock may be wrong.
        totals: the shard's, which are counted up.
        add: takes events.
        tells_all: whether every event becomes a line of the table, with all that was told of it.
    """

    def __init__(
        self,
        record: DeviceRecord,
        now_s: Callable[[], float],
        totals: Totals,
        add: Callable[[FleetEvent], None],
        *,
        tells_all: bool = False,
    ) -> None:
        self._record, self._now_s, self._totals, self._add = record, now_s, totals, add
        self._tells_all = tells_all
        self.count_awake()

    def count_awake(self) -> None:
        """Count the device as awake in this hour; to be called in every hour of a life."""
        self._count_hour(_AWAKE, self._totals.awake_hours)

    def write(self, event: str, /, *, at_s: float, **fields: Any) -> None:
        """Count an event, and tell of it if it is worth a line."""
        del at_s
        totals = self._totals
        match event:
            case "charged":
                self._count_hour(_ELIGIBLE, totals.eligible_hours)
                self._count_hour(_BEGAN, totals.began_hours)
            case "update_delivered":
                self._record.updates += 1
                self._count_hour(_DELIVERED, totals.delivered_hours)
                _count(totals.deliveries, "delivered")
            case "update_expired" | "update_refused":
                _count(totals.deliveries, event.removeprefix("update_"))
            case "round_skipped" | "participation_ended":
                _count(totals.declined, _first_words(str(fields["reason"])))
            case "eligibility":
                for rule in fields["blocked"]:
                    _count(totals.blocked, rule)
                if not fields["blocked"]:
                    self._count_hour(_ELIGIBLE, totals.eligible_hours)
        if self._tells_all:
            about = ", ".join(f"{name}={value}" for name, value in sorted(fields.items()))
            self.tell(event, round_number=int(fields.get("round") or 0), detail=about)
        elif event in _TOLD and fields.get("reason") != _EVERY_END:
            value = fields.get("epsilon")
            self.tell(
                event,
                round_number=int(fields.get("round") or 0),
                value=float(value) if value is not None else 0.0,
                detail=str(fields.get("reason") or ""),
            )

    def tell(self, event: str, *, round_number: int = 0, value: float = 0.0, detail: str = "") -> None:
        """Add a line to the table of events."""
        record = self._record
        self._add(FleetEvent(self._now_s(), record.name, record.profile, event, round_number, value, detail))

    def _count_hour(self, what: int, hours: dict[int, int]) -> None:
        """Count this device in this hour, once."""
        hour = int(self._now_s() // _HOUR_S)
        if self._record.hours[what] != hour:
            self._record.hours[what] = hour
            hours[hour] = hours.get(hour, 0) + 1


def _count(counts: dict[str, int], what: str) -> None:
    """One more."""
    counts[what] = counts.get(what, 0) + 1


def _first_words(reason: str) -> str:
    """A reason without its numbers, so that equal ones are counted together."""
    return reason.split(":", maxsplit=1)[0].split(",", maxsplit=1)[0][:80]
