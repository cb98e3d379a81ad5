"""docs/operations.md, followed line by line: its configuration files and commands lead to a trained model."""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.config import AggregatorConfig
from firmware_sim.mosquitto_broker import find_mosquitto, free_port
from fl_protocol.bundle import open_bundle
from fl_protocol.errors import BundleError
from fl_protocol.signing import public_key_from_hex, public_key_hex

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
WITHIN_S = 60.0
ROUNDS = 3
MODULES = {"covey-aggregator": "aggregator.cli", "covey-device": "device_client.cli"}

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


def blocks(language: str) -> list[str]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", PAGE, re.S | re.M)
    return [match[2] for match in found if match[1] == language]


def command(verb: str) -> list[str]:
    """The page's command that begins like this, comments and where its configuration is left aside."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    plain = {re.sub(r" --config \S+", "", " ".join(line.split())): line for line in lines}
    # The first: what the page says later of the same commands is about devices that join by themselves.
    found = next(line for text, line in plain.items() if text.startswith(verb))
    return shlex.split(found, comments=True)


def arguments(words: list[str]) -> list[str]:
    """The same with the programs as modules, so that nothing has to be installed."""
    return [sys.executable, "-m", MODULES[words[0]], *words[1:]]


class Desk:
    """The two folders of the page, and the commands typed in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        self.started: list[subprocess.Popen[str]] = []

    def type(self, where: str, words: list[str]) -> str:
        result = subprocess.run(
            arguments(words),
            cwd=self.folder / where,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=WITHIN_S,
        )
        assert result.returncode == 0, (words, result.stderr)
        return result.stdout.strip()

    def start(self, where: str, words: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words, cwd=self.folder / where, env=self.environment, stdout=subprocess.PIPE, text=True
        )
        self.started.append(process)
        return process

    def stop(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()


def scrape(port: int) -> str:
    """What Prometheus would get."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WITHIN_S) as answer:
        text: str = answer.read().decode()
    return text


def wait_for_event(process: subprocess.Popen[str], event: str) -> dict[str, object]:
    """Read a daemon's journal until it says so."""
    ends_s = time.monotonic() + WITHIN_S
    assert process.stdout is not None
    for line in process.stdout:
        found: dict[str, object] = json.loads(line)
        if found["event"] == event:
            return found
        assert time.monotonic() < ends_s, f"no {event} in time"
    raise AssertionError(f"the daemon ended without {event}")


def test_the_pages_helpers_go_before_the_first_section_of_aggregator_toml() -> None:
    aggregator_toml, _, _, _, helpers_toml, *_ = blocks("toml")
    keys = iter(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32).public_key() for number in (1, 2))
    pins = re.sub(r'key = "\.\.\."', lambda _: f'key = "{public_key_hex(next(keys))}"', helpers_toml)
    config = msgspec.toml.decode(pins + aggregator_toml, type=AggregatorConfig)
    assert [(pin.name, pin.operator) for pin in config.helpers] == [
        ("helper-a", "patients-union"),
        ("helper-b", "hospital-b"),
    ]


