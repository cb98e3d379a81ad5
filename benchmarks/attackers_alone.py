"""What a back door, and one attacker's many identities, do to a model each alone: with the mean and with a robust rule.

The scenario ``poisoners`` as it is shipped (50 simulated devices that train on synthetic persons, 8 rounds, the real
aggregator), with other ``[[attacker]]`` tables in place of its own; the mean is the same scenario without its
``[task.rule]``. Accuracy and ``backdoor_success`` are of the last model, on 400 windows of people who are on no device.
One run of a seed each; `--seeds` gives several, and then each is listed.

    python -m benchmarks.attackers_alone                 # a table
    python -m benchmarks.attackers_alone --json --seeds 1 2 3
    python -m benchmarks.attackers_alone --only "one back door"
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.command import parser
from firmware_sim.errors import FleetError
from firmware_sim.fleet.build import device_name
from firmware_sim.fleet.simulation import begin_run, simulate
from firmware_sim.scenario.loading import SHIPPED, load_scenario

DOOR = {"kind": "scaling_backdoor", "target": 0, "scale": 10.0}


def flipping(identities: int) -> list[dict[str, Any]]:
    """One sign flipper that has enrolled so many devices."""
    devices = [device_name(index) for index in range(identities)]
    sybil = [{"kind": "sybil", "devices": devices}] if identities > 1 else []
    return [*sybil, {"kind": "sign_flip", "devices": devices}]


CASES: dict[str, list[dict[str, Any]]] = {
    "nobody attacks": [{**DOOR, "share": 0.0}],  # so that the trigger is tried all the same
    "one back door, scale 1": [{**DOOR, "devices": [device_name(0)], "scale": 1.0}],
    "one back door, scale 10": [{**DOOR, "devices": [device_name(0)]}],
    "one sign flipper, scale 1": flipping(1),
    "the same from 10 identities": flipping(10),
    "the same from 20 identities": flipping(20),
}
"""``[[attacker]]`` tables by what they are."""


@dataclass(frozen=True)
class Found:
    """What came of one run.

    Args:
        case: of `CASES`.
        rule: ``mean``, or that of the scenario.
        seed: of the run.
        accuracy: of the last model.
        backdoor_success: of the last model; None where no case tries a trigger.
    """

    case: str
    rule: str
    seed: int
    accuracy: float
    backdoor_success: float | None


def run_case(case: str, *, robust: bool, seed: int, changes: dict[str, Any] | None = None) -> Found:
    """Simulate one fleet.

    Args:
        case: of `CASES`.
        robust: whether by the scenario's rule, or by the mean.
        seed: of the run.
        changes: keys of the scenario that are to be others.

    Raises:
        FleetError: it ended without a measured model.
    """
    keys = msgspec.toml.decode((SHIPPED / "poisoners.toml").read_bytes()) | (changes or {})
    task = dict(keys["task"])
    rule = task["rule"]["name"] if robust else task.pop("rule") and "mean"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "alone.toml"
        path.write_bytes(msgspec.toml.encode(keys | {"task": task, "attacker": CASES[case]}))
        kept = begin_run(Path(folder) / "run", load_scenario(path), seed=seed)
        result = simulate(
            kept.path.parent, kept, engine="local", shards=1, told=lambda _progress: None, should_stop=lambda: False
        )
    metrics = result.metrics
    accuracy = metrics.rounds[-1].accuracy if metrics is not None else None
    if metrics is None or accuracy is None:
        raise FleetError(f"{case}, seed {seed}: expected a run that ends with a measured model")
    return Found(case, rule, seed, accuracy, metrics.attack.get("backdoor_success"))


def table(found: Sequence[Found]) -> str:
    """Figures for people."""
    lines = [f"{'case':<30} {'rule':<8} {'seed':>4} {'accuracy':>9} {'back door':>10}"]
    for one in found:
        door = "" if one.backdoor_success is None else f"{one.backdoor_success:.2f}"
        lines.append(f"{one.case:<30} {one.rule:<8} {one.seed:>4} {100 * one.accuracy:>7.1f} % {door:>10}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    options = parser("attackers_alone", __doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[1], help="one run each (default: 1)")
    options.add_argument("--only", default="", help="cases whose name contains this")
    given = options.parse_args(arguments)
    cases = [case for case in CASES if given.only in case]
    found = [
        run_case(case, robust=robust, seed=seed) for seed in given.seeds for case in cases for robust in (False, True)
    ]
    print(json.dumps([asdict(one) for one in found], indent=1) if given.json else table(found))


if __name__ == "__main__":
    main()
