"""One run of covey's own simulator on the peers' job, as a process of its own: rounds by the wall clock, as JSON.

The job is that of `benchmarks.peers.simulation_job`. ``real`` takes DP-SGD steps in LiteRT (per-example clipping and
noise, which the peers leave out) on the windows of synthetic wearers, 256 a device in the mean, of which each step
takes 32 in the mean; ``noop`` trains nothing and returns zeros. Everything else of a device and of the aggregator
is there.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from benchmarks.peers.simulation_job import BATCH_SIZE, CNN_PARAMETERS, EXAMPLES, LEARNING_RATE, STEPS, Job
from firmware_sim.bundles import bundle_and_publisher
from firmware_sim.fleet.run import FleetRun
from firmware_sim.fleet.simulation import begin_run, make_engine
from firmware_sim.scenario.loading import load_scenario
from fl_protocol.adapters.software import software_version
from fl_protocol.bundle import ModelBundle, open_bundle, pack_bundle
from fl_protocol.model_manifest import ParameterSpec
from fl_protocol.signing import public_key_from_hex, public_key_hex

_PUBLISHER = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)


@dataclass(frozen=True)
class CoveyJob:
    """A peer's job, and what only ours has.

    Args:
        job: what is done; its workers are the shards.
        wire: ``on`` or ``off``.
    """

    job: Job
    wire: str = "on"

    def text(self) -> str:
        """As one line of JSON, for the command line."""
        return json.dumps({"job": asdict(self.job), "wire": self.wire})


def times_of(wanted: CoveyJob, folder: Path) -> list[float]:
    """When the first round began and when each of them was committed, by `time.perf_counter`.

    Args:
        wanted: the job.
        folder: empty, for the run.

    Raises:
        SystemExit: a round was not committed with an update of every client.
    """
    scenario = folder / "job.toml"
    scenario.write_bytes(msgspec.toml.encode(scenario_of(wanted, folder)))
    kept = begin_run(folder / "run", load_scenario(scenario))
    engine = make_engine("local", kept.path, wanted.job.workers)
    try:
        run, times = FleetRun(kept, kept.path.parent, engine), []
        for _ in run.steps():
            if not times or len(run.chronicle.rounds) >= len(times):
                times.append(time.perf_counter())
    finally:
        engine.close()
    told = [(one.outcome, one.arrived) for one in run.chronicle.rounds]
    if told != [("committed", wanted.job.clients)] * (wanted.job.warm_up + wanted.job.rounds):
        raise SystemExit(f"expected every client's update in every round, got {told}")
    return times


def scenario_of(wanted: CoveyJob, folder: Path) -> dict[str, Any]:
    """The scenario of a job: ideal devices that all take part in every round."""
    job = wanted.job
    fields: dict[str, Any] = {
        "name": "benchmark",
        "seed": job.seed,
        "devices": job.clients,
        "days": 30.0,
        "checkpoint_hours": 1000.0,  # nothing is put down between rounds
        "fidelity": job.mode,
        "wire": wanted.wire,
        "model": "watch_cnn",
        "privacy": {"epsilon": 1e6},
        "task": {
            "engine": "open",
            "rounds": job.warm_up + job.rounds,
            "goal": job.clients,
            "minimum_cohort": 2,
            "round_duration_s": 3600.0,
            "updates": {"kem": "x25519"},
            "plan": {
                "sampling_rate": BATCH_SIZE / EXAMPLES,
                "local_steps": STEPS,
                "learning_rate": LEARNING_RATE,
                "l2_norm_clip": 1.0,
                "noise_multiplier": 0.1,
                "expected_batch_size": float(BATCH_SIZE),
            },
        },
    }
    if job.mode == "real":
        fields["sensors"] = {"kind": "synthetic", "windows_per_day": float(EXAMPLES), "windows_spread": 0.0}
        fields["history_days"] = 1.0
    if job.parameters != CNN_PARAMETERS:
        (folder / "large.covey").write_bytes(_larger_bundle(job.parameters))
        fields |= {"model": "large.covey", "publisher_key": public_key_hex(_PUBLISHER.public_key())}
    return fields


def _larger_bundle(count: int) -> bytes:
    """`watch_cnn` with so many parameters that its graph does not have; nothing trains it."""
    path, publisher = bundle_and_publisher("watch_cnn")
    bundle: ModelBundle = open_bundle(path.read_bytes(), publisher=public_key_from_hex(publisher))
    more = count - bundle.manifest.num_parameters
    filling = ParameterSpec(name="filling/kernel", offset=bundle.manifest.num_parameters, shape=(more,))
    layers = (*bundle.manifest.layers, replace(bundle.manifest.layers[-1], name="filling", num_parameters=more))
    manifest = replace(
        bundle.manifest,
        num_parameters=count,
        num_shared_parameters=count,
        parameters=(*bundle.manifest.parameters, filling),
        layers=layers,
    )
    return pack_bundle(
        manifest,
        graph=bundle.graph,
        infer_template=bundle.infer_template + bytes(4 * more),
        params=np.linspace(0.5, 1.5, count, dtype=np.float32),
        keras_json=bundle.keras_json,
        frozen=bundle.frozen,
        publisher_key=_PUBLISHER,
    )


def main() -> None:
    """The only argument is the job; the last line of standard output is its result."""
    given = json.loads(sys.argv[1])
    wanted = CoveyJob(Job(**given["job"]), given["wire"])
    with tempfile.TemporaryDirectory() as folder:
        times = times_of(wanted, Path(folder))
    print(json.dumps({"times": times, "versions": {"covey": software_version()}}), flush=True)


if __name__ == "__main__":
    main()
