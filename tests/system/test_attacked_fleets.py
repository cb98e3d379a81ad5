"""Fleets with hostile devices against the real aggregator: what hurts, what is outvoted, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator import committer
from firmware_sim.fleet.engines import InProcess
from firmware_sim.fleet.run import EVENTS
from firmware_sim.fleet.simulation import SCENARIO, begin_run, simulate
from firmware_sim.fleet_events import read_events
from firmware_sim.fleet_metrics import FleetMetrics
from firmware_sim.scenario.loading import load_scenario
from fl_protocol.errors import ConfigError
from tests.enrolments import broken_copy
from tests.firmware_sim.fleet.fleets import folder_of, simulated

BASE = """
name = "attacked"
seed = 3
devices = {devices}
days = 0.02
checkpoint_hours = 2
fidelity = "{fidelity}"
model = "watch_features"
held_out_windows = 200
[task]
engine = "open"
rounds = 2
goal = {goal}
minimum_cohort = 4
round_duration_s = 120.0
[task.plan]
sampling_rate = 1.0
local_steps = 1
learning_rate = 1.5
l2_norm_clip = 0.5
noise_multiplier = 0.3
expected_batch_size = 100.0
[task.rule]
{rule}
[privacy]
epsilon = 100000.0
[sensors]
kind = "{sensors}"
windows_per_day = 20.0
"""
MEAN, MEDIAN = 'name = "mean"', 'name = "median"\nbyzantine_fraction = 0.2\nmix_neighbours = true'
FLIPPERS = """
[[attacker]]
kind = "sign_flip"
devices = ["device-0000002", "device-0000007", "device-0000011"]
scale = 20.0
"""


def run_of(
    folder: Path, attackers: str, *, rule: str = MEAN, devices: int = 10, goal: int = 10, real: bool = True
) -> FleetMetrics:
    text = BASE.format(
        devices=devices,
        goal=goal,
        rule=rule,
        fidelity="real" if real else "noop",
        sensors="synthetic" if real else "none",
    )
    path = folder / "attacked.toml"
    path.write_text(text + attackers, encoding="utf-8")
    kept = begin_run(folder / "run", load_scenario(path))
    result = simulate(
        kept.path.parent, kept, engine="local", shards=1, told=lambda _progress: None, should_stop=lambda: False
    )
    assert result.metrics is not None
    assert [one.outcome for one in result.metrics.rounds] == ["committed"] * 2
    assert not result.metrics.crashes
    return result.metrics


def accuracy_of(metrics: FleetMetrics) -> float:
    accuracy = metrics.rounds[-1].accuracy
    assert accuracy is not None
    return accuracy


def test_a_fifth_of_sign_flippers_ruins_the_mean_and_costs_the_median_of_neighbours_little(tmp_path: Path) -> None:
    found = {}
    for name, attackers, rule in (
        ("honest mean", "", MEAN),
        ("attacked mean", FLIPPERS, MEAN),
        ("honest median", "", MEDIAN),
        ("attacked median", FLIPPERS, MEDIAN),
    ):
        (tmp_path / name).mkdir()
        metrics = run_of(tmp_path / name, attackers, rule=rule, devices=15, goal=15)
        assert metrics.attack == ({"sign_flip": 3.0} if attackers else {})
        found[name] = accuracy_of(metrics)
    assert found["honest mean"] > 0.5  # of seven labels
    assert found["attacked mean"] < 0.6 * found["honest mean"]
    # Beside the mean without an attack, and beside the same rule: with few devices that differ, it costs accuracy
    # itself.
    assert found["attacked median"] > 0.9 * found["honest mean"]
    assert found["attacked median"] > 0.9 * found["honest median"]


def check_replays_are_refused(folder: Path) -> None:
    replay = '\n[[attacker]]\nkind = "replay"\ndevices = ["device-0000001", "device-0000003"]\nafter_s = 1.0\n'
    metrics = run_of(folder, replay, devices=6, goal=7, real=False)  # the round stays open while they come
    assert metrics.attack["replay"] == 2.0
    assert metrics.attack["replays_sent"] == 2 * 2 * 2  # devices, own and neighbour's, rounds
    assert metrics.attack["replays_refused"] == metrics.attack["replays_sent"] == sum(metrics.refused.values())
    assert [one.arrived for one in metrics.rounds] == [6, 6]
    assert metrics.deliveries == {"delivered": 12}


def test_every_replayed_update_is_refused_and_counted(tmp_path: Path) -> None:
    check_replays_are_refused(tmp_path)


ANOTHER_ID = ("if header.update_id != update_id:", "if False:")
UNSIGNED = ("if header.device != device or not opener.is_signed(", "if False and opener.is_signed(")


@pytest.mark.parametrize("changes", [[ANOTHER_ID], [ANOTHER_ID, UNSIGNED]], ids=["ones own", "a neighbours too"])
def test_an_aggregator_that_takes_replays_is_caught(
    changes: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "verify_header", broken_copy("aggregator.ingest", *changes).verify_header)
    with pytest.raises(AssertionError):
        check_replays_are_refused(tmp_path)


def test_a_sybil_counts_as_often_as_it_is_enrolled(tmp_path: Path) -> None:
    names = [f'"device-{index:07d}"' for index in range(1, 6)]
    rest = f'\n[[attacker]]\nkind = "sybil"\ndevices = [{", ".join(names)}]\n'
    flips = f'\n[[attacker]]\nkind = "sign_flip"\ndevices = [{", ".join(names)}]\nscale = 20.0\n'
    metrics = run_of(tmp_path, rest + flips, devices=10, rule=MEDIAN)
    assert [one.arrived for one in metrics.rounds] == [10, 10]
    assert metrics.attack == {"sybil": 5.0, "sign_flip": 5.0}
    assert accuracy_of(metrics) < 0.5  # half of the votes: a rule for a fifth promises nothing


LATER = """
[[attacker]]
kind = "sign_flip"
devices = ["device-0000002"]
from_round = 2

[[attacker]]
kind = "label_flip"
devices = ["device-0000004"]
from_round = 2

[[attacker]]
kind = "replay"
devices = ["device-0000001"]
after_s = 1.0
from_round = 2
"""


def test_attackers_of_the_second_round_leave_the_first_as_it_was_in_any_number_of_shards(tmp_path: Path) -> None:
    text = BASE.format(devices=5, goal=6, rule=MEAN, fidelity="real", sensors="synthetic")
    honest = simulated(folder_of(tmp_path / "honest", text))
    attacked = simulated(folder_of(tmp_path / "attacked", text + LATER))
    assert len(honest.models) == len(attacked.models) == 2
    assert attacked.models[0] == honest.models[0]
    assert attacked.models[1] != honest.models[1]
    events = [one.event for one in read_events(tmp_path / "attacked" / EVENTS)]
    opened = [place for place, event in enumerate(events) if event == "round_opened"]
    assert events.count("upload_replayed") == 2  # its own and its neighbour's, of one round
    assert events.index("upload_replayed") > opened[1]
    two = folder_of(tmp_path / "two", text + LATER)
    assert simulated(two, InProcess(two / SCENARIO, count=2)) == attacked


def test_attackers_without_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "attacked.toml"
    path.write_text(
        BASE.format(devices=4, goal=4, rule=MEAN, fidelity="noop", sensors="none") + FLIPPERS, encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="fidelity: expected real with attackers of the kind sign_flip, got noop"):
        load_scenario(path)
