"""``metrics.json``: a run's measurements as one document, and the struct that the report is drawn from."""

from __future__ import annotations

import msgspec

from firmware_sim.observation import Observation
from firmware_sim.settings import DemoSettings


class RoundMetrics(msgspec.Struct, frozen=True):
    """One round; accuracy and loss are of the model published after it, on the held-out people.

    `unmasking_s` of the `seconds` passed from its close to its commit; None with the engine open.
    """

    round: int
    outcome: str
    reason: str
    version: int | None
    arrived: int
    goal: int
    bytes_up: int
    bytes_down: int
    seconds: float
    unmasking_s: float | None
    mean_update_norm: float
    epsilon_max: float | None
    accuracy: float | None
    loss: float | None


class FinalMetrics(msgspec.Struct, frozen=True):
    """The finished model on the held-out people: fractions, and the number of windows measured."""

    version: int
    accuracy: float
    loss: float
    windows: int
    by_person: dict[str, float]
    by_wrist: dict[str, float]


class RunMetrics(msgspec.Struct, frozen=True):
    """A whole run.

    Args:
        helpers: who runs each helper that unmasks sums, by the helper's name; none with the engine open.
        noise_multiplier: that every wrist's ledger charged for.
        epsilon_spent: by training wrist, at `settings.delta`; empty without noise.
        refusals: updates the aggregator refused, by reason.
        peak_rss_mb: largest resident memory of each daemon, all its processes together.
        seconds: from the first event to the last, over all starts of the run.
    """

    covey: str
    broker: str
    settings: DemoSettings
    helpers: dict[str, str]
    noise_multiplier: float
    rounds: list[RoundMetrics]
    final: FinalMetrics | None
    epsilon_spent: dict[str, float]
    refusals: dict[str, int]
    complaints: list[str]
    peak_rss_mb: dict[str, float]
    seconds: float

    @property
    def unmasking_times_s(self) -> list[float]:
        """Of all rounds whose unmasking was told, shortest first."""
        return sorted(record.unmasking_s for record in self.rounds if record.unmasking_s is not None)

    @property
    def bytes_up_per_update(self) -> float | None:
        """Mean over all committed rounds; None where nothing was committed."""
        committed = [record for record in self.rounds if record.outcome == "committed"]
        arrived = sum(record.arrived for record in committed)
        return sum(record.bytes_up for record in committed) / arrived if arrived else None


def gather(observation: Observation, *, covey: str, broker: str, peak_rss_mb: dict[str, float]) -> RunMetrics:
    """The metrics of what was observed.

    Args:
        observation: everything the run's logs held.
        covey: version of the software.
        broker: what carried the messages, for people.
        peak_rss_mb: by process, as read from /proc before they were stopped.
    """
    rounds = []
    for record in sorted(observation.rounds.values(), key=lambda record: record.number):
        score = observation.score_after(record)
        rounds.append(
            RoundMetrics(
                round=record.number,
                outcome=record.outcome,
                reason=record.reason,
                version=record.version,
                arrived=record.arrived,
                goal=record.goal,
                bytes_up=record.bytes_up,
                bytes_down=record.bytes_down,
                seconds=record.seconds,
                unmasking_s=record.unmasking_s,
                mean_update_norm=record.mean_update_norm,
                epsilon_max=record.epsilon_max,
                accuracy=score.accuracy if score is not None else None,
                loss=score.loss if score is not None else None,
            )
        )
    return RunMetrics(
        covey=covey,
        broker=broker,
        settings=observation.settings,
        helpers=observation.settings.operators | dict(sorted(observation.helpers.items())),
        noise_multiplier=observation.settings.noise_multiplier,
        rounds=rounds,
        final=_final(observation),
        epsilon_spent=dict(sorted(observation.epsilon.items())),
        refusals=observation.refusals,
        complaints=observation.complaints[-100:],
        peak_rss_mb=dict(sorted(peak_rss_mb.items())),
        seconds=round(observation.last_s - (observation.first_s or observation.last_s), 1),
    )


def _final(observation: Observation) -> FinalMetrics | None:
    """The finished model's score, None while the task is not finished."""
    digest = observation.finished_digest
    score = observation.score_of(digest)
    if digest is None or score is None:
        return None
    return FinalMetrics(
        version=observation.versions[digest],
        accuracy=score.accuracy,
        loss=score.loss,
        windows=score.count,
        by_person=score.by_person(),
        by_wrist={name: correct / count for name, (_, correct, count) in sorted(score.wrists.items())},
    )
