"""The scenarios that come with covey: all are read, and small copies of three of them run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from firmware_sim.fleet.simulation import begin_run, simulate
from firmware_sim.fleet_metrics import FleetMetrics
from firmware_sim.scenario.loading import SHIPPED, load_scenario, shipped_scenarios

NAMES = {
    "first-round", "commuter-week", "hospital-ward", "mass-rollout", "broker-outage", "bad-firmware", "poisoners",
    "low-battery-winter", "cellular-only", "year-long", "enrolment-storm", "time-zone-herd", "lossy-network",
    "flaky-devices",
}  # fmt: skip


def test_the_promised_ones_are_there() -> None:
    assert {path.stem for path in shipped_scenarios()} >= NAMES


@pytest.mark.parametrize("path", shipped_scenarios(), ids=lambda path: path.stem)
def test_each_is_read_and_says_what_it_is_about(path: Path) -> None:
    loaded = load_scenario(path)
    assert loaded.scenario.name == path.stem
    assert loaded.scenario.about
    assert load_scenario(Path(path.stem)).text == loaded.text


def small(folder: Path, name: str, *, devices: int, rounds: int, cohort: int) -> FleetMetrics:
    """What a small copy of a scenario measures."""
    fields = msgspec.toml.decode((SHIPPED / f"{name}.toml").read_text())
    fields["devices"] = devices
    fields["task"] |= {"rounds": rounds, "goal": devices, "minimum_cohort": cohort}
    path = folder / f"{name}.toml"
    path.write_bytes(msgspec.toml.encode(fields))
    run = folder / "run"
    begun = begin_run(run, load_scenario(path))
    result = simulate(run, begun, engine="local", shards=1, told=lambda _: None, should_stop=lambda: False)
    assert result.metrics is not None
    assert not result.metrics.crashes
    return result.metrics


def test_a_ward_s_watches_all_take_part_at_once(tmp_path: Path) -> None:
    metrics = small(tmp_path, "hospital-ward", devices=6, rounds=1, cohort=6)
    assert [one.arrived for one in metrics.rounds] == [6]
    assert not metrics.blocked


def test_phones_without_wifi_pay_for_every_byte(tmp_path: Path) -> None:
    metrics = small(tmp_path, "cellular-only", devices=6, rounds=1, cohort=2)
    assert metrics.rounds[0].outcome == "committed"
    for one in metrics.profiles:
        assert one.bytes_metered == pytest.approx(one.bytes_up + one.bytes_down)
    assert sum(one.bytes_metered for one in metrics.profiles) > 0


def test_a_round_ends_over_a_network_that_loses_messages(tmp_path: Path) -> None:
    metrics = small(tmp_path, "lossy-network", devices=10, rounds=1, cohort=1)
    assert metrics.rounds[-1].outcome == "committed"
    assert metrics.deliveries["delivered"] >= 1
