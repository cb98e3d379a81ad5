"""How near simulated wearers come to real ones: accuracy of a model trained on each, on people nobody trained on.

Trained in one place without noise, with the device's own loop (`device_client.training`) on `watch_features`: as many
steps with batches as large for every source, and no clipping. Sources:

- `real`: the windows of people 1 to 8, as they are;
- `replay`: a fleet of 100 devices that replay these people (`firmware_sim.sensors.replay`), 40 windows each;
- `replay_straight`: the same with no variation at all, so that what varying does can be told from what number does;
- `synthetic`: 100 synthetic persons, 40 windows each, measured on 50 others.

The first three, and the fourth once more as `synthetic_on_real`, are measured on people 9 and 10.

    python -m benchmarks.sensor_realism --json
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from benchmarks.command import parser
from device_client.training import Records, evaluate, train_locally
from firmware_sim.bundles import bundle_and_publisher
from firmware_sim.sensors.assembly import make_sensor
from firmware_sim.sensors.config import SensorsConfig
from firmware_sim.sensors.diary import DAY_S
from firmware_sim.sensors.sensor import Sensor
from firmware_sim.sensors.wearer import Variation
from firmware_sim.watch_data import PEOPLE, all_wrists, default_cache, load_recordings, windows_of
from fl_protocol.adapters.tflite_graph import TfliteGraph
from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.plans import TrainingPlanMsg
from fl_protocol.signing import public_key_from_hex

MODEL, HELD_OUT = "watch_features", (9, 10)
DEVICES, WINDOWS = 100, 40
STEPS, BATCH, LEARNING_RATE, NO_CLIP = 600, 128, 5.0, 1e6
UNSEEN = 1000
"""Windows of synthetic persons who are on no device: 20 each of 50."""
SPEED_DEVICES = 1000
NOTHING = Variation(**dict.fromkeys(Variation.__struct_fields__, 0.0))


def main() -> None:
    command = parser("sensor_realism", __doc__)
    command.add_argument("--repetitions", type=int, default=5, help="trainings per source (fleet and batches differ)")
    arguments = command.parse_args()
    report = measure(arguments.repetitions, steps=STEPS)
    print(json.dumps(report, indent=1) if arguments.json else "\n".join(f"{key}: {report[key]}" for key in report))


def measure(repetitions: int, *, steps: int) -> dict[str, object]:
    """Train on every source so many times.

    Args:
        repetitions: at least 1.
        steps: of each training.
    """
    path, publisher = bundle_and_publisher(MODEL)
    bundle = open_bundle(path.read_bytes(), publisher=public_key_from_hex(publisher))
    accuracy: dict[str, list[float]] = {}
    for seed in range(repetitions):
        for name, value in _once(bundle, seed, steps).items():
            accuracy.setdefault(name, []).append(value)
        print(f"{seed + 1} of {repetitions} repetitions", file=sys.stderr)
    return {
        "accuracy_mean": {name: round(statistics.mean(values), 4) for name, values in accuracy.items()},
        "accuracy_range": {name: [round(min(v), 4), round(max(v), 4)] for name, v in accuracy.items()},
        "repetitions": repetitions,
        "steps": steps,
        "expected_batch_size": BATCH,
        "devices": DEVICES,
        "windows_per_device": WINDOWS,
        "chance": round(1 / len(bundle.manifest.label.names), 4),
        "cpu_s_for_1000_devices_of_40_windows": {kind: _speed(bundle, kind) for kind in ("replay", "synthetic")},
    }


def _once(bundle: ModelBundle, seed: int, steps: int) -> dict[str, float]:
    """Accuracy by source."""
    replay = make_sensor(SensorsConfig(kind="replay", held_out=HELD_OUT), bundle.manifest, seed)
    straight = make_sensor(SensorsConfig(kind="replay", held_out=HELD_OUT, variation=NOTHING), bundle.manifest, seed)
    synthetic = make_sensor(SensorsConfig(kind="synthetic"), bundle.manifest, seed)
    people, others = real_windows(HELD_OUT), synthetic.held_out(UNSEEN)
    score = _scorer(bundle, steps)
    on_synthetic, on_real = score(fleet_windows(synthetic), others, people)
    return {
        "real": score(real_windows(tuple(one for one in PEOPLE if one not in HELD_OUT)), people)[0],
        "replay": score(fleet_windows(replay), people)[0],
        "replay_straight": score(fleet_windows(straight), people)[0],
        "synthetic": on_synthetic,
        "synthetic_on_real": on_real,
    }


def real_windows(people: tuple[int, ...]) -> Records:
    """The disjoint windows of both wrists of some people, as they were recorded."""
    recordings = load_recordings(default_cache())
    return joined([windows_of(recordings, wrist, samples=128) for wrist in all_wrists() if wrist.person in people])


def fleet_windows(sensor: Sensor) -> Records:
    """The first `WINDOWS` windows of each of the fleet's devices."""
    days = [sensor.records(device, 0.0, 10 * DAY_S) for device in range(DEVICES)]
    return joined([Records(one.x[:WINDOWS], one.y[:WINDOWS]) for one in days])


def joined(parts: list[Records]) -> Records:
    """All windows."""
    return Records(np.concatenate([one.x for one in parts]), np.concatenate([one.y for one in parts]))


def _scorer(bundle: ModelBundle, steps: int) -> Callable[..., list[float]]:
    """What trains on the first records and gives the accuracy on each of the others."""
    graph = TfliteGraph.of_bundle(bundle)

    def score(trained: Records, *tested: Records) -> list[float]:
        plan = TrainingPlanMsg(
            sampling_rate=min(1.0, BATCH / len(trained)),
            local_steps=steps,
            learning_rate=LEARNING_RATE,
            l2_norm_clip=NO_CLIP,
            noise_multiplier=0.0,
            expected_batch_size=float(BATCH),
        )
        params = bundle.params + train_locally(graph, bundle.params, trained, plan=plan, entropy=os.urandom)
        results = [evaluate(graph, params, one) for one in tested]
        return [result.correct / result.count for result in results]

    return score


def _speed(bundle: ModelBundle, kind: str) -> float:
    """Processor seconds for a day of a fleet."""
    sensor = make_sensor(SensorsConfig(kind=kind, windows_spread=0.0), bundle.manifest, 1)  # type: ignore[arg-type]
    began = time.process_time()
    for device in range(SPEED_DEVICES):
        sensor.records(device, 0.0, DAY_S)
    return round(time.process_time() - began, 2)


if __name__ == "__main__":
    main()
