"""Covey's side of benchmarks/device_footprint.py: ``covey-device run`` from a clean environment, in a real task.

Two wrists of one person train; the first one is measured, the other and the aggregator run in this benchmark's own
environment, so that they share no library's pages with it. The broker is mosquitto with mutual TLS where installed.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.clean_install import Install
from benchmarks.counting_proxy import CountingProxy
from benchmarks.footprint_run import FootprintError, Run, Schedule, wait_for, watch_phases
from benchmarks.peers.environments import isolated
from firmware_sim.brokers import start_broker
from firmware_sim.demo_folder import create_run
from firmware_sim.observation import LogTail
from firmware_sim.processes import DaemonProcess, die_with_parent
from firmware_sim.run_folder import RunFolder
from firmware_sim.settings import AGGREGATOR, DemoSettings
from firmware_sim.watch_data import PEOPLE, Wrist, default_cache, load_recordings

WITHIN_S = 60.0
STOP_WITHIN_S = 10.0
_PORT = re.compile(r"(?m)^port = (\d+)$")


def settings_for(model: str, rounds: int) -> DemoSettings:
    """Both wrists of the first person train."""
    return DemoSettings(held_out=PEOPLE[1:], model=model, rounds=rounds, l2_norm_clip=0.5, engine="open")


def covey_run(folder: Path, install: Install, schedule: Schedule, *, model: str = "watch_features") -> Run:
    """One run of a device of `install`.

    Raises:
        FootprintError: a process did not get where it should, or took too long.
    """
    settings = settings_for(model, schedule.rounds)
    run = create_run(folder, settings, load_recordings(default_cache()))
    broker = start_broker("auto", run, settings)
    measured, companion = settings.training_wrists
    aggregator = DaemonProcess(AGGREGATOR, "aggregator.cli", run.aggregator_toml, run.log(AGGREGATOR))
    other = DaemonProcess(
        companion.device_id, "device_client.cli", run.device_toml(companion.device_id), run.log("other")
    )
    try:
        with CountingProxy(broker_port(run.device_toml(measured.device_id))) as proxy:
            point_at(run.device_toml(measured.device_id), proxy.port)
            with _device(run, measured, install) as (process, cold_start_s):
                other.start()
                _wait_until_says(run, "other", "connected")

                def start_rounds() -> Callable[[], bool]:
                    aggregator.start()
                    return lambda: _said(run, AGGREGATOR, "task_finished")

                phases = watch_phases(process.pid, proxy, schedule, start_rounds=start_rounds)
                took_s = round_times(*(_events(run, measured.device_id, event) for event in ("charged", "trained")))
    finally:
        for daemon in (other, aggregator):
            daemon.ask_to_stop()
            daemon.wait_stopped(time.monotonic() + STOP_WITHIN_S)
        broker.stop()
    if len(took_s) != schedule.rounds:
        raise FootprintError(f"{measured.device_id}: expected {schedule.rounds} rounds, it trained {len(took_s)}")
    return Run(cold_start_s, phases, train_s_per_round=statistics.median(took_s))


def round_times(charged: list[dict[str, Any]], trained: list[dict[str, Any]]) -> list[float]:
    """Seconds of each round from the ledger's charge until the sealed update is durably in the outbox."""
    began_s = {event["round"]: event["at_s"] for event in charged}
    return [event["at_s"] - began_s[event["round"]] for event in trained if event["round"] in began_s]


def broker_port(device_toml: Path) -> int:
    """The broker's port in a device's configuration."""
    ports = {int(port) for port in _PORT.findall(device_toml.read_text(encoding="utf-8"))}
    if len(ports) != 1:
        raise FootprintError(f"{device_toml}: expected one broker's port, found {len(ports)}")
    return ports.pop()


def point_at(device_toml: Path, port: int) -> None:
    """Let the device connect to another port."""
    text = device_toml.read_text(encoding="utf-8")
    device_toml.write_text(_PORT.sub(f"port = {port}", text), encoding="utf-8")


@contextmanager
def _device(run: RunFolder, wrist: Wrist, install: Install) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """The measured device as a user starts it, away from this repository's folder; and its cold start in seconds."""
    command = [install.command("covey-device"), "run", "--config", str(run.device_toml(wrist.device_id))]
    log = run.log(wrist.device_id)
    with log.open("wb") as out, log.with_suffix(".err").open("wb") as err:
        started_s = time.time()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=run.path,
            env=isolated(),
            preexec_fn=die_with_parent,  # noqa: PLW1509 - a single prctl call, no Python locks are taken
        )
    try:
        yield process, _wait_until_says(run, wrist.device_id, "connected") - started_s
    finally:
        process.terminate()
        try:
            process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_says(run: RunFolder, name: str, event: str) -> float:
    """When a process said that `event` happened, Unix seconds."""
    try:
        wait_for(lambda: _said(run, name, event), within_s=WITHIN_S, what=f"{name}: {event}")
    except FootprintError as error:
        complaint = run.log(name).with_suffix(".err").read_text(encoding="utf-8", errors="replace")[-300:]
        raise FootprintError(f"{error}: {complaint.strip() or 'it said nothing'}") from error
    return float(_events(run, name, event)[0]["at_s"])


def _said(run: RunFolder, name: str, event: str) -> bool:
    return bool(_events(run, name, event))


def _events(run: RunFolder, name: str, event: str) -> list[dict[str, Any]]:
    """All events of a kind in a process's log so far."""
    return [entry for entry in LogTail(name, run.log(name)).read() if entry["event"] == event]
