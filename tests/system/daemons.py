"""Both daemons as processes on a clinic's brokers: started, frozen, killed, and asked what their journals say."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from device_client.assembly import RealDevice
from device_client.cli import main
from device_client.deliveries_log import outcomes
from tests.aggregator.operator_desk import BUNDLES, ROOT
from tests.contracts.brokers import WITHIN_S

DEVICE = """
[device]
store = "store"
store_key = "store.key"

[privacy]
epsilon = 50.0
delta = 1e-5
minimum_noise_multiplier = 1.0
minimum_cohort = 2

[eligibility]
require_idle = false
require_unmetered = false

[board]
battery = "none"
thermal_zone = "none"
network = "unmetered"
"""


def until(holds: Callable[[], bool], *, what: str) -> None:
    """Wait for processes."""
    ends_s = time.monotonic() + 2 * WITHIN_S
    while not holds():
        assert time.monotonic() < ends_s, what
        time.sleep(0.02)


@dataclass
class Daemon:
    """A process of ours, one life after the other, with its journal in a file.

    Args:
        folder: where it runs.
        words: the module and its arguments.
        name: of the journal.
    """

    folder: Path
    words: tuple[str, ...]
    name: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def journal(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    def start(self) -> None:
        assert self.process is None
        with self.journal.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.words],
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=out,
                stderr=out,
                start_new_session=True,  # with the process that commits, which dies with it
            )

    def send(self, number: int) -> None:
        """A signal to it and its own processes."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """As a power cut ends it."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.send(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """As an operator ends it."""
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(timeout=WITHIN_S) == 0, self.journal.read_text()
        self.process = None

    def told(self, event: str) -> list[dict[str, Any]]:
        """Everything of this name in its journal."""
        if not self.journal.exists():
            return []
        lines = self.journal.read_bytes().splitlines()
        return [msgspec.json.decode(line) for line in lines if f'"event":"{event}"'.encode() in line]

    def rounds(self, event: str) -> list[int]:
        """Of what rounds it told this."""
        return [int(one["round"]) for one in self.told(event)]

    def await_told(self, event: str, *, round_number: int) -> None:
        """Wait until it told this of a round."""
        until(lambda: round_number in self.rounds(event), what=f"{event} {round_number}: {self._tail()}")

    def _tail(self) -> str:
        return self.journal.read_text()[-3000:]


@dataclass
class Account:
    """What a device has in its ledger: rounds that it was charged for, ids of what left it, and what came of those."""

    charged: list[int]
    released: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Nothing was charged for or released twice, and nothing left without a charge."""
        assert len(set(self.charged)) == len(self.charged)
        assert len(set(self.released.values())) == len(self.released)
        assert set(self.released.values()) <= set(self.charged)

    def of_round(self, number: int) -> str | None:
        """What became of the update for a round."""
        (update_id,) = [one for one, made_for in self.released.items() if made_for == number]
        return self.outcomes.get(update_id)


class Wrist(Daemon):
    """A device that joins by itself and runs ``covey-device run``."""

    def __init__(self, folder: Path, number: int) -> None:
        folder.mkdir()
        super().__init__(folder, ("device_client.cli", "run", "--config", "device.toml"), "device")
        shutil.copy(BUNDLES / "watch_features.covey", folder / "model.covey")
        (folder / "device.toml").write_text(DEVICE)
        rng = np.random.default_rng(number)
        x = rng.normal(size=(90, 128, 6)).astype(np.float32)
        np.savez(folder / "windows.npz", x=x, y=np.arange(90, dtype=np.int32) % 7)

    def type(self, command: str, *rest: str) -> None:
        """One of its commands, in this process."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main([command, "--config", str(self.folder / "device.toml"), *rest])
        assert code == 0, said.getvalue()

    def join(self, claim: Path, token: str, *, study: str) -> None:
        """As docs/operations.md has it."""
        self.type("init")
        bundle = str(self.folder / "model.covey")
        self.type("enroll", "--claim", str(claim), "--token", token, "--bundle", bundle, "--count", "3")
        self.type("import", str(self.folder / "windows.npz"))
        self.type("consent", "grant", study)

    def account(self) -> Account:
        """Of a device that does not run."""
        assert self.process is None
        with RealDevice.open(self.folder / "device.toml") as device:
            charged = [one.round for one in device.ledger.reservations if one.purpose == "update"]
            released = {str(one.update_id): one.round for one in device.ledger.releases}
            return Account(charged, released, outcomes(device.store))
