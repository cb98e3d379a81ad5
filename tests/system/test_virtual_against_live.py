"""One scenario both ways: simulated, and as processes over mosquitto. Where timing does not decide, the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from benchmarks.virtual_against_live import RoundSeen, differences, run_both
from firmware_sim.fleet.simulation import METRICS, REPORT
from firmware_sim.fleet_metrics import FleetMetrics
from firmware_sim.mosquitto_broker import find_mosquitto
from tests.firmware_sim.fleet.live_scenarios import small_scenario

ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 120.0
needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


@needs_mosquitto
def test_rounds_that_wait_for_everybody_are_the_same_virtual_and_live(tmp_path: Path) -> None:
    result = run_both(small_scenario(tmp_path), tmp_path, broker="mosquitto")
    assert result["differences"] == []
    assert result["equal_models"] == [True, True, True]
    assert [(one["outcome"], one["arrived"], len(one["counted"])) for one in result["live"]] == [
        ("committed", 4, 4)
    ] * 3
    virtual, live = (
        msgspec.json.decode((tmp_path / kind / METRICS).read_bytes(), type=FleetMetrics) for kind in ("virtual", "live")
    )
    # So are what was spent on them and what they are good for.
    assert live.epsilons == virtual.epsilons
    assert [(one.accuracy, one.loss) for one in live.rounds] == [(one.accuracy, one.loss) for one in virtual.rounds]
    assert live.rounds[-1].accuracy is not None
    assert live.deliveries == virtual.deliveries == {"delivered": 12}
    assert live.live is not None
    assert live.live.left_out == ()
    assert "mosquitto on loopback: mutual TLS 1.3" in (tmp_path / "live" / REPORT).read_text()


SEEN = RoundSeen(
    round=1, outcome="committed", arrived=2, counted=("device-0000000", "device-0000001"), model_digest="aa"
)


def test_another_model_another_device_and_a_missing_round_are_differences() -> None:
    assert differences([SEEN], [SEEN]) == []
    other = replace(SEEN, counted=("device-0000000", "device-0000002"), model_digest="bb")
    assert [one.what for one in differences([SEEN], [other])] == ["counted", "model_digest"]
    assert [one.what for one in differences([SEEN], [])] == ["outcome", "arrived", "counted", "model_digest"]


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_ctrl_c_ends_every_process_and_leaves_results(tmp_path: Path) -> None:
    # Its rounds wait for more devices than there are.
    task = dict(small_scenario(tmp_path).scenario.task, engine="open", goal=3, minimum_cohort=3)
    del task["secure"]
    scenario = small_scenario(tmp_path, devices=2, helpers=0, sensors={"kind": "none"}, task=task)
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "firmware_sim.cli", "run", str(scenario.path), "--live", "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        log, ends_s = folder / "logs" / "device-0000001.jsonl", time.monotonic() + WITHIN_S
        while not (log.exists() and "update_sent" in log.read_text()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < ends_s
            time.sleep(0.05)
        assert len(processes_of(folder)) >= 1 + 1 + 2  # runner, aggregator, devices
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=WITHIN_S)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert "Stopped before its end" in out
    assert processes_of(folder) == []
    metrics = msgspec.json.decode((folder / METRICS).read_bytes(), type=FleetMetrics)
    assert metrics.rounds == ()
    assert (folder / REPORT).exists()
