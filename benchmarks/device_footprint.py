"""What a device process needs, beside Flower's: install size, start, memory, bytes and processor time of a round.

A clean virtual environment gets ``covey[device]`` (LiteRT) and nothing else, and a second one ``covey[tflite]``
(tflite-runtime). In each the real ``covey-device run`` takes part in real rounds over a real broker (mosquitto with
mutual TLS where installed). Beside it a Flower SuperNode, from an environment with ``flwr``, numpy and the same TFLite
runtime, does the same rounds under a SuperLink with TLS: one full-batch clipped and noised step of the same graph on
the same windows. They take turns, and every process that a device starts counts as the device.

``rss_over_flower`` takes the measures that favour Flower: our high-water mark, with every page that we share with
others, over the highest sum of Flower's processes with shared pages divided. ``install_over_flower`` is over all that
pip adds to the environment. Flower needs Python 3.11 and pip; where it cannot be installed its keys are null.

    python -m benchmarks.device_footprint                       # a table, in about half an hour
    python -m benchmarks.device_footprint --json
    python -m benchmarks.device_footprint --plot footprint.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clean_install import Install, clean_install, import_times, own_source, pinned
from benchmarks.command import parser
from benchmarks.footprint_covey import covey_run, settings_for
from benchmarks.footprint_run import FootprintError, Run, Schedule, summary
from benchmarks.footprint_table import as_table, ratios
from benchmarks.peers import environments
from benchmarks.peers.flower import Round, flower_run
from benchmarks.process_tree import kilobytes
from benchmarks.timing import cpu_name
from firmware_sim.bundles import bundle_and_publisher
from firmware_sim.watch_data import default_cache, load_recordings, windows_of
from fl_protocol.bundle import open_bundle
from fl_protocol.signing import public_key_from_hex

BARE = "import numpy; from ai_edge_litert.interpreter import Interpreter; print(open('/proc/self/status').read())"
RUNTIMES = {"device": ("ai-edge-litert", "ml-dtypes"), "tflite": ("tflite-runtime",)}
"""Our extra, and what of its runtime Flower's environment gets in the same version."""
IMPORTED = {"covey": "device_client.assembly", "flower": "flwr.supernode.cli"}
"""What each device's command imports first."""
CNN = "watch_cnn"
LARGEST_LISTED = 12


@dataclass
class Contestant:
    """An installed device and its runs."""

    install: Install
    runs: list[Run] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Its column of the table."""
        largest = dict(list(self.install.distributions.items())[:LARGEST_LISTED])
        size = {"install_mb": self.install.install_mb, "compiled_mb": self.install.compiled_mb}
        return {**size, **summary(self.runs), "largest_mb": largest}


@dataclass
class Variant:
    """A TFLite runtime, and both contestants with it; without Flower, why."""

    name: str
    covey: Contestant
    flower: Contestant | None
    no_flower: str | None = None

    def report(self, imports: dict[str, float]) -> dict[str, Any]:
        """Both columns and their ratios."""
        covey = self.covey.report() | {"import_s": imports["covey"]}
        flower = None if self.flower is None else self.flower.report() | {"import_s": imports["flower"]}
        return {"covey": covey, "flower": flower, "no_flower": self.no_flower, **ratios(covey, flower)}


def main() -> None:
    arguments = _arguments()
    schedule = Schedule(idle_s=arguments.idle, rounds=arguments.rounds, period_s=arguments.period)
    names = ["device"] if arguments.no_tflite or sys.version_info >= (3, 12) else list(RUNTIMES)
    with tempfile.TemporaryDirectory(prefix="covey-footprint-") as name:
        variants = [install(Path(name), extra, with_flower=not arguments.no_flower) for extra in names]
        try:
            report = measure(Path(name), variants, schedule, repeats=arguments.repeats)
        except FootprintError as error:
            raise SystemExit(f"device_footprint: {error}") from error
    print(json.dumps(report, indent=1) if arguments.json else as_table(report))
    if arguments.plot is not None:
        from benchmarks.footprint_plot import plot  # noqa: PLC0415 - matplotlib only for those who draw

        plot(report, arguments.plot)


def install(folder: Path, extra: str, *, with_flower: bool) -> Variant:
    """Clean environments for one of our extras and for Flower with the same runtime."""
    covey = clean_install(folder / f"covey-{extra}", f"{own_source(folder / 'source')}[{extra}]", constraints=True)
    if not with_flower:
        return Variant(extra, Contestant(covey), None, "not asked for")
    packages = [environments.FLOWER, *(pinned(package) for package in ("numpy", *RUNTIMES[extra]))]
    try:
        environments.prepare("flower")
        flower = clean_install(folder / f"flower-{extra}", *packages)
    except environments.PeerMissingError as error:
        return Variant(extra, Contestant(covey), None, str(error))
    except subprocess.CalledProcessError:
        return Variant(extra, Contestant(covey), None, f"pip could not install {', '.join(packages)} together.")
    return Variant(extra, Contestant(covey), Contestant(flower))


def measure(folder: Path, variants: list[Variant], schedule: Schedule, *, repeats: int) -> dict[str, Any]:
    """Run all in turns."""
    work = same_round(folder, schedule.rounds)
    cnn: list[Run] = []
    bare: list[tuple[float, float]] = []
    for number in range(repeats):
        for variant in variants:
            at = folder / f"{variant.name}-{number}"
            variant.covey.runs.append(covey_run(at / "covey", variant.covey.install, schedule))
            if variant.flower is not None:
                commands, server = variant.flower.install.folder / "bin", environments.prepare("flower").parent
                variant.flower.runs.append(flower_run(at / "flower", commands, server, work, schedule))
        short = Schedule(idle_s=0, rounds=schedule.rounds, period_s=schedule.period_s / 2)
        cnn.append(covey_run(folder / f"{CNN}-{number}", variants[0].covey.install, short, model=CNN))
        bare.append(bare_process(variants[0].covey.install))
    imports = [_imports(variant, repeats=3 * repeats) for variant in variants]
    reports = [variant.report(times) for variant, times in zip(variants, imports, strict=True)]
    conditions = {
        "idle_s": schedule.idle_s,
        "rounds_each": schedule.rounds,
        "period_s": schedule.period_s,
        "repeats": repeats,
        "python": sys.version.split()[0],
        "cpu": cpu_name(),
        "versions": variants[0].covey.install.versions,
        "flower_version": environments.FLOWER,
    }
    return headline(reports, cnn, bare) | conditions


def headline(reports: list[dict[str, Any]], cnn: list[Run], bare: list[tuple[float, float]]) -> dict[str, Any]:
    """The documented default's numbers first, then everything."""
    default, other = reports[0], summary(cnn)
    covey = default["covey"]
    return {
        "peak_rss_mb": covey["peak_high_water_mb"],
        "cold_start_s": covey["cold_start_s"],
        "install_mb": covey["install_mb"],
        "install_over_flower": default["install_over_flower"],
        "rss_over_flower": default["rss_over_flower"],
        "train_s_per_round": covey["train_s_per_round"],
        "model": "watch_features",
        CNN: {
            "peak_rss_mb": other["peak_high_water_mb"],
            "cold_start_s": other["cold_start_s"],
            "train_s_per_round": other["train_s_per_round"],
        },
        "bare_numpy_and_litert": {
            "peak_rss_mb": round(statistics.median(mb for mb, _ in bare), 1),
            "start_s": round(statistics.median(start_s for _, start_s in bare), 3),
        },
        **dict(zip(RUNTIMES, reports, strict=False)),
    }