def test_the_page_followed_by_hand_trains_a_model(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    aggregator_toml, task_toml, device_toml, enrolment_toml, _, elsewhere_toml, *others = blocks("toml")
    assert [text.split()[0] for text in others] == ["[[webhook]]", "[api]", "[api]"]
    for more in (enrolment_toml, *others):
        filled = more.replace('"..."', f'"{"11" * 32}"')
        msgspec.toml.decode(aggregator_toml + filled, type=AggregatorConfig)
    assert msgspec.toml.decode(elsewhere_toml, type=AggregatorConfig).aggregator.blobs is not None
    publisher = (ROOT / "models" / "bundles" / "publisher.pub").read_text().strip()
    port = free_port()

    def fill(text: str, **keys: str) -> str:
        for name, value in keys.items():
            text, count = re.subn(rf'^{name} = "\.\.\."', f'{name} = "{value}"', text, flags=re.M)
            assert count == 1, name
        return re.sub(r"^port = 1883", f"port = {port}", text, flags=re.M)

    (tmp_path / "p").mkdir()
    for name in ("a", "d"):
        (tmp_path / name).mkdir()
        bundle = (ROOT / "models" / "bundles" / "watch_features.covey").read_bytes()
        (tmp_path / name / "watch_features.covey").write_bytes(bundle)
    printf = command("printf")
    (tmp_path / "a" / "mosquitto.conf").write_text(printf[1].replace("\\n", "\n").replace("1883", str(port)))
    try:
        program = find_mosquitto()
        assert program is not None
        desk.start("a", [program, *command("mosquitto -c")[1:]])

        (tmp_path / "a" / "aggregator.toml").write_text(fill(aggregator_toml))
        task_toml = re.sub(r"^rounds = 60", f"rounds = {ROUNDS}", fill(task_toml, publisher_key=publisher), flags=re.M)
        (tmp_path / "a" / "exercises.toml").write_text(task_toml)
        aggregator_key = desk.type("a", command("covey-aggregator init"))
        assert "exercises (train) is created" in desk.type("a", command("covey-aggregator task create"))
        keys = {"publisher_key": publisher, "aggregator_key": aggregator_key}
        (tmp_path / "d" / "device.toml").write_text(fill(device_toml, **keys))
        device_key = desk.type("d", command("covey-device init"))
        add = [word.replace("PUBLIC_KEY_HEX", device_key) for word in command("covey-aggregator device add")]
        assert desk.type("a", add) == "watch-7 may send updates"

        x = np.random.default_rng(1).normal(size=(90, 128, 6)).astype(np.float32)
        np.savez(tmp_path / "d" / "windows.npz", x=x, y=np.arange(90, dtype=np.int32) % 7)
        assert desk.type("d", command("covey-device import")).startswith("90 windows stored, encrypted")
        assert "clinic/exercises: does not run: not granted" in desk.type("d", command("covey-device consent list"))
        assert desk.type("d", command("covey-device consent grant")).startswith("granted: clinic/exercises")

        aggregator = desk.start("a", arguments(command("covey-aggregator run")))
        wait_for_event(aggregator, "round_opened")
        assert "when its open round has closed" in desk.type("a", command("covey-aggregator task pause"))
        assert desk.type("a", command("covey-aggregator task resume")) == "exercises goes on"
        worker = desk.start("a", arguments(command("covey-aggregator worker")))
        while wait_for_event(worker, "shards_changed")["shards"] != 32:
            pass  # what the aggregator gives back comes a little later
        device = desk.start("d", arguments(command("covey-device run")))
        wait_for_event(device, "update_delivered")
        assert "clinic/exercises: " in desk.type("d", command("covey-device status"))  # while the daemon runs
        wait_for_event(aggregator, "task_finished")
        for process in (device, worker, aggregator):
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=WITHIN_S) == 0

        status = desk.type("a", command("covey-aggregator status"))
        assert f"{ROUNDS} of {ROUNDS}" in status
        assert "worker-1" in status
        assert f"{ROUNDS} of {ROUNDS}" in desk.type("a", command("covey-aggregator task list"))
        shown = desk.type("a", command("covey-aggregator task show"))
        assert f"in all {ROUNDS} committed rounds" in shown
        assert shown.count("committed  ") >= ROUNDS
        ledger = desk.type("d", command("covey-device ledger"))
        assert re.match(r"spent: epsilon 0\.\d+ of 3 at delta 1e-05\ncharges: 3\n", ledger)
        sent = desk.type("d", command("covey-device sent")).splitlines()
        assert len(sent) == ROUNDS
        assert all("as watch-7" in line for line in sent)
        assert "may train: yes" in desk.type("d", command("covey-device status"))
        assert desk.type("d", command("covey-device consent withdraw")).startswith("withdrawn: clinic/exercises")
        assert desk.type("d", [*command("covey-device erase"), "--yes"]).startswith("erased: recordings")
        tag = [word.replace("12", str(ROUNDS)) for word in command("covey-aggregator model tag")]
        assert desk.type("a", tag) == f"version {ROUNDS} of exercises has the tag released"
        assert "released" in desk.type("a", command("covey-aggregator model list"))
        rollback = [word.replace("11", str(ROUNDS - 1)) for word in command("covey-aggregator model rollback")]
        assert "left for the coordinator, which is not running" in desk.type("a", rollback)
        desk.type("a", command("covey-aggregator backup"))
        assert (tmp_path / "a" / "monday.backup").stat().st_size > 0
        desk.type("a", command("covey-aggregator model export"))
        exported = (tmp_path / "a" / "model" / "model.covey").read_bytes()
        publisher_key = desk.type("p", command("covey-aggregator publisher keygen"))
        for pinned in (aggregator_key, publisher_key):
            with pytest.raises(BundleError, match="nobody has signed it"):
                open_bundle(exported, publisher=public_key_from_hex(pinned))
        (tmp_path / "p" / "model").mkdir()
        (tmp_path / "p" / "model" / "model.covey").write_bytes(exported)
        (tmp_path / "p" / "watch_features.covey").write_bytes((tmp_path / "d" / "watch_features.covey").read_bytes())
        assert publisher_key in desk.type("p", command("covey-aggregator publisher sign"))
        signed = (tmp_path / "p" / "model" / "model.covey").read_bytes()
        assert open_bundle(signed, publisher=public_key_from_hex(publisher_key)).manifest.version > 1
        assert "signatures" in desk.type("p", command("covey-aggregator publisher show"))
        abort = [*command("covey-aggregator task abort"), "--yes"]
        assert "left for the coordinator" in desk.type("a", abort)
    finally:
        desk.stop()


