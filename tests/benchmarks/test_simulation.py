"""The simulators' comparison: ratios from records, and that ours does the whole job or gives no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.peers.simulation_job import CNN_PARAMETERS, Job
from benchmarks.simulation import OURS, ratios
from benchmarks.simulation_covey import CoveyJob, scenario_of, times_of
from firmware_sim.scenario.loading import load_scenario


def record(kind: str, simulator: str, rate: float | None, memory: float = 100.0) -> dict[str, Any]:
    """Of one simulator that did one kind of job; with no rate, of one that failed."""
    return {"kind": kind, "simulator": simulator, "client_rounds_per_s": rate, "peak_pss_mb": memory}


def test_a_ratio_is_against_the_faster_of_a_peers_settings() -> None:
    records = [record("noop", "covey_off", 300.0), record("noop", "pfl", 100.0), record("noop", "pfl", 150.0)]
    assert ratios(records)["noop_over_pfl"] == 2.0


def test_memory_is_that_of_the_run_whose_rate_counts() -> None:
    records = [
        record("million", "covey_off", 10.0, 300.0),
        record("million", "flower_simulation", 5.0, 900.0),
    ]
    assert ratios(records)["rss_over_flower"] == pytest.approx(1 / 3)


def test_a_simulator_that_failed_has_no_ratio() -> None:
    found = ratios([record("real", "covey", 10.0), record("real", "pfl", None)])
    assert found["real_over_pfl"] is None
    assert found["real_over_flower"] is None


@pytest.mark.parametrize("wire", ["on", "off"])
def test_every_round_is_timed_and_has_every_clients_update(tmp_path: Path, wire: str) -> None:
    times = times_of(CoveyJob(Job("noop", clients=3, rounds=2, workers=1), wire), tmp_path)
    assert len(times) == 1 + 1 + 2  # the beginning, warm-up, two rounds
    assert times == sorted(times)


def test_a_job_of_more_parameters_is_one_of_so_many(tmp_path: Path) -> None:
    wanted = CoveyJob(Job("noop", clients=2, parameters=CNN_PARAMETERS + 5_000), OURS["million"][0][1])
    (tmp_path / "job.toml").write_bytes(msgspec.toml.encode(scenario_of(wanted, tmp_path)))
    assert load_scenario(tmp_path / "job.toml").bundle.manifest.num_parameters == CNN_PARAMETERS + 5_000
