"""What a device process needs: install size, cold start until connected, peak memory while training.

A clean virtual environment gets ``covey[device]`` and nothing else. In it the real ``covey-device run`` takes part in
real rounds over a real broker (mosquitto with mutual TLS where installed). Compared in the same run, interleaved: a
bare process that only imports numpy and the TFLite runtime.

    python -m benchmarks.device_footprint --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.command import parser
from firmware_sim.brokers import start_broker
from firmware_sim.observation import LogTail
from firmware_sim.processes import DaemonProcess, Fleet
from firmware_sim.run_folder import RunFolder, create_run
from firmware_sim.settings import AGGREGATOR, DemoSettings
from firmware_sim.watch_data import PEOPLE, default_cache, load_recordings

REPOSITORY = Path(__file__).resolve().parent.parent
BARE = "import numpy; from ai_edge_litert.interpreter import Interpreter; print(open('/proc/self/status').read())"
WITHIN_S = 60.0


@dataclass
class DeviceRun:
    """What one device process showed."""

    cold_start_s: list[float] = field(default_factory=list)
    peak_rss_mb: list[float] = field(default_factory=list)
    train_s_per_round: list[float] = field(default_factory=list)


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="covey-footprint-") as name:
        report = measure(Path(name), rounds=arguments.rounds, repeats=arguments.repeats)
    print(json.dumps(report, indent=1) if arguments.json else "\n".join(f"{k}: {v}" for k, v in report.items()))


def measure(folder: Path, *, rounds: int, repeats: int) -> dict[str, object]:
    """Install, then start device and bare process in turn."""
    python, install_mb = clean_install(folder / "venv")
    bare_start_s: list[float] = []
    bare_rss_mb: list[float] = []
    runs = {model: DeviceRun() for model in ("watch_features", "watch_cnn")}
    for number in range(repeats):
        for model, result in runs.items():
            one_run(folder / f"{model}-{number}", model, python, rounds=rounds, result=result)
        started_s = time.monotonic()
        status = subprocess.run([python, "-c", BARE], capture_output=True, text=True, check=True).stdout
        bare_start_s.append(time.monotonic() - started_s)
        bare_rss_mb.append(_status_kb(status, "VmHWM") / 1024)
    demo = runs["watch_features"]
    return {
        "peak_rss_mb": round(statistics.median(demo.peak_rss_mb), 1),
        "cold_start_s": round(statistics.median(demo.cold_start_s), 3),
        "install_mb": install_mb,
        "train_s_per_round": round(statistics.median(demo.train_s_per_round), 4),
        "model": "watch_features",
        "watch_cnn": {
            "peak_rss_mb": round(statistics.median(runs["watch_cnn"].peak_rss_mb), 1),
            "cold_start_s": round(statistics.median(runs["watch_cnn"].cold_start_s), 3),
            "train_s_per_round": round(statistics.median(runs["watch_cnn"].train_s_per_round), 4),
        },
        "bare_numpy_and_litert": {
            "peak_rss_mb": round(statistics.median(bare_rss_mb), 1),
            "start_s": round(statistics.median(bare_start_s), 3),
        },
        "repeats": repeats,
        "rounds_each": rounds,
        "python": sys.version.split()[0],
    }


def clean_install(folder: Path) -> tuple[str, float]:
    """A virtual environment with the device's packages only; its Python, and the size of what was installed in MB."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    packages = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    before = _tree_bytes(packages)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    if sys.version_info[:2] == (3, 11):
        pip += ["-c", str(REPOSITORY / "constraints.txt")]
    subprocess.run([*pip, f"{REPOSITORY}[device]"], check=True, stdout=subprocess.DEVNULL)
    return python, round((_tree_bytes(packages) - before) / 1e6, 1)


def one_run(folder: Path, model: str, python: str, *, rounds: int, result: DeviceRun) -> None:
    """Two wrists of one person train `rounds` rounds; both are measured."""
    settings = DemoSettings(held_out=PEOPLE[1:], model=model, rounds=rounds, l2_norm_clip=0.5)
    run = create_run(folder, settings, load_recordings(default_cache()))
    broker = start_broker("auto", run, settings)
    aggregator = DaemonProcess(AGGREGATOR, "aggregator.cli", run.aggregator_toml, run.log(AGGREGATOR))
    devices = [
        DaemonProcess(
            wrist.device_id, "device_client.cli", run.device_toml(wrist), run.log(wrist.device_id), python=python
        )
        for wrist in settings.training_wrists
    ]
    try:
        with _running(Fleet([aggregator])):
            _wait_for(run, AGGREGATOR, "connected")
            for device in devices:  # one after the other: a cold start shares no core with another
                started_s = time.time()
                device.start()
                result.cold_start_s.append(_wait_for(run, device.name, "connected") - started_s)
            with _running(Fleet(devices), start=False):
                _wait_for(run, AGGREGATOR, "task_finished")
                for device in devices:
                    status = Path(f"/proc/{device.pid}/status").read_text()
                    result.peak_rss_mb.append(_status_kb(status, "VmHWM") / 1024)
                    seconds = [
                        e["seconds"]
                        for e in LogTail(device.name, run.log(device.name)).read()
                        if e["event"] == "trained"
                    ]
                    result.train_s_per_round.append(statistics.median(seconds))
    finally:
        broker.stop()


@contextmanager
def _running(fleet: Fleet, *, start: bool = True) -> Iterator[None]:
    """The fleet's processes, stopped in the end."""
    try:
        if start:
            fleet.start()
        yield
    finally:
        fleet.stop()


def _wait_for(run: RunFolder, name: str, event: str) -> float:
    """When a process said that `event` happened, Unix seconds."""
    tail = LogTail(name, run.log(name))
    ends_s = time.monotonic() + WITHIN_S
    while time.monotonic() < ends_s:
        for entry in tail.read():
            if entry["event"] == event:
                return float(entry["at_s"])
        time.sleep(0.005)
    complaint = run.log(name).with_suffix(".err").read_text()[-300:]
    raise SystemExit(f"{name} did not say {event} within {WITHIN_S:g} s: {complaint}")


def _status_kb(status: str, key: str) -> int:
    return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1])


def _tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _arguments() -> argparse.Namespace:
    command = parser("device_footprint", __doc__)
    command.add_argument("--rounds", type=int, default=5, help="rounds each device takes part in")
    command.add_argument("--repeats", type=int, default=5, help="runs per model, interleaved")
    return command.parse_args()


if __name__ == "__main__":
    main()