def test_the_pages_certificates_and_acl_let_aggregator_and_worker_in(tmp_path: Path) -> None:
    desk, port, metrics_port, worker_port = Desk(tmp_path), free_port(), free_port(), free_port()
    (tmp_path / "a").mkdir()
    elsewhere = blocks("toml")[5]
    for there, here in (
        (r"^port = .*", f"port = {port}"),
        (r"^host = .*", 'host = "localhost"'),
        (r"^database = .*", 'database = "aggregator.db"'),
        (r"^blobs = .*\n", ""),
        (r"^metrics_port = .*", f"metrics_port = {metrics_port}"),
    ):
        elsewhere, count = re.subn(there, here, elsewhere, flags=re.M)
        assert count > 0, there
    (tmp_path / "a" / "aggregator.toml").write_text(elsewhere)
    desk.type("a", command("covey-aggregator init"))
    desk.type("a", command("covey-aggregator ca init"))
    server = [word.replace("broker.example", "localhost") for word in command("covey-aggregator ca server")]
    desk.type("a", server)
    client = command("covey-aggregator ca client")
    for name in ("aggregator", "worker-1"):
        desk.type("a", [word.replace("aggregator", name) if word == "aggregator" else word for word in client])
    account = pwd.getpwuid(os.geteuid()).pw_name
    broker = command("covey-aggregator broker config")
    desk.type("a", [*broker, "--worker", "worker-1", "--user", account])
    try:
        program = find_mosquitto()
        assert program is not None
        desk.start("a", [program, "-c", "broker/mosquitto.conf"])
        aggregator = desk.start("a", arguments(command("covey-aggregator run")))
        wait_for_event(aggregator, "connected")
        worker = arguments(command("covey-aggregator worker"))
        started = desk.start("a", [*worker, "--metrics-port", str(worker_port)])
        wait_for_event(started, "connected")
        status = desk.type("a", command("covey-aggregator status"))
        assert "not connected" not in status
        assert "worker-1" in status
        for answers in (metrics_port, worker_port):
            assert "\ncovey_broker_connected 1.0\n" in scrape(answers)
        borrowed = subprocess.run(
            [word.replace("worker-1", "worker-9") for word in worker],
            cwd=tmp_path / "a",
            env=desk.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=WITHIN_S,
        )
        assert borrowed.returncode == 2
        assert "covey-aggregator ca client --name worker-9" in borrowed.stderr
    finally:
        desk.stop()
