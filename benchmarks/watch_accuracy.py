"""Accuracy on unseen people, without DP and at record-level epsilon 3 in the local model, over five folds.

Everything is the code that runs on devices and at the aggregator (`device_client.training`, `aggregator.exact_sum`,
`aggregator.server_optimisers`, the TFLite graph of the committed bundle); only the transport is left out. Compared in
the same run: the same federated training without noise, and chance. Published on these ten people: random forest
0.873, CRNN 0.889 (arXiv 1802.01489; other windows and splits, so the comparison is loose).

    python -m benchmarks.watch_accuracy --json
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from aggregator.combination import average
from aggregator.exact_sum import UNIT, ExactSum
from aggregator.server_optimisers import initial_state, step
from benchmarks.command import parser
from device_client.accounting import poisson_gaussian_rdp
from device_client.training import Evaluation, Records, evaluate, train_locally
from firmware_sim.bundles import bundle_and_publisher
from firmware_sim.settings import DemoSettings
from firmware_sim.watch_data import default_cache, load_recordings, windows_of
from fl_protocol.adapters.tflite_graph import TfliteGraph
from fl_protocol.bundle import open_bundle
from fl_protocol.renyi import rdp_to_epsilon
from fl_protocol.signing import public_key_from_hex

FOLDS = ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10))
NO_CLIP = 1e6
NO_DP = {"epsilon": None, "rounds": 150, "l2_norm_clip": NO_CLIP, "learning_rate": 5.0}


@dataclass(frozen=True)
class Job:
    """One training run: a fold, its settings, and which repetition."""

    settings: DemoSettings
    repetition: int


def main() -> None:
    arguments = _arguments()
    report = measure(repetitions=arguments.repetitions, processes=arguments.processes, progress=_progress)
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        print(_text(report))


def measure(*, repetitions: int, processes: int, progress: Callable[[int, int], None]) -> dict[str, object]:
    """Run every fold: once without noise (it is deterministic), `repetitions` times with."""
    jobs = [Job(DemoSettings(held_out=fold, **NO_DP), 0) for fold in FOLDS]  # type: ignore[arg-type]
    noiseless = [Job(DemoSettings(held_out=fold, epsilon=None), 0) for fold in FOLDS]
    private = [Job(DemoSettings(held_out=fold), number) for fold in FOLDS for number in range(repetitions)]
    todo = jobs + noiseless + private
    done: list[Evaluation] = []
    # Not forked: the TFLite runtimes start threads.
    with get_context("spawn").Pool(processes) as pool:
        for result in pool.imap(run_job, todo):
            done.append(result)
            progress(len(done), len(todo))
    accuracy = [result.correct / result.count for result in done]
    eps3 = np.array(accuracy[2 * len(FOLDS) :]).reshape(len(FOLDS), repetitions)
    settings = DemoSettings()
    return {
        "no_dp_mean": statistics.mean(accuracy[: len(FOLDS)]),
        "no_dp_folds": _by_fold(accuracy[: len(FOLDS)]),
        "eps3_local_mean": float(eps3.mean()),
        "eps3_local_folds": _by_fold(eps3.mean(axis=1).tolist()),
        "eps3_local_folds_lowest": _by_fold(eps3.min(axis=1).tolist()),
        "eps3_local_folds_highest": _by_fold(eps3.max(axis=1).tolist()),
        "eps3_local_std_of_mean_over_repetitions": float(eps3.mean(axis=0).std(ddof=1)) if repetitions > 1 else None,
        "repetitions": repetitions,
        "eps3_settings_without_noise_mean": statistics.mean(accuracy[len(FOLDS) : 2 * len(FOLDS)]),
        "chance": 1 / 7,
        "published": {"random_forest": 0.873, "crnn": 0.889, "source": "arXiv 1802.01489"},
        "epsilon": epsilon_of(settings),
        "delta": settings.delta,
        "noise_multiplier": settings.noise_multiplier,
        "model": settings.model,
        "windows_tested": sum(result.count for result in done[: len(FOLDS)]),
    }


def epsilon_of(settings: DemoSettings) -> float:
    """What one wrist's ledger shows at the end."""
    rdp = poisson_gaussian_rdp(sampling_rate=1.0, noise_multiplier=settings.noise_multiplier, steps=settings.rounds)
    return rdp_to_epsilon(rdp, settings.delta)


@functools.lru_cache(maxsize=1)
def _wrists_and_graph(model: str) -> tuple[dict[str, Records], TfliteGraph, np.ndarray]:
    """Every wrist's records, the loaded graph and the initial parameters; once per process."""
    path, publisher = bundle_and_publisher(model)
    bundle = open_bundle(path.read_bytes(), publisher=public_key_from_hex(publisher))
    graph = TfliteGraph.of_bundle(bundle)
    recordings = load_recordings(default_cache())
    settings = DemoSettings()
    records = {
        wrist.device_id: windows_of(recordings, wrist, samples=bundle.manifest.input.shape[0])
        for wrist in settings.training_wrists + settings.held_out_wrists
    }
    return records, graph, bundle.params


def run_job(job: Job) -> Evaluation:
    """Train on the fold's training wrists, and measure the finished model on its held-out ones."""
    settings, plan = job.settings, job.settings.plan().message()
    records, graph, params = _wrists_and_graph(settings.model)
    server = settings.server()
    state, versions = initial_state(server, len(params)), [params]
    for _ in range(settings.rounds):
        total = ExactSum.zeros(len(params))
        for wrist in settings.training_wrists:
            total.add(train_locally(graph, params, records[wrist.device_id], plan=plan, entropy=os.urandom))
        params, state = step(params, state, total.total * UNIT / total.count, server)
        versions.append(params)
    finished = average(versions[-server.average_last :])
    results = [evaluate(graph, finished, records[wrist.device_id]) for wrist in settings.held_out_wrists]
    return Evaluation(
        math.fsum(result.loss_sum for result in results),
        sum(result.correct for result in results),
        sum(result.count for result in results),
    )


def _by_fold(values: list[float]) -> dict[str, float]:
    return {",".join(map(str, fold)): round(value, 4) for fold, value in zip(FOLDS, values, strict=True)}


def _text(report: dict[str, object]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in report.items())


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done}/{total} trainings{' ' if done < total else chr(10)}")
        sys.stderr.flush()


def _arguments() -> argparse.Namespace:
    command = parser("watch_accuracy", __doc__)
    command.add_argument("--repetitions", type=int, default=20, help="private trainings per fold (noise differs)")
    command.add_argument("--processes", type=int, default=2, help="trainings at a time")
    return command.parse_args()


if __name__ == "__main__":
    main()
