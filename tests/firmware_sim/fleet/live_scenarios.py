"""A small study for live runs: devices with recordings, masked updates, noise, and rounds that wait for everybody."""

from __future__ import annotations

from pathlib import Path

import msgspec

from firmware_sim.fleet.life_file import Lives, write_lives
from firmware_sim.fleet.live_folder import LiveFolder
from firmware_sim.fleet.simulation import begin_run
from firmware_sim.run_folder import RunFolder
from firmware_sim.scenario.loading import LoadedScenario, load_scenario

SMALL = """
name = "four-wearers"
seed = 7
devices = 4
days = 0.01
checkpoint_hours = 1
fidelity = "real"
model = "watch_features"
helpers = 1
history_days = 1.0
held_out_windows = 50

[task]
engine = "secure"
rounds = 3
goal = 4
minimum_cohort = 4
round_duration_s = 120.0

[task.secure]
l2_norm_clip = 2.0
noise_multiplier = 0.5

[task.plan]
sampling_rate = 0.5
local_steps = 2
learning_rate = 1.5
l2_norm_clip = 0.5
noise_multiplier = 4.0
expected_batch_size = 20.0

[task.server]
name = "fedavgm"
momentum = 0.9

[sensors]
kind = "synthetic"
"""


def small_scenario(folder: Path, **changes: object) -> LoadedScenario:
    """The study, with keys changed."""
    path = folder / "small.toml"
    path.write_bytes(msgspec.toml.encode(msgspec.toml.decode(SMALL) | changes))
    return load_scenario(path)


def configured(folder: Path, **changes: object) -> LiveFolder:
    """A live run's folder with its configurations and nothing else: no certificates, stores or recordings."""
    loaded = begin_run(folder / "run", small_scenario(folder, **changes))
    made = LiveFolder(RunFolder(folder / "run"), loaded)
    for name in ("aggregator", "devices", "helpers"):
        (folder / "run" / name).mkdir()
    made.configure(1883, tls=False)
    for device in made.devices:
        write_lives(made.run.device_toml(device).parent, Lives("7", device))
    return made
