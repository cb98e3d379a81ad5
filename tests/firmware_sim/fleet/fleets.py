"""Small fleets whose runs are compared byte by byte."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from firmware_sim.fleet.engines import Engine, InProcess
from firmware_sim.fleet.record import DeviceRecord, Image
from firmware_sim.fleet.run import EVENTS, FleetRun
from firmware_sim.fleet.simulation import SCENARIO, begin_run
from firmware_sim.fleet.windows import Totals
from firmware_sim.fleet_events import read_events
from firmware_sim.scenario.loading import load_scenario

HARDWARE = """
name = "hardware"
seed = 3
devices = 16
days = 0.6
begins = 2026-03-02T18:00:00Z
checkpoint_hours = 1
fidelity = "surrogate"
model = "watch_features"

[task]
engine = "open"
rounds = 3
goal = 6
minimum_cohort = 2
round_duration_s = 7200.0

[task.plan]
sampling_rate = 0.25
local_steps = 4
learning_rate = 0.5
l2_norm_clip = 1.0
noise_multiplier = 4.0
expected_batch_size = 32.0

[task.updates]
kem = "x25519"

[population]
job_period_hours = 2.0

[population.profiles]
smartwatch = 2
phone_midrange = 2
raspberry_pi_4 = 1

[[fault]]
kind = "crash"
target = 0.3
every_s = 5000.0

[[fault]]
kind = "packets"
target = 0.5
at_s = 0.0
for_s = 40000.0
repeat = 0.05
reorder = 0.05
"""
"""Watches, phones and gateways at night, some of which are killed now and then, and some have a bad network."""

HANDED = (
    HARDWARE.replace('name = "hardware"', 'name = "handed"\nwire = "off"\nheld_out_windows = 0\nhistory_days = 1.0')
    .replace('fidelity = "surrogate"', 'fidelity = "real"')
    .replace('model = "watch_features"', 'model = "watch_cnn"')
    .replace("repeat = 0.05", "drop = 0.7\nrepeat = 0.05")
    .replace("checkpoint_hours = 1", "checkpoint_hours = 0")
    .replace("rounds = 3\ngoal = 6", "rounds = 10\ngoal = 2")
    .replace("[task.updates]", "[task.asynchronous]\nmaximum_staleness = 5\n\n[task.updates]")
    + """
[sensors]
kind = "synthetic"
windows_per_day = 30.0
"""
)
"""The same devices, which train, and hand over models and updates in memory, where each vector has its own place.

A round ends while others' updates for it are on their way, and count later: when the run is put down there are some.
"""

REAL = """
name = "real"
seed = 3
devices = 5
days = 0.05
begins = 2026-03-02T18:00:00Z
fidelity = "real"
model = "watch_features"
helpers = 1
history_days = 1.0
held_out_windows = 0

[task]
engine = "secure"
rounds = 2
goal = 5
minimum_cohort = 3
round_duration_s = 300.0

[task.secure]
l2_norm_clip = 2.0

[task.plan]
sampling_rate = 0.5
local_steps = 2
learning_rate = 1.5
l2_norm_clip = 0.5
noise_multiplier = 4.0
expected_batch_size = 16.0

[sensors]
kind = "synthetic"
windows_per_day = 50.0
"""
"""Wearers who move, devices that train, and a helper that unmasks sums."""


@dataclass(frozen=True)
class Outcome:
    """What must not depend on how a fleet was simulated.

    Args:
        events: digest of the table of events.
        models: digests of the rounds' models.
        totals: of all devices.
        records: of each device. Of its files, their lengths only: HPKE draws its ephemeral keys from the operating
            system, and the ledger has the digests of what was sealed. Of vectors, their digests.
    """

    events: str
    models: tuple[str, ...]
    totals: Totals
    records: list[DeviceRecord]


def folder_of(path: Path, text: str, *, seed: int | None = None) -> Path:
    """A run's folder, with its scenario in it."""
    scenario = path.with_suffix(".toml")
    scenario.write_text(text)
    begin_run(path, load_scenario(scenario), seed=seed)
    return path


def prepared(folder: Path, engine: Engine) -> FleetRun:
    """A run, not begun or put down earlier."""
    return FleetRun(load_scenario(folder / SCENARIO), folder, engine)


def outcome(run: FleetRun) -> Outcome:
    """What came of a run that is at its end."""
    table = run.folder / EVENTS
    models = tuple(event.detail for event in read_events(table) if event.event == "round_committed")
    return Outcome(
        hashlib.sha256(table.read_bytes()).hexdigest(),
        models,
        run.totals,
        [_comparable(one) for one in run.records],
    )


def _comparable(record: DeviceRecord) -> DeviceRecord:
    """A record as an `Outcome` has it."""
    digests: Any = {name: hashlib.sha256(vector.tobytes()).digest() for name, vector in record.vectors.items()}
    flash, counter = _lengths(record.flash), _lengths(record.counter)
    return msgspec.structs.replace(record, flash=flash, counter=counter, vectors=digests)


def _lengths(image: Image) -> Image:
    """The files' names and lengths."""
    return {name: (length, ()) for name, (length, _) in image.items()}


def simulated(folder: Path, engine: Engine | None = None) -> Outcome:
    """What comes of a run that nobody disturbs."""
    engine = engine if engine is not None else InProcess(folder / SCENARIO)
    try:
        run = prepared(folder, engine)
        assert run.run()
        return outcome(run)
    finally:
        engine.close()
