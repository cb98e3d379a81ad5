"""A device in another program, and as a process: cheap to import, stopped by a signal, killed at any time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import device_client
from aggregator.assembly import AggregatorFiles
from aggregator.config import AggregatorConfig, AggregatorSection
from aggregator.task_creation import create_task
from aggregator.task_file import write_task
from device_client.adapters.system_time import SystemBell
from device_client.assembly import DeviceFiles, RealDevice
from device_client.device import Device
from device_client.device_store import create_identity
from firmware_sim import iotcore_broker
from firmware_sim.mosquitto_broker import free_port
from fl_protocol.adapters.files import write_atomic
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.errors import ConfigError
from fl_protocol.signing import public_key_hex
from tests.virtual_fleet import AGGREGATOR_KEY, bundle_folder, load_bundle, synthetic_records, task_config

ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 60.0
STUDY = "clinic/watch"


def write_device(folder: Path, *, port: int = 1, aggregator_key: str | None = None, records: int = 0) -> Path:
    """A configured device with keys, whose broker is on loopback."""
    publisher = (bundle_folder() / "publisher.pub").read_text().strip()
    (folder / "model.covey").write_bytes((bundle_folder() / "watch_features.covey").read_bytes())
    config = folder / "device.toml"
    config.write_text(
        f"""
[[study]]
tenant = "clinic"
task = "watch"
id = "watch-7"
bundle = "model.covey"
publisher_key = "{publisher}"
aggregator_key = "{aggregator_key or public_key_hex(AGGREGATOR_KEY.public_key())}"
broker = {{ host = "127.0.0.1", port = {port} }}

[device]
store = "store"
store_key = "store.key"

[privacy]
epsilon = 100.0
delta = 1e-5

[eligibility]
require_idle = false
require_unmetered = false
minimum_battery_percent = 0
maximum_temperature_celsius = 200
"""
    )
    store = DeviceFiles.load(config).open_store(create=True)
    create_identity(store, STUDY, os.urandom)
    store.close()
    if records:
        windows = synthetic_records(load_bundle(), seed=1, count=records)
        with RealDevice.open(config) as device:
            device.add(windows.x, windows.y)
            device.grant(STUDY)
    return config


# Embedding.


HEAVY = ("paho", "ai_edge_litert", "tflite_runtime")
LOADED = "import sys; {}; print([name for name in {} if name in sys.modules])"


def test_importing_the_device_loads_neither_mqtt_nor_a_runtime() -> None:
    code = LOADED.format("from device_client import Device", HEAVY)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "[]\n"


def test_the_package_offers_the_device_and_nothing_that_is_not_there() -> None:
    assert device_client.Device is Device
    with pytest.raises(AttributeError, match="has no attribute 'Devices'"):
        _ = device_client.Devices


def test_the_example_of_embedding_runs_without_a_broker(tmp_path: Path) -> None:
    config = write_device(tmp_path)
    example = (ROOT / "examples" / "embedded_device.py").read_text()
    assert "threading.Timer(10, " in example
    (tmp_path / "example.py").write_text(example.replace("threading.Timer(10, ", "threading.Timer(0.3, "))
    found = subprocess.run(
        [sys.executable, str(tmp_path / "example.py"), str(config)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=WITHIN_S,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == "no connection to the broker\n"
    with Device.open(config) as device:
        assert device.consent_problem(STUDY) == ""
        assert sum(len(stream) for stream in device.streams.values()) == 3


def test_a_device_can_be_stepped_and_is_closed_by_its_block(tmp_path: Path) -> None:
    config = write_device(tmp_path)
    with Device.open(str(config)) as device:
        assert device.add(np.zeros((2, 128, 6)), [0, 1]) == 2
        device.stop()  # rings the bell, so that the step does not wait
        device.step()
        assert device.status().streams[0].records == 2
    with Device.open(config) as device:
        assert device.status().streams[0].records == 2


def test_a_missing_configuration_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        Device.open(tmp_path / "missing.toml")


def test_a_start_that_fails_leaves_the_store_unlocked(tmp_path: Path) -> None:
    config = write_device(tmp_path)
    (tmp_path / "model.covey").rename(tmp_path / "away.covey")
    with pytest.raises(ConfigError):
        Device.open(config)
    (tmp_path / "away.covey").rename(tmp_path / "model.covey")
    Device.open(config).close()


# The bell.


def check_the_bell_may_be_rung_while_it_is_waited_on(make: str, *, within_s: float = 60.0) -> None:
    """Ring from a trace function at every line that waiting runs through, as a signal handler might."""
    code = f"""
import sys, threading
from device_client.adapters.system_time import SystemBell
class EventBell:
    def __init__(self): self._rung = threading.Event()
    def ring(self): self._rung.set()
    def wait(self, timeout_s):
        self._rung.wait(timeout_s)
        self._rung.clear()
bell, inside = {make}(), False
def trace(frame, event, argument):
    global inside
    if not inside:
        inside = True
        bell.ring()
        inside = False
    return trace
bell.ring()
sys.settrace(trace)
for _ in range(3):
    bell.wait(0.01)
