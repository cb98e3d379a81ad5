"""What a run did, gathered from its processes' event logs; everything the display, metrics and report show comes from
here.

Pure but for `LogTail`, which reads the logs. A run that is resumed is gathered again from the start of its logs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from firmware_sim.settings import AGGREGATOR, DemoSettings

BUDGET_SPENT = "the privacy budget is spent"
"""How a ledger's refusal begins when there is nothing left."""


@dataclass
class RoundRecord:
    """One round as it was measured.

    Args:
        version: model version it led to; None while open or when aborted.
        unmasking_since_s: when it was closed and its helpers were first asked, Unix seconds; None if they were not.
        unmasking_s: from then to its commit, so asking, the helpers' sums, combining and storing; None if that was not
            told.
        epsilon_max: largest epsilon that any wrist had spent after it; None without noise.
    """

    number: int
    goal: int
    outcome: str = "open"
    reason: str = ""
    version: int | None = None
    arrived: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    unmasking_since_s: float | None = None
    unmasking_s: float | None = None
    mean_update_norm: float = 0.0
    epsilon_max: float | None = None


@dataclass
class ModelScore:
    """How a model version does on people it was never trained on: per wrist, (loss sum, correct, count)."""

    wrists: dict[str, tuple[float, int, int]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Fraction of all windows that is classified correctly."""
        return sum(correct for _, correct, _ in self.wrists.values()) / self.count

    @property
    def loss(self) -> float:
        """Mean loss over all windows."""
        return sum(loss for loss, _, _ in self.wrists.values()) / self.count

    @property
    def count(self) -> int:
        """Windows measured."""
        return sum(count for _, _, count in self.wrists.values())

    def by_person(self) -> dict[str, float]:
        """Accuracy of each person over both wrists."""
        totals: dict[str, list[int]] = {}
        for name, (_, correct, count) in self.wrists.items():
            total = totals.setdefault(name.split("-")[1].lstrip("0"), [0, 0])
            total[0] += correct
            total[1] += count
        return {
            person: correct / count for person, (correct, count) in sorted(totals.items(), key=lambda kv: int(kv[0]))
        }


class Observation:
    """The run so far."""

    def __init__(self, settings: DemoSettings) -> None:
        self.settings = settings
        self.rounds: dict[int, RoundRecord] = {}
        self.scores: dict[str, ModelScore] = {}  # by model digest
        self.versions: dict[str, int] = {}  # model digest -> version
        self.epsilon: dict[str, float] = {}  # by wrist
        self.delivered: dict[str, int] = {}  # by wrist
        self.refusals: dict[str, int] = {}
        self.helpers: dict[str, str] = {}  # operator by helper, as their signed keys say
        self.waits_for = ""  # why the open round is not published yet
        self.complaints: list[str] = []
        self.exhausted: set[str] = set()  # wrists whose ledger admits no further round
        self.finished_digest: str | None = None
        self.paused_because = ""
        self.first_s: float | None = None
        self.last_s: float = 0.0
        self._expected = {wrist.device_id for wrist in settings.held_out_wrists}

    @property
    def finished(self) -> bool:
        """The task is finished and every held-out wrist has measured the finished model."""
        return self.finished_digest is not None and self.score_of(self.finished_digest) is not None

    @property
    def is_stuck(self) -> bool:
        """Too few wrists have budget left for a round: rounds that abort cost privacy too."""
        left = len(self.settings.training_wrists) - len(self.exhausted)
        return self.finished_digest is None and left < self.settings.minimum_cohort

    def score_of(self, digest: str | None) -> ModelScore | None:
        """The score of a model, once all held-out wrists have measured it."""
        score = self.scores.get(digest) if digest is not None else None
        return score if score is not None and set(score.wrists) == self._expected else None

    def score_of_version(self, version: int) -> ModelScore | None:
        """The same by version."""
        digest = next((digest for digest, known in self.versions.items() if known == version), None)
        return self.score_of(digest)

    def score_after(self, record: RoundRecord) -> ModelScore | None:
        """The score of the model that was published after a round: the finished model after the last one."""
        if record.version is None:
            return None
        if record.version == self.settings.rounds:
            return self.score_of(self.finished_digest)
        return self.score_of_version(record.version)

    def latest_score(self) -> ModelScore | None:
        """The newest complete score."""
        for version in sorted(self.versions.values(), reverse=True):
            score = self.score_of_version(version)
            if score is not None:
                return score
        return None

    def take(self, source: str, event: dict[str, Any]) -> None:
        """Take one event of one process."""
        self.first_s = event["at_s"] if self.first_s is None else min(self.first_s, event["at_s"])
        self.last_s = max(self.last_s, event["at_s"])
        handler = getattr(self, f"_{event['event']}", None)
        if handler is not None:
            handler(source, event)

    def _round(self, event: dict[str, Any]) -> RoundRecord:
        """The record of an event's round."""
        number = int(event["round"])
        return self.rounds.setdefault(number, RoundRecord(number, len(self.settings.training_wrists)))

    def _task_loaded(self, _source: str, event: dict[str, Any]) -> None:
        """A killed aggregator may have closed a round without telling; what it says at its next start settles it."""
        first_open = event["round"] + 1 if event["phase"] == "finished" else event["round"]
        for number in range(1, first_open):
            record = self._round({"round": number})
            if record.outcome == "open":
                committed = sum(known.outcome == "committed" for known in self.rounds.values())
                if committed < event["committed"]:
                    record.outcome, record.version = "committed", committed + 1
                else:
                    record.outcome, record.reason = "aborted", "the aggregator ended before it could say why"

    def _round_opened(self, _source: str, event: dict[str, Any]) -> None:
        self.waits_for = ""
        record = self._round(event)
        record.goal = event["goal"]
        self.versions.setdefault(event["model_digest"], event["version"])

    def _waiting_for_helpers(self, _source: str, event: dict[str, Any]) -> None:
        self.waits_for = event["reason"]

    def _helper_key(self, _source: str, event: dict[str, Any]) -> None:
        self.helpers[event["helper"]] = event["operator"]

    def _helper_message_refused(self, source: str, event: dict[str, Any]) -> None:
        self.complaints.append(f"{source}: {event['kind']} of {event['helper']} refused: {event['reason']}")

    def _unmask_refused(self, source: str, event: dict[str, Any]) -> None:
        about = f"round {event['round']}" if event["round"] else "a request"
        self.complaints.append(f"{source}: does not unmask {about}: {event['reason']}: {event['detail']}")

    def _request_ignored(self, source: str, event: dict[str, Any]) -> None:
        self.complaints.append(f"{source}: a request is ignored: {event['reason']}")

    def _round_extended(self, _source: str, _event: dict[str, Any]) -> None:
        self.waits_for = ""  # the round is published

    def _round_unmasking(self, _source: str, event: dict[str, Any]) -> None:
        record = self._round(event)
        if record.unmasking_since_s is None:  # told again when helpers are asked again
            record.unmasking_since_s = event["at_s"]

    def _update_accepted(self, _source: str, event: dict[str, Any]) -> None:
        self.waits_for = ""
        record = self._round(event)
        if record.outcome != "open":
            return  # told after its round had closed, which has said how many there were
        record.arrived += 1
        record.bytes_up += event["bytes"]

    def _round_committed(self, _source: str, event: dict[str, Any]) -> None:
        record = self._round(event)
        record.outcome, record.version = "committed", event["version"]
        record.arrived, record.bytes_up = event["arrived"], event["bytes_up"]
        record.seconds, record.mean_update_norm = event["seconds"], event["mean_update_norm"]
        if record.unmasking_since_s is not None:
            record.unmasking_s = round(event["at_s"] - record.unmasking_since_s, 3)
        self.versions[event["model_digest"]] = event["version"]

    def _round_aborted(self, _source: str, event: dict[str, Any]) -> None:
        record = self._round(event)
        record.outcome, record.reason = "aborted", event["reason"]

    def _task_finished(self, _source: str, event: dict[str, Any]) -> None:
        self.finished_digest = event["model_digest"]
        self.versions.setdefault(event["model_digest"], event["version"])

    def _task_paused(self, _source: str, event: dict[str, Any]) -> None:
        self.paused_because = event["reason"]

    def _degraded(self, source: str, event: dict[str, Any]) -> None:
        self.complaints.append(f"{source}: {event['reason']}")

    def _update_refused(self, source: str, event: dict[str, Any]) -> None:
        if source == AGGREGATOR:
            self.refusals[event["reason"]] = self.refusals.get(event["reason"], 0) + 1

    def _trained(self, source: str, event: dict[str, Any]) -> None:
        epsilon = event["epsilon"]
        if epsilon is not None:  # JSON has no infinity: without noise nothing is claimed
            self.epsilon[source] = epsilon
            record = self._round(event)
            record.epsilon_max = max(record.epsilon_max or 0.0, epsilon)

    def _model_received(self, _source: str, event: dict[str, Any]) -> None:
        self._round(event).bytes_down += event["bytes"]

    def _update_delivered(self, source: str, _event: dict[str, Any]) -> None:
        self.delivered[source] = self.delivered.get(source, 0) + 1

    def _evaluated(self, source: str, event: dict[str, Any]) -> None:
        score = self.scores.setdefault(event["model_digest"], ModelScore())
        score.wrists[source] = (event["loss_sum"], event["correct"], event["count"])
        if event["status"] == "finished":  # signed by the aggregator, which may have been killed before it told
            self._task_finished(source, {**event, "version": self.settings.rounds + 1})

    def _participation_ended(self, source: str, event: dict[str, Any]) -> None:
        if event["reason"].startswith(BUDGET_SPENT):
            self.exhausted.add(source)
        self.complaints.append(f"{source}: {event['reason']}")

    def _round_skipped(self, source: str, event: dict[str, Any]) -> None:
        if event["reason"].startswith(BUDGET_SPENT):
            self._participation_ended(source, event)

    def _store_failed(self, source: str, event: dict[str, Any]) -> None:
        self.complaints.append(f"{source}: {event['reason']}")

    def _message_refused(self, source: str, event: dict[str, Any]) -> None:
        self.complaints.append(f"{source}: {event['reason']}")


class LogTail:
    """New whole lines of one growing log."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self._path, self._offset = name, path, 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Events that were appended since the last call."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                raw = stream.read()
        except FileNotFoundError:
            return
        whole = raw[: raw.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                yield msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError:
                continue  # a line that a kill -9 tore, followed by the restarted process's first line
