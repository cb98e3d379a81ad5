"""The study under load: its files, its registered devices, its mosquitto and its aggregator process.

All that depends on how an aggregator is configured and stores things is here. The aggregator is the command
``covey-aggregator run --config``, from the tree that this file is in.
"""

from __future__ import annotations

import os
import pwd
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from benchmarks.load.connections import HOST
from benchmarks.load.errors import LoadError
from benchmarks.load.uploads import device_key, device_name
from firmware_sim.bundles import bundle_and_publisher
from firmware_sim.mosquitto_broker import MosquittoBroker, free_port
from firmware_sim.processes import die_with_parent
from fl_protocol.bundle import open_bundle, pack_bundle
from fl_protocol.model_manifest import ParameterSpec
from fl_protocol.sealing import RoundKey
from fl_protocol.signing import public_key_from_hex, public_key_hex

TENANT, TASK = "load", "load"
DATABASE = "aggregator.db"
REPOSITORY = Path(__file__).parents[2]
MOSQUITTO = """listener {port} 127.0.0.1
allow_anonymous true
user {account}
set_tcp_nodelay true
max_connections -1
max_queued_messages 0
max_inflight_messages 1000
persistence false
log_dest stdout
log_type error
log_type warning
connection_messages false
"""
CONFIG = """[aggregator]
tenant = "{tenant}"
database = "{database}"
signing_key = "aggregator.key"

[broker]
host = "127.0.0.1"
port = {port}
"""
TASK_FILE = """name = "{task}"
bundle = "model.covey"
publisher_key = "{publisher}"
rounds = {rounds}
goal = {goal}
minimum_cohort = 2
round_duration_s = 3600.0
engine = "open"

[plan]
sampling_rate = 1.0
local_steps = 1
learning_rate = 1.0
l2_norm_clip = 1.0
noise_multiplier = 1.0
expected_batch_size = 1.0
"""
_COMMAND = [sys.executable, "-m", "aggregator.cli"]
_ENDS_WITHIN_S = 20.0


@dataclass(frozen=True)
class Settings:
    """What a study is like.

    Args:
        num_parameters: d.
        devices: how many are registered.
        goal: updates at which a round closes.
        rounds: committed rounds that finish the task.
    """

    num_parameters: int
    devices: int
    goal: int
    rounds: int = 1


@dataclass
class Study:
    """A study that was set up, its broker running."""

    settings: Settings
    folder: Path
    broker_port: int
    broker_pid: int
    public_key: Ed25519PublicKey

    @property
    def config(self) -> Path:
        """Its configuration file."""
        return self.folder / "aggregator.toml"

    def round_key(self, number: int) -> RoundKey:
        """The private key of an open round, for the primitives to open the same bytes with."""
        with closing(sqlite3.connect(self.folder / DATABASE)) as connection:
            row = connection.execute("SELECT kem, secret FROM rounds WHERE number = ?", (number,)).fetchone()
        if row is None or row[1] is None:
            raise LoadError(f"expected round {number} to be open, and its key in the database")
        return RoundKey(*row)


class Aggregator:
    """The aggregator's process. Use as a context manager, which ends it."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._log = study.folder / "aggregator.log"
        self._start()

    def __enter__(self) -> Aggregator:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(timeout=_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        """Start the command."""
        with self._log.open("ab") as log:
            self.started_s = time.monotonic()
            self._process = subprocess.Popen(
                [*_COMMAND, "run", "--config", str(self._study.config)],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - a single prctl call, no Python locks are taken
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def check(self) -> None:
        """Raise LoadError if the process has ended."""
        if self._process.poll() is not None:
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise LoadError(
                f"the aggregator ended with {self._process.returncode}: {lines[-1] if lines else 'nothing'}"
            )

    def halt(self) -> None:
        """Stop it where it is; the broker keeps what comes for it."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> float:
        """Let it run again; when that was."""
        self._process.send_signal(signal.SIGCONT)
        return time.monotonic()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def start_again(self) -> float:
        """Start it after `kill`; when that was."""
        self._start()
        return self.started_s


@contextmanager
def running_study(folder: Path, settings: Settings) -> Iterator[Study]:
    """Write the files, make the keys, register the devices, start the broker; stop it in the end."""
    folder.mkdir(parents=True)
    port, account = free_port(), pwd.getpwuid(os.geteuid()).pw_name
    (folder / "mosquitto.conf").write_text(MOSQUITTO.format(port=port, account=account), encoding="utf-8")
    publisher = Ed25519PrivateKey.generate()
    (folder / "model.covey").write_bytes(synthetic_bundle(settings.num_parameters, publisher))
    config = folder / "aggregator.toml"
    config.write_text(CONFIG.format(database=DATABASE, tenant=TENANT, port=port), encoding="utf-8")
    task = TASK_FILE.format(
        task=TASK,
        publisher=public_key_hex(publisher.public_key()),
        rounds=settings.rounds,
        goal=settings.goal,
    )
    (folder / "task.toml").write_text(task, encoding="utf-8")
    made = _command("init", "--config", str(config))
    _command("task", "create", str(folder / "task.toml"), "--config", str(config))
    register(folder, range(settings.devices))
    broker = MosquittoBroker(folder / "mosquitto.conf", host=HOST, port=port, log=folder / "mosquitto.log")
    try:
        key = public_key_from_hex(made.strip().splitlines()[-1])
        yield Study(settings, folder, port, broker.pid, key)
    finally:
        broker.stop()


def _command(*arguments: str) -> str:
    """Run one command of the aggregator's to its end; what it printed."""
    done = subprocess.run([*_COMMAND, *arguments], cwd=REPOSITORY, check=False, capture_output=True, text=True)
    if done.returncode:
        raise LoadError(f"covey-aggregator {arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def register(folder: Path, indices: Iterable[int]) -> None:
    """What ``covey-aggregator device add`` does, for all devices in one transaction."""
    rows = [(device_name(index), device_key(index).public_key().public_bytes_raw()) for index in indices]
    with closing(sqlite3.connect(folder / DATABASE)) as connection, connection:
        connection.executemany("INSERT INTO devices (device, public_key, added_s) VALUES (?, ?, 0.0)", rows)


def synthetic_bundle(num_parameters: int, publisher: Ed25519PrivateKey) -> bytes:
    """A bundle with this many parameters, all zero; its graphs are none, which only a device would notice."""
    path, key = bundle_and_publisher("watch_features")
    sample = open_bundle(path.read_bytes(), publisher=public_key_from_hex(key)).manifest
    manifest = msgspec.structs.replace(
        sample,
        name="load",
        num_parameters=num_parameters,
        num_shared_parameters=num_parameters,
        parameters=(ParameterSpec(name="load/kernel", shape=(num_parameters,), offset=0),),
        infer_params_offset=0,
    )
    return pack_bundle(
        manifest,
        graph=b"no graph",
        infer_template=bytes(4 * num_parameters),
        params=np.zeros(num_parameters, np.float32),
        keras_json=b"{}",
        frozen=np.zeros(0, np.float32),
        publisher_key=publisher,
    )
