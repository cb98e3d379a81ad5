"""Small fleets for tests: a scenario's text with what a test changes, and a run of it in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from firmware_sim.fleet.engines import InProcess
from firmware_sim.fleet.run import EVENTS, FleetRun
from firmware_sim.fleet.windows import FleetEvent
from firmware_sim.fleet_events import read_events
from firmware_sim.scenario.loading import load_scenario

BASE: dict[str, Any] = {
    "name": "small",
    "devices": 8,
    "days": 0.05,
    "fidelity": "noop",
    "model": "watch_features",
    "task": {
        "engine": "open",
        "rounds": 6,
        "goal": 8,
        "minimum_cohort": 4,
        "round_duration_s": 600.0,
        "plan": {
            "sampling_rate": 1.0,
            "local_steps": 1,
            "learning_rate": 1.0,
            "l2_norm_clip": 1.0,
            "noise_multiplier": 8.0,
            "expected_batch_size": 32.0,
        },
    },
}
"""Eight ideal devices, six rounds."""


@dataclass(frozen=True)
class Ran:
    """What a run left: its object, its events, and the bytes of their table."""

    run: FleetRun
    events: list[FleetEvent]
    table: bytes

    def of(self, *kinds: str) -> list[FleetEvent]:
        """The events of some kinds."""
        return [event for event in self.events if event.event in kinds]

    def count(self, kind: str) -> int:
        """How many events of a kind there are."""
        return len(self.of(kind))

    @property
    def arrived(self) -> int:
        """Updates that went into models, or that rounds had when they were given up."""
        return sum(one.arrived for one in self.run.chronicle.rounds)


def scenario_file(folder: Path, **changes: Any) -> Path:
    """A scenario's file in a folder: `BASE` with other keys."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scenario.toml"
    path.write_bytes(msgspec.toml.encode({**BASE, **changes}))
    return path


def ran(
    folder: Path, *, shards: int = 1, should_stop: Callable[[FleetRun], bool] = lambda run: False, **changes: Any
) -> Ran:
    """Run a scenario, or go on with the one whose run is in the folder."""
    path = folder / "scenario.toml"
    if not path.exists():
        scenario_file(folder, **changes)
    run = FleetRun(load_scenario(path), folder, InProcess(path, count=shards))
    run.should_stop = lambda: should_stop(run)
    run.run()
    return Ran(run, list(read_events(folder / EVENTS)), (folder / EVENTS).read_bytes())


HARDWARE: dict[str, Any] = {
    "population": {"profiles": {"raspberry_pi_zero_2_w": 1}},
    "eligibility": {"maximum_temperature_celsius": 85.0, "require_idle": False},
    "exchange_s": 2.0,
}
"""Changes that give every device a small computer on the mains instead of ideal surroundings."""
