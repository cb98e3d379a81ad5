"""What the aggregator tells its journal, as the run keeps it: its rounds, and why it refused updates. Picklable."""

from __future__ import annotations

from typing import Any

import msgspec

from firmware_sim.fleet.windows import FleetEvent
from firmware_sim.fleet_metrics import FleetRound

_TOLD = frozenset(
    {
        "aggregator_killed",
        "aggregator_started",
        "broker_down",
        "broker_up",
        "clock_jumped",
        "model_rolled_back",
        "round_aborted",
        "round_committed",
        "round_extended",
        "round_opened",
        "task_aborted",
        "task_finished",
        "task_paused",
        "update_refused",
    }
)
"""The journal's events that become a line of the table of events."""


class Chronicle(msgspec.Struct, kw_only=True):
    """`fl_protocol.adapters.journal.Journal` of a fleet's hub.

    Args:
        began_s: Unix seconds of the virtual beginning.
        goal: of the task's rounds.
        rounds: that came to an end.
        opened: seconds at which the rounds began that are open.
        refused: updates, by reason.
        news: events that were not taken yet.
        models: (round, version) of models that nobody has measured yet.
        measured: accuracy and loss of the model that a round made, by round.
        refused_devices: updates that were refused, by the name of who sent them.
        attack: how far attackers came, by the last model.
        last_round: that was opened; 0 before the first.
    """

    began_s: float
    goal: int
    rounds: list[FleetRound] = msgspec.field(default_factory=list)
    opened: dict[int, float] = msgspec.field(default_factory=dict)
    refused: dict[str, int] = msgspec.field(default_factory=dict)
    news: list[FleetEvent] = msgspec.field(default_factory=list)
    models: list[tuple[int, int]] = msgspec.field(default_factory=list)
    measured: dict[int, tuple[float, float]] = msgspec.field(default_factory=dict)
    refused_devices: dict[str, int] = msgspec.field(default_factory=dict)
    attack: dict[str, float] = msgspec.field(default_factory=dict)
    last_round: int = 0

    def write(self, event: str, /, *, at_s: float, **fields: Any) -> None:
        """Take one event."""
        now_s = at_s - self.began_s
        match event:
            case "round_opened":
                self.opened[fields["round"]] = now_s
                self.last_round = int(fields["round"])
            case "round_committed" | "round_aborted":
                self.rounds.append(self._ended(event, now_s, fields))
                if "version" in fields:
                    self.models.append((int(fields["round"]), int(fields["version"])))
            case "update_refused":
                reason = str(fields.get("reason", ""))
                count, sender = int(fields.get("count", 1)), str(fields.get("device", ""))
                self.refused[reason] = self.refused.get(reason, 0) + count
                self.refused_devices[sender] = self.refused_devices.get(sender, 0) + count
        if event in _TOLD:
            detail = str(fields.get("reason") or fields.get("model_digest") or "")
            device = str(fields.get("device", "aggregator"))
            arrived = float(fields.get("arrived", 0))
            self.news.append(FleetEvent(now_s, device, "", event, int(fields.get("round", 0)), arrived, detail))

    def take_news(self) -> list[FleetEvent]:
        """The events since the last call."""
        news, self.news = self.news, []
        return news

    def _ended(self, event: str, now_s: float, fields: dict[str, Any]) -> FleetRound:
        """A round that came to its end."""
        number = int(fields["round"])
        return FleetRound(
            task=str(fields.get("task", "")),
            round=number,
            outcome=event.removeprefix("round_"),
            reason=str(fields.get("reason", "")),
            opened_s=self.opened.pop(number, now_s),
            closed_s=now_s,
            arrived=int(fields.get("arrived", 0)),
            goal=self.goal,
            bytes_up=int(fields.get("bytes_up", 0)),
        )
