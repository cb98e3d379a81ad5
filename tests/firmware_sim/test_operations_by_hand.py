"""docs/operations.md, followed line by line: its configuration files and commands lead to a trained model."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from firmware_sim.mosquitto_broker import find_mosquitto, free_port
from fl_protocol.bundle import open_bundle
from fl_protocol.signing import public_key_from_hex

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
    (found,) = (line for text, line in plain.items() if text.startswith(verb))
    return shlex.split(found, comments=True)


def arguments(words: list[str]) -> list[str]:
    """The same with the programs as modules, so that nothing has to be installed."""
    return [sys.executable, "-m", MODULES[words[0]], *words[1:]]


class Desk:
    """The two folders of the page, and the commands typed in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
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


def test_the_page_followed_by_hand_trains_a_model(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    aggregator_toml, device_toml = blocks("toml")
    publisher = (ROOT / "models" / "bundles" / "publisher.pub").read_text().strip()
    port = free_port()

    def fill(text: str, **more: str) -> str:
        for name, value in {"publisher_key": publisher, **more}.items():
            text, count = re.subn(rf'^{name} = "\.\.\."', f'{name} = "{value}"', text, flags=re.M)
            assert count == 1, name
        text = re.sub(r"^port = 1883", f"port = {port}", text, flags=re.M)
        return re.sub(r"^rounds = 60", f"rounds = {ROUNDS}", text, flags=re.M)

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
        aggregator_key = desk.type("a", command("covey-aggregator init"))
        (tmp_path / "d" / "device.toml").write_text(fill(device_toml, aggregator_key=aggregator_key))
        device_key = desk.type("d", command("covey-device init"))
        add = [word.replace("PUBLIC_KEY_HEX", device_key) for word in command("covey-aggregator device add")]
        assert desk.type("a", add) == "watch-7 may send updates"

        x = np.random.default_rng(1).normal(size=(90, 128, 6)).astype(np.float32)
        np.savez(tmp_path / "d" / "windows.npz", x=x, y=np.arange(90, dtype=np.int32) % 7)
        assert desk.type("d", command("covey-device import")).startswith("90 windows stored, encrypted")
        assert "clinic/exercises: does not run: not granted" in desk.type("d", command("covey-device consent list"))
        assert desk.type("d", command("covey-device consent grant")).startswith("granted: clinic/exercises")

        aggregator = desk.start("a", arguments(command("covey-aggregator run")))
        device = desk.start("d", arguments(command("covey-device run")))
        wait_for_event(device, "update_delivered")
        assert "clinic/exercises: " in desk.type("d", command("covey-device status"))  # while the daemon runs
        wait_for_event(aggregator, "task_finished")
        for process in (device, aggregator):
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=WITHIN_S) == 0

        assert f"{ROUNDS} of {ROUNDS}" in desk.type("a", command("covey-aggregator status"))
        ledger = desk.type("d", command("covey-device ledger"))
        assert re.match(r"spent: epsilon 0\.\d+ of 3 at delta 1e-05\ncharges: 3\n", ledger)
        sent = desk.type("d", command("covey-device sent")).splitlines()
        assert len(sent) == ROUNDS
        assert all("as watch-7" in line for line in sent)
        assert "may train: yes" in desk.type("d", command("covey-device status"))
        assert desk.type("d", command("covey-device consent withdraw")).startswith("withdrawn: clinic/exercises")
        assert desk.type("d", [*command("covey-device erase"), "--yes"]).startswith("erased: recordings")
        desk.type("a", command("covey-aggregator export"))
        exported = (tmp_path / "a" / "model" / "model.covey").read_bytes()
        assert open_bundle(exported, publisher=public_key_from_hex(aggregator_key)).manifest.version > 1
    finally:
        for process in desk.started:
            process.kill()
            process.wait()
