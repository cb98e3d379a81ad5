"""What the processes of a live run tell, counted as a virtual run counts it: by the same chronicle and diaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from firmware_sim.fleet.build import index_of
from firmware_sim.fleet.chronicle import Chronicle
from firmware_sim.fleet.diary import Diary
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.fleet.windows import FleetEvent, Totals
from firmware_sim.settings import AGGREGATOR

PROFILE = "this machine"
_OVER = frozenset({"update_delivered", "update_expired", "update_refused", "update_given_up"})
_LAST = frozenset({"task_finished", "task_aborted", "task_paused"})


class LiveJournals:
    """Takes every event of every process.

    Args:
        began_s: Unix seconds of the beginning.
        goal: of the task's rounds.
        devices: by name.
    """

    def __init__(self, began_s: float, *, goal: int, devices: Sequence[str]) -> None:
        self.chronicle, self.totals = Chronicle(began_s=0.0, goal=goal), Totals()
        self.records = {name: DeviceRecord(index=index_of(name), name=name, profile=PROFILE) for name in devices}
        self.starts = 0
        self.ended_s: float | None = None
        """When the task ended, seconds of the run."""
        self._began_s, self._event_s = began_s, 0.0
        self._events: list[FleetEvent] = []
        self._diaries: dict[str, Diary] = {}
        self._pending = 0

    def take(self, source: str, event: dict[str, Any]) -> None:
        """Take an event.

        Args:
            source: name of the process.
            event: its fields, ``event`` and ``at_s`` among them.
        """
        kind, at_s = event["event"], event["at_s"]
        fields = {name: value for name, value in event.items() if name not in {"event", "at_s"}}
        # Journals tell milliseconds, rounded: nothing is before the beginning.
        self._event_s = max(0.0, round(at_s - self._began_s, 3))
        if source == AGGREGATOR:
            self._from_aggregator(kind, fields)
        elif source in self.records:
            self._from_device(source, kind, fields)

    def happened(self, text: str, *, at_s: float) -> None:
        """Something happened to a process, in words that begin with its name.

        Args:
            text: the words.
            at_s: seconds of the run.
        """
        name = text.split(maxsplit=1)[0]
        record = self.records.get(name)
        self._events.append(FleetEvent(at_s, name, record.profile if record else "", "crash", 0, 0.0, text))

    def events(self) -> list[FleetEvent]:
        """All that is worth a line, in any order."""
        return [*self._events, *self.chronicle.news]

    @property
    def is_settled(self) -> bool:
        """Whether every update that was made has come to its end, as far as was told."""
        return self._pending <= 0

    def _from_aggregator(self, kind: str, fields: dict[str, Any]) -> None:
        self.chronicle.write(kind, at_s=self._event_s, **fields)
        if kind in _LAST:
            self.ended_s = self._event_s

    def _from_device(self, name: str, kind: str, fields: dict[str, Any]) -> None:
        if kind == "study_started":
            self.starts += 1
        if name not in self._diaries:
            self._diaries[name] = Diary(self.records[name], lambda: self._event_s, self.totals, self._events.append)
        self._diaries[name].write(kind, at_s=self._event_s, **fields)
        self._pending += (kind == "trained") - (kind in _OVER)
        self._count_bytes(self.records[name], kind, fields)

    def _count_bytes(self, record: DeviceRecord, kind: str, fields: dict[str, Any]) -> None:
        """What journals tell of traffic: models and updates, without manifests, receipts, MQTT's and TLS's own."""
        if kind == "model_received":
            record.bytes_down += int(fields["bytes"])
        elif kind == "update_sent":
            record.bytes_up += int(fields["bytes"])
            record.sent += 1