def same_round(folder: Path, rounds: int) -> Round:
    """What the wrists of `covey_run` compute, as files for Flower's nodes."""
    settings = settings_for("watch_features", rounds)
    path, publisher = bundle_and_publisher(settings.model)
    bundle = open_bundle(path.read_bytes(), publisher=public_key_from_hex(publisher))
    samples, recordings = bundle.manifest.input.shape[0], load_recordings(default_cache())
    records = []
    for wrist in settings.training_wrists:
        windows = windows_of(recordings, wrist, samples=samples)
        records.append(folder / f"{wrist.device_id}.npz")
        np.savez(records[-1], x=windows.x, y=windows.y)
    graph, params = folder / "graph.tflite", folder / "params.npy"
    graph.write_bytes(bundle.graph)
    np.save(params, bundle.params)
    plan = {
        "learning-rate": settings.learning_rate,
        "l2-norm-clip": settings.l2_norm_clip,
        "noise-multiplier": settings.noise_multiplier,
        "expected-batch-size": settings.expected_batch_size,
    }
    return Round(graph, params, (records[0], records[1]), plan)


def bare_process(covey: Install) -> tuple[float, float]:
    """Peak MB and seconds of a process that only imports numpy and the runtime."""
    started_s = time.monotonic()
    status = subprocess.run([covey.python, "-c", BARE], capture_output=True, text=True, check=True).stdout
    return kilobytes(status, "VmHWM") / 1024, time.monotonic() - started_s


def _imports(variant: Variant, *, repeats: int) -> dict[str, float]:
    """Seconds to import what each command imports."""
    modules = {"covey": (variant.covey.install, IMPORTED["covey"])}
    if variant.flower is not None:
        modules["flower"] = (variant.flower.install, IMPORTED["flower"])
    return import_times(modules, repeats=repeats)


def _arguments() -> argparse.Namespace:
    command = parser("device_footprint", __doc__)
    command.add_argument("--rounds", type=int, default=5, help="rounds that each device takes part in")
    command.add_argument("--repeats", type=int, default=3, help="runs of each, in turns")
    command.add_argument("--idle", type=float, default=60.0, help="seconds connected with nothing to do")
    command.add_argument("--period", type=float, default=12.0, help="seconds that belong to each round")
    command.add_argument("--no-flower", action="store_true", help="only covey")
    command.add_argument("--no-tflite", action="store_true", help="only covey[device], without covey[tflite]")
    command.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw install size and memory (needs matplotlib)"
    )
    return command.parse_args()


if __name__ == "__main__":
    main()
