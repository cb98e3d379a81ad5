"""Whole studies of masked updates: real devices, aggregator and helpers on a virtual broker, in virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aggregator.task_file import Secure, TaskConfig
from tests.virtual_fleet import AGGREGATOR, Faults, VirtualFleet, task_config

HELPERS = ("helper-a", "helper-b")


def secure_task(**changes: Any) -> TaskConfig:
    """A task of masked updates."""
    section = Secure(**{"l2_norm_clip": 8.0, **changes.pop("secure", {})})
    return task_config(**{"engine": "secure", "secure": section, **changes})


def secure_fleet(folder: Path, *, devices: int = 3, faults: Faults | None = None, **changes: Any) -> VirtualFleet:
    """Devices that accept two helpers of two operators."""
    fleet = VirtualFleet(folder, devices=0, task=secure_task(**changes), helpers=HELPERS, faults=faults)
    for index in range(devices):
        fleet.start_device(f"watch-{index}", minimum_helpers=2, minimum_operators=2)
    return fleet


def test_a_study_of_masked_updates_makes_the_model_that_an_open_one_makes(tmp_path: Path) -> None:
    for name in ("secure", "open"):
        (tmp_path / name).mkdir()
    fleet = secure_fleet(tmp_path / "secure")
    fleet.run()
    plain = VirtualFleet(tmp_path / "open", devices=3)
    plain.run()
    # The same devices with the same randomness for their own noise, but for what rounding and masks drew.
    assert fleet.state.committed == plain.state.committed == 3
    first, other = fleet.params(1) - fleet.params(0), plain.params(1) - plain.params(0)
    step = 2.0**-6
    assert np.linalg.norm(first - other) < step * np.sqrt(len(first))
    assert np.linalg.norm(other) > 20 * step


def test_a_round_is_committed_as_soon_as_its_helpers_have_answered(tmp_path: Path) -> None:
    fleet = secure_fleet(tmp_path)
    told = fleet.journals[AGGREGATOR]
    for _ in fleet.steps(100):
        if told.named("round_unmasking"):
            break
        fleet.clock.time_s += 0.5
    assert told.named("round_unmasking")
    assert not told.named("round_committed")
    for _ in fleet.steps(2):  # no time passes
        pass
    assert told.named("round_committed")
