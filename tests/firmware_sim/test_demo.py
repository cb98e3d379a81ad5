"""The real demo as a process: broker, helpers, aggregator and twenty wrists, from recordings to a model that runs.

Also while processes are killed, and stopped and resumed. What it says is compared with what it left behind: logs,
database, ledgers and model files.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from aggregator.assembly import AggregatorFiles
from aggregator.helper.assembly import HelperFiles
from aggregator.store.aggregator_store import AggregatorStore
from device_client.assembly import RealDevice
from firmware_sim.metrics import RunMetrics
from firmware_sim.mosquitto_broker import find_mosquitto
from firmware_sim.run_folder import RunFolder
from firmware_sim.settings import AGGREGATOR, TASK, DemoSettings
from fl_protocol.bundle import open_bundle
from fl_protocol.errors import BundleError
from fl_protocol.signing import public_key_from_hex

ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 120.0
ROUNDS = 4
MANY = 20
"""Rounds where a test interferes: enough that the run is not over before it does."""
needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

Event = dict[str, Any]


@dataclass
class Demo:
    """One start of ``covey-fleet demo``."""

    folder: Path
    process: subprocess.Popen[str]
    rounds: int
    output: list[str] = field(default_factory=list)

    def wait(self) -> int:
        out, _ = self.process.communicate(timeout=WITHIN_S)
        self.output.append(out)
        return self.process.returncode

    @property
    def text(self) -> str:
        return "".join(self.output)

    def log(self, name: str) -> list[Event]:
        """A process's whole lines so far; lines that a kill tore are passed over."""
        events = []
        path = RunFolder(self.folder).log(name)
        for line in path.read_text().split("\n")[:-1] if path.exists() else []:
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
        return events

    def wait_for(self, name: str, condition: Callable[[list[Event]], bool]) -> None:
        """Wait until a process's log says so, while the demo runs."""
        ends_s = time.monotonic() + WITHIN_S
        while not condition(self.log(name)):
            assert self.process.poll() is None, (
                f"the demo ended with {self.process.returncode}: {self.wait()} {self.text}"
            )
            assert time.monotonic() < ends_s, f"{name} did not get that far"
            time.sleep(0.005)


Start = Callable[..., Demo]


