"""The simulators' comparison: ratios from records, and that ours does the whole job or gives no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.peers.simulation_job import CNN_PARAMETERS, Job
from benchmarks.simulation import OURS, SCENARIO, ratios, with_devices
from benchmarks.simulation_covey import CoveyJob, scenario_of, times_of
from benchmarks.simulation_plot import plot
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


def test_a_week_of_other_devices_asks_for_as_large_a_share_of_them() -> None:
    text = with_devices(SCENARIO.read_text(), 1_000)
    assert "\ndevices = 1000\n" in text
    assert "\ngoal = 20\n" in text
    assert "\nminimum_cohort = 5\n" in text
    assert with_devices(text, 100_000) == SCENARIO.read_text()


def test_what_was_measured_is_drawn_and_what_failed_is_left_out(tmp_path: Path) -> None:
    growth = [
        {**record(kind, simulator, rate), "clients": clients}
        for kind, simulator, rate in (("real", "covey", 9.0), ("real", "pfl", None), ("noop", "covey_off", 600.0))
        for clients in (100, 300)
    ]
    weeks = [{"devices": devices, "seconds": devices / 100, "peak_pss_mb": 200.0} for devices in (1_000, 3_000)]
    plot({"growth": growth, "weeks": weeks}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wire", ["on", "off"])
def test_every_round_is_timed_and_has_every_clients_update(tmp_path: Path, wire: str) -> None:
    times = times_of(CoveyJob(Job("noop", clients=3, rounds=2, workers=1), wire), tmp_path)
    assert len(times) == 1 + 1 + 2  # the beginning, warm-up, two rounds
    assert times == sorted(times)


def test_a_job_of_more_parameters_is_one_of_so_many(tmp_path: Path) -> None:
    wanted = CoveyJob(Job("noop", clients=2, parameters=CNN_PARAMETERS + 5_000), OURS["million"][0][1])
    (tmp_path / "job.toml").write_bytes(msgspec.toml.encode(scenario_of(wanted, tmp_path)))
    assert load_scenario(tmp_path / "job.toml").bundle.manifest.num_parameters == CNN_PARAMETERS + 5_000
