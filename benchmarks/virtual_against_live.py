"""One scenario both ways: simulated in virtual time, and live with a process for each device over a real broker.

Where timing does not decide (synchronous rounds that wait for every device), rounds and models have to be the same,
byte by byte. Where it does (a round closes at a goal below the fleet), this lists what differed, and why.

    python -m benchmarks.virtual_against_live --json
    python -m benchmarks.virtual_against_live --scenario my.toml --devices 8
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.command import parser
from firmware_sim.fleet.live_folder import create_live
from firmware_sim.fleet.live_run import run_live
from firmware_sim.fleet.run import EVENTS
from firmware_sim.fleet.simulation import begin_run, simulate
from firmware_sim.fleet_events import read_events
from firmware_sim.fleet_metrics import FleetMetrics
from firmware_sim.scenario.loading import LoadedScenario, load_scenario
from firmware_sim.settings import BrokerChoice

WHY = {
    "outcome": "a round's deadline is met or missed by how long messages and processes take",
    "arrived": "a round closes when its goal is seen to be reached: the simulator hands over together what arrives in "
    "one window, and all of it is counted; live, updates come one by one",
    "counted": "which updates come before that follows in virtual time from simulated latency, live from how this "
    "machine schedules its processes",
    "model_digest": "the model is made of other updates, or was trained from a model that was",
}
"""What may differ where timing decides, and the reason."""


@dataclass(frozen=True)
class RoundSeen:
    """What came of a round.

    Args:
        round: its number.
        outcome: ``committed`` or ``aborted``.
        arrived: updates that it counted.
        counted: devices whose updates were acknowledged before the next round was opened, sorted.
        model_digest: SHA-256 of the model that it made; empty if none.
    """

    round: int
    outcome: str
    arrived: int
    counted: tuple[str, ...]
    model_digest: str


@dataclass(frozen=True)
class Difference:
    """Something that was not the same both ways."""

    round: int
    what: str
    virtual: Any
    live: Any
    why: str


def rounds_of(folder: Path, metrics: FleetMetrics) -> list[RoundSeen]:
    """A run's rounds, from what it left in its folder."""
    digests, counted = dict[int, str](), dict[int, set[str]]()
    for event in read_events(folder / EVENTS):
        if event.event == "round_committed":
            digests[event.round] = event.detail
        elif event.event == "update_delivered":
            counted.setdefault(event.round, set()).add(event.device)
    return [
        RoundSeen(
            round=one.round,
            outcome=one.outcome,
            arrived=one.arrived,
            counted=tuple(sorted(counted.get(one.round, set()))),
            model_digest=digests.get(one.round, ""),
        )
        for one in metrics.rounds
    ]


def differences(virtual: Sequence[RoundSeen], live: Sequence[RoundSeen]) -> list[Difference]:
    """What was not the same, round by round. A round that only one run had counts as one of nothing."""
    nothing = RoundSeen(0, "none", 0, (), "")
    mine, theirs = {one.round: one for one in virtual}, {one.round: one for one in live}
    found = []
    for number in sorted(mine.keys() | theirs.keys()):
        one, other = asdict(mine.get(number, nothing)), asdict(theirs.get(number, nothing))
        found += [
            Difference(number, what, one[what], other[what], why)
            for what, why in WHY.items()
            if one[what] != other[what]
        ]
    return found


def run_both(scenario: LoadedScenario, folder: Path, *, broker: BrokerChoice = "auto") -> dict[str, Any]:
    """Run a scenario both ways, each in a folder of its own, and compare."""
    virtual = begin_run(folder / "virtual", scenario)
    simulated = simulate(
        folder / "virtual", virtual, engine="local", shards=1, told=lambda _: None, should_stop=lambda: False
    ).metrics
    live = begin_run(folder / "live", scenario)
    made = create_live(folder / "live", live)
    ran = run_live(made, broker=broker, told=lambda _: None, should_stop=lambda: False).metrics
    if simulated is None or ran is None or ran.live is None:
        raise RuntimeError("expected both runs to come to their end")
    seen = rounds_of(folder / "virtual", simulated), rounds_of(folder / "live", ran)
    found = differences(*seen)
    return {
        "scenario": scenario.scenario.name,
        "devices": scenario.scenario.devices,
        "goal": scenario.task.goal,
        "broker": ran.live.broker,
        "left_out": ran.live.left_out,
        "virtual": [asdict(one) for one in seen[0]],
        "live": [asdict(one) for one in seen[1]],
        "equal_models": [
            bool(one.model_digest) and one.model_digest == other.model_digest for one, other in zip(*seen, strict=False)
        ],
        "differences": [asdict(one) for one in found],
        "wall_s": {"virtual": simulated.wall_s, "live": ran.wall_s},
        "peak_rss_mb": {"virtual": simulated.peak_rss_bytes / 2**20, "live": ran.peak_rss_bytes / 2**20},
    }


def where_timing_decides(scenario: LoadedScenario, folder: Path) -> LoadedScenario:
    """The same scenario with rounds that close at half of its devices.

    Args:
        scenario: whose rounds wait for all.
        folder: that takes its file.
    """
    fields = msgspec.toml.decode(scenario.text)
    half = max(2, scenario.scenario.devices // 2)
    fields["name"] = f"{scenario.scenario.name}-half"
    fields["task"] |= {"goal": half, "minimum_cohort": min(half, scenario.task.minimum_cohort)}
    path = folder / "half.toml"
    path.write_bytes(msgspec.toml.encode(fields))
    return load_scenario(path)


def with_devices(scenario: LoadedScenario, devices: int, folder: Path) -> LoadedScenario:
    """The same scenario with so many devices, for all of which each round waits.

    Args:
        scenario: any.
        devices: how many.
        folder: that takes its file.
    """
    fields = msgspec.toml.decode(scenario.text) | {"devices": devices}
    fields["task"] |= {"goal": devices, "minimum_cohort": min(devices, scenario.task.minimum_cohort)}
    path = folder / "all.toml"
    path.write_bytes(msgspec.toml.encode(fields))
    return load_scenario(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run and print."""
    options = parser("virtual_against_live", __doc__)
    options.add_argument("--scenario", type=Path, default=Path("first-round"), help="file, or name of a shipped one")
    options.add_argument("--devices", type=int, default=20)
    options.add_argument("--broker", choices=["auto", "mosquitto", "iotcore"], default="auto")
    arguments = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        everyone = with_devices(load_scenario(arguments.scenario), arguments.devices, folder)
        results = {
            "cores": os.cpu_count(),
            "all": run_both(everyone, folder / "of-all", broker=arguments.broker),
            "half": run_both(where_timing_decides(everyone, folder), folder / "of-half", broker=arguments.broker),
        }
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    for kind in ("all", "half"):
        one = results[kind]
        print(f"{one['scenario']}: {one['devices']} devices, goal {one['goal']}, {one['broker']}")
        for mine, other, equal in zip(one["virtual"], one["live"], one["equal_models"], strict=False):
            print(
                f"  round {mine['round']}: {mine['outcome']}/{other['outcome']}, arrived {mine['arrived']}/"
                f"{other['arrived']}, model {mine['model_digest'][:12]}/{other['model_digest'][:12]}"
                f" {'equal' if equal else 'differ'}"
            )
        for found in one["differences"]:
            print(f"  round {found['round']}: {found['what']} differs: {found['why']}")


if __name__ == "__main__":
    main()