@pytest.fixture
def start(tmp_path: Path, cache_home: Path) -> Iterator[Start]:
    """Starts demos; in the end none of their processes may be left."""
    demos: list[Demo] = []

    def start(*arguments: str, rounds: int = ROUNDS, folder: Path | None = None) -> Demo:
        path = folder or tmp_path / "run"
        place = ["--resume", str(path)] if folder is not None else ["--out", str(path), "--rounds", str(rounds)]
        process = subprocess.Popen(
            [sys.executable, "-m", "firmware_sim.cli", "demo", *place, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(cache_home), "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        )
        demos.append(Demo(path, process, rounds))
        return demos[-1]

    yield start
    for demo in demos:
        if demo.process.poll() is None:
            demo.process.kill()
            demo.process.wait()


def processes_of(folder: Path) -> dict[int, list[str]]:
    """Every live process whose command line names this run folder, other than the demo itself."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(str(folder) in part for part in command) and "firmware_sim.cli" not in command:
            found[int(entry.name)] = command
    return found


def children_of(pid: int) -> list[int]:
    """Live processes below one."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *children_of(int(child))]
    return found


def pid_of(demo: Demo, name: str) -> int:
    """The process that runs a daemon's configuration."""
    (pid,) = (pid for pid, command in processes_of(demo.folder).items() if any(f"/{name}/" in part for part in command))
    return pid


def metrics_of(demo: Demo) -> RunMetrics:
    return msgspec.json.decode((demo.folder / "metrics.json").read_bytes(), type=RunMetrics)


def store_of(demo: Demo) -> AggregatorStore:
    return AggregatorFiles.load(RunFolder(demo.folder).aggregator_toml).open_store(create=False)


# What every finished run must hold to.


def check_artefacts(demo: Demo) -> None:
    for name in ("report.html", "metrics.json", "model.covey", "model.tflite", "run.json"):
        assert (demo.folder / name).stat().st_size > 0, name
        if name != "run.json":
            assert str(demo.folder / name) in demo.text
    assert "Traceback" not in demo.text
    assert f"{100 * final_accuracy(demo):.1f} %" in demo.text


def final_accuracy(demo: Demo) -> float:
    metrics = metrics_of(demo)
    assert metrics.final is not None
    return metrics.final.accuracy


def check_rounds_against_logs_and_database(demo: Demo) -> None:
    """Arrivals and bytes as the aggregator told them, each update of a device once."""
    metrics, events = metrics_of(demo), demo.log(AGGREGATOR)
    committed = [record for record in metrics.rounds if record.outcome == "committed"]
    assert [record.version for record in committed] == list(range(1, demo.rounds + 1))
    told = {event["round"]: event for event in events if event["event"] == "round_committed"}
    with sqlite3.connect(demo.folder / "aggregator" / "aggregator.db") as database:
        rows = database.execute("SELECT round, device, hex(update_id), bytes_up FROM updates").fetchall()
    assert len({update for _, _, update, _ in rows}) == len(rows)
    for record in committed:
        mine = [(device, size) for number, device, _, size in rows if number == record.round]
        assert record.arrived == len(mine) == len({device for device, _ in mine})
        assert record.bytes_up == sum(size for _, size in mine)
        if record.round in told:
            assert (record.arrived, record.bytes_up) == (told[record.round]["arrived"], told[record.round]["bytes_up"])


def check_log_adds_up(demo: Demo) -> None:
    """When nobody was killed, the accepted updates that were told add up to the round's."""
    accepted: dict[int, list[Event]] = {}
    for event in demo.log(AGGREGATOR):
        if event["event"] == "update_accepted":
            accepted.setdefault(event["round"], []).append(event)
    for record in metrics_of(demo).rounds:
        assert record.arrived == len({event["device"] for event in accepted[record.round]}) == 16
        assert record.bytes_up == sum(event["bytes"] for event in accepted[record.round])


def check_epsilon_is_the_ledgers(demo: Demo) -> None:
    """What is reported is what each wrist's own ledger says, and nobody went over the budget."""
    metrics, run = metrics_of(demo), RunFolder(demo.folder)
    assert metrics.settings.epsilon is not None
    assert set(metrics.epsilon_spent) == {wrist.device_id for wrist in metrics.settings.training_wrists}
    for wrist in metrics.settings.training_wrists:
        with RealDevice.open(run.device_toml(wrist.device_id)) as device:
            ledger = device.ledger
        assert metrics.epsilon_spent[wrist.device_id] == ledger.spent_epsilon <= metrics.settings.epsilon
        numbers = [entry.round for entry in ledger.reservations]
        assert numbers == sorted(set(numbers)), "a round was charged twice"
        assert {entry.round for entry in ledger.releases} <= set(numbers)
    for wrist in metrics.settings.held_out_wrists:
        with RealDevice.open(run.device_toml(wrist.device_id)) as device:
            assert list(device.ledger.reservations) == []


def check_model_runs_and_is_the_one_that_was_measured(demo: Demo) -> None:
    """Signed by the run's publisher, not its aggregator; inference agrees with the graph and what was told."""
    run, metrics = RunFolder(demo.folder), metrics_of(demo)
    files = AggregatorFiles.load(run.aggregator_toml)
    signed, publisher = (demo.folder / "model.covey").read_bytes(), (demo.folder / "publisher.pub").read_text()
    bundle = open_bundle(signed, publisher=public_key_from_hex(publisher))
    with pytest.raises(BundleError, match="not signed by the pinned publisher"):
        open_bundle(signed, publisher=files.signing_key().public_key())
    store = store_of(demo)
    finished, last = (
        store.models.params(store.models.record(TASK, version)) for version in (demo.rounds + 1, demo.rounds)
    )
    np.testing.assert_array_equal(bundle.params, finished)
    store.close()
    assert not np.array_equal(bundle.params, last), "the finished model is the mean of several versions"

    shape = bundle.manifest.input.shape
    records = []
    for wrist in metrics.settings.held_out_wrists:
        with RealDevice.open(run.device_toml(wrist.device_id)) as device:
            records.append(device.streams["default"].training())
    x, y = np.concatenate([r.x for r in records]), np.concatenate([r.y for r in records])

    graph = Interpreter(model_content=bundle.graph)
    infer = graph.get_signature_runner("infer")
    size = bundle.manifest.batch_size
    padded = np.concatenate([x, np.zeros((-len(x) % size, *shape), np.float32)])
    batches = [infer(params=bundle.params, x=padded[i : i + size])["logits"] for i in range(0, len(padded), size)]
    expected = np.concatenate(batches)[: len(x)]

    exported = Interpreter(model_path=str(demo.folder / "model.tflite"))
    (source,), (sink,) = exported.get_input_details(), exported.get_output_details()
    exported.resize_tensor_input(source["index"], [1, *shape])
    exported.allocate_tensors()
    logits = []
    for window in x:
        exported.set_tensor(source["index"], window[None])
        exported.invoke()
        logits.append(exported.get_tensor(sink["index"])[0])
    np.testing.assert_allclose(np.array(logits), expected, rtol=1e-4, atol=1e-4)
    assert metrics.final is not None
    # The two graphs may round a window that lies on a border to different sides.
    assert abs(float((expected.argmax(axis=1) == y).mean()) - metrics.final.accuracy) <= 2 / len(y)


def check_helpers_unmasked_each_committed_round_once(demo: Demo) -> None:
    """By their own ledgers: the same list of updates at both, and as many as the aggregator combined."""
    metrics, run, lists = metrics_of(demo), RunFolder(demo.folder), []
    assert metrics.helpers == {"helper-a": "patients", "helper-b": "hospital-b"}
    for name in metrics.helpers:
        files = HelperFiles.load(run.helper_toml(name))
        with files.store() as store:
            store.answers.check(files.helper().identity.public_key())
            answered = [record for record, _ in store.answers.all()]
            assert store.refusals.counts() == {}
        arrived = [(record.round, record.arrived) for record in metrics.rounds if record.outcome == "committed"]
        assert [(record.round, record.count) for record in answered] == arrived
        lists.append([record.included_digest for record in answered])
    assert lists[0] == lists[1]
    told = [event["round"] for event in demo.log(AGGREGATOR) if event["event"] == "round_unmasking"]
    timed = {record.round for record in metrics.rounds if record.unmasking_s is not None}
    assert timed
    assert timed <= set(told)


def check_nothing_is_left(demo: Demo) -> None:
    assert demo.process.poll() is not None
    assert processes_of(demo.folder) == {}


def check_finished(demo: Demo) -> None:
    check_nothing_is_left(demo)
    check_artefacts(demo)
    check_rounds_against_logs_and_database(demo)
    check_epsilon_is_the_ledgers(demo)
    check_helpers_unmasked_each_committed_round_once(demo)


def committed_rounds(events: list[Event]) -> int:
    return sum(event["event"] == "round_committed" for event in events)


@needs_mosquitto
def test_the_demo_over_mosquitto_ends_with_a_model_that_runs(start: Start) -> None:
    demo = start("--broker", "mosquitto")
    assert demo.wait() == 0, demo.text
    check_finished(demo)
    check_log_adds_up(demo)
    check_model_runs_and_is_the_one_that_was_measured(demo)
    assert metrics_of(demo).settings == DemoSettings(rounds=ROUNDS)
    assert demo.text.count("accuracy") == ROUNDS
    assert metrics_of(demo).refusals == {}
    assert "mutual TLS 1.3" in demo.text
    assert "sums of at least 8 are unmasked by helper-a (patients) and helper-b (hospital-b)" in demo.text
    assert demo.text.count("unmasked in") == ROUNDS
    metrics = metrics_of(demo)
    assert len(metrics.unmasking_times_s) == ROUNDS
    assert {AGGREGATOR, *metrics.helpers} < set(metrics.peak_rss_mb)


def test_the_demo_over_iotcore_without_noise_ends_with_a_model_that_runs(start: Start) -> None:
    demo = start("--broker", "iotcore", "--no-dp", "--held-out", "1,2,3")
    demo.wait_for(AGGREGATOR, lambda events: committed_rounds(events) >= 1)
    below = children_of(demo.process.pid)
    assert len(below) >= 23  # twenty wrists, two helpers, the aggregator
    assert demo.wait() == 0, demo.text
    check_nothing_is_left(demo)
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]  # the broker's process among them
    check_artefacts(demo)
    check_rounds_against_logs_and_database(demo)
    check_model_runs_and_is_the_one_that_was_measured(demo)
    metrics = metrics_of(demo)
    assert metrics.epsilon_spent == {}
    assert {record.arrived for record in metrics.rounds} == {14}
    assert "no TLS, no ACL" in demo.text
    assert "no privacy claimed" in demo.text
    check_helpers_unmasked_each_committed_round_once(demo)
    # Without noise every update helps: far above the 14 % of a guess, after four rounds already.
    assert final_accuracy(demo) > 0.4


@needs_mosquitto
def test_a_killed_aggregator_wrist_and_helper_lose_nothing_and_count_nothing_twice(start: Start) -> None:
    demo = start("--broker", "mosquitto", rounds=MANY)
    demo.wait_for(AGGREGATOR, lambda events: len(events) > 0)
    pids = [pid_of(demo, name) for name in (AGGREGATOR, "wrist-01-left", "helper-a")]
    demo.wait_for(AGGREGATOR, lambda events: committed_rounds(events) >= 1)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert demo.wait() == 0, demo.text
    assert "aggregator ended (code -9); starting it again" in demo.text
    assert "wrist-01-left ended (code -9); starting it again" in demo.text
    assert "helper-a ended (code -9); starting it again" in demo.text
    check_finished(demo)
    check_model_runs_and_is_the_one_that_was_measured(demo)


@needs_mosquitto
def test_a_demo_that_is_interrupted_leaves_nothing_running_and_is_resumed(start: Start) -> None:
    demo = start("--broker", "mosquitto", rounds=MANY)
    demo.wait_for(AGGREGATOR, lambda events: committed_rounds(events) >= 1)
    demo.process.send_signal(signal.SIGINT)
    assert demo.wait() == 130, demo.text
    check_nothing_is_left(demo)
    assert f"covey-fleet demo --resume {demo.folder}" in demo.text
    before = metrics_of(demo)
    assert before.final is None
    assert 1 <= len([record for record in before.rounds if record.outcome == "committed"]) < MANY
    assert "The run ended before its last round" in (demo.folder / "report.html").read_text()
    assert not (demo.folder / "model.covey").exists()

    resumed = start("--broker", "mosquitto", rounds=MANY, folder=demo.folder)
    assert resumed.wait() == 0, resumed.text
    check_finished(resumed)
    check_model_runs_and_is_the_one_that_was_measured(resumed)


@needs_mosquitto
def test_a_demo_with_the_engine_open_that_is_killed_leaves_nothing_running(start: Start) -> None:
    demo = start("--broker", "mosquitto", "--engine", "open", rounds=MANY)
    demo.wait_for(AGGREGATOR, lambda events: committed_rounds(events) >= 1)
    assert not any(event["event"] in {"helper_key", "round_unmasking"} for event in demo.log(AGGREGATOR))
    assert len(processes_of(demo.folder)) == 22  # the broker, the aggregator and twenty wrists
    demo.process.kill()
    demo.process.wait()
    ends_s = time.monotonic() + WITHIN_S
    while processes_of(demo.folder):
        assert time.monotonic() < ends_s, processes_of(demo.folder)
        time.sleep(0.05)