sys.settrace(None)
"""
    try:
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=within_s)
    except subprocess.TimeoutExpired:
        raise AssertionError("it waits for itself") from None


def test_the_bell_may_be_rung_from_a_signal_handler() -> None:
    check_the_bell_may_be_rung_while_it_is_waited_on("SystemBell")


def test_a_bell_over_an_event_is_noticed() -> None:
    with pytest.raises(AssertionError, match="waits for itself"):
        check_the_bell_may_be_rung_while_it_is_waited_on("EventBell", within_s=3.0)


def test_a_ring_before_the_wait_counts_and_many_count_once() -> None:
    bell = SystemBell()
    for _ in range(100_000):
        bell.ring()
    assert bell._rings.qsize() == 1  # while nobody waits they do not pile up
    begun_s = time.monotonic()
    bell.wait(60.0)
    assert time.monotonic() - begun_s < 30.0
    bell.wait(0.0)
    bell.wait(-1.0)


# Processes.


class Daemon:
    """``covey-device run`` as a process."""

    def __init__(self, config: Path, module: str = "device_client.cli") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "run", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self.events: list[dict[str, Any]] = []

    def until(self, *names: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] in names:
                return self.events[-1]
        raise AssertionError(f"it ended without {names}: {self.events}")

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=WITHIN_S)
        self.events += [json.loads(line) for line in out.splitlines()]
        assert "Traceback" not in err, err
        return self.process.returncode


@pytest.fixture
def port() -> Iterator[int]:
    broker = iotcore_broker.start(free_port())
    yield broker.port
    broker.stop()


def test_a_wait_ends_when_another_thread_rings() -> None:
    bell = SystemBell()
    begun_s = time.monotonic()
    for _ in range(200):
        ringing = threading.Thread(target=bell.ring)
        ringing.start()
        bell.wait(60.0)
        ringing.join()
    assert time.monotonic() - begun_s < 50.0


@contextmanager
def study(folder: Path, port: int, **plan: Any) -> Iterator[tuple[Path, Daemon]]:
    """An aggregator at work, and a device of its study that does not run yet."""
    from msgspec.structs import replace  # noqa: PLC0415
    from msgspec.toml import encode  # noqa: PLC0415

    config = AggregatorConfig(
        aggregator=AggregatorSection(tenant="clinic", database="aggregator.db", signing_key="signing.key"),
        broker=BrokerConfig("127.0.0.1", port),
    )
    task = task_config(
        bundle="model.covey",
        publisher_key=(bundle_folder() / "publisher.pub").read_text().strip(),
        plan=replace(task_config().plan, **plan),
        goal=1,
        minimum_cohort=1,
        rounds=500,
        round_duration_s=600.0,
        engine="open",
    )
    (folder / "watch.toml").write_text(write_task(task))
    write_atomic(folder / "aggregator.toml", encode(config))
    files = AggregatorFiles.load(folder / "aggregator.toml")
    key = public_key_hex(files.signing_key(create=True).public_key())
    device = write_device(folder, port=port, aggregator_key=key, records=40)
    store = files.open_store()
    create_task(store, folder / "watch.toml", now_s=time.time())
    with RealDevice.open(device) as real:
        identity = create_identity(real.store, STUDY, os.urandom)
    store.devices.add("watch-7", identity.public_key().public_bytes_raw(), time.time())
    store.close()
    aggregator = Daemon(folder / "aggregator.toml", "aggregator.cli")
    daemons = [aggregator]
    try:
        yield device, aggregator
    finally:
        for daemon in daemons:
            daemon.process.kill()
            daemon.process.communicate()


def test_a_signal_ends_it_within_a_moment_with_its_work_put_aside(tmp_path: Path, port: int) -> None:
    with study(tmp_path, port, local_steps=100_000, noise_multiplier=500.0) as (config, _):
        daemon = Daemon(config)
        daemon.until("charged")
        begun_s = time.monotonic()
        assert daemon.end(signal.SIGTERM) == 0
        assert time.monotonic() - begun_s < 10.0
        assert daemon.events[-1]["event"] == "stopped"
        (paused,) = [event for event in daemon.events if event["event"] == "training_paused"]
        assert not (tmp_path / "store.sock").exists()
        again = Daemon(config)
        again.until("connected")
        assert again.end(signal.SIGINT) == 0
        (later,) = [event for event in again.events if event["event"] == "training_paused"]
        assert later["step"] >= paused["step"]
        with RealDevice.open(config) as device:
            assert len(device.ledger.reservations) == 1


def test_killed_again_and_again_it_goes_on_and_is_charged_once_a_round(tmp_path: Path, port: int) -> None:
    with study(tmp_path, port) as (config, aggregator):
        for event in ("charged", "trained", "update_sent", "connected", "update_delivered"):
            daemon = Daemon(config)
            daemon.until(event)
            daemon.process.kill()
            daemon.process.communicate()
        daemon = Daemon(config)
        for _ in range(3):
            daemon.until("update_delivered")
        assert daemon.end(signal.SIGTERM) == 0
        assert aggregator.end(signal.SIGTERM) == 0
        accepted = [event["round"] for event in aggregator.events if event["event"] == "update_accepted"]
        assert len(accepted) == len(set(accepted)) >= 4
        with RealDevice.open(config) as device:
            charged = [line.round for line in device.ledger.reservations]
            assert charged == sorted(set(charged))
            assert set(accepted) <= {line.round for line in device.ledger.releases} <= set(charged)
