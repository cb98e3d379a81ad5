"""An operator's desk: a folder with configuration and task files, the command, and the service on a virtual broker."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.assembly import AggregatorFiles, make_service
from aggregator.cli import main
from aggregator.intake import IntakeLimits
from aggregator.store.aggregator_store import AggregatorStore
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from fl_protocol.chunking import split
from fl_protocol.messages import RoundManifestMsg, UpdateBodyMsg, encode
from fl_protocol.plans import TrainingPlanMsg
from fl_protocol.sealing import seal_update
from fl_protocol.signing import verify
from fl_protocol.topics import round_topic, upload_topic

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = ROOT / "models" / "bundles"
PUBLISHER = (BUNDLES / "publisher.pub").read_text().strip()
Result = tuple[int, str, str]

CONFIG = """
[aggregator]
tenant = "clinic"
database = "aggregator.db"
signing_key = "keys/aggregator.key"

[broker]
host = "localhost"
port = 1883
"""
HEAD = f"""
bundle = "model.covey"
publisher_key = "{PUBLISHER}"
rounds = 3
goal = 3
minimum_cohort = 2
round_duration_s = 60.0
engine = "open"
"""
TRAINING = f"""
name = "watch"
{HEAD}
[plan]
sampling_rate = 1.0
local_steps = 1
learning_rate = 1.0
l2_norm_clip = 0.5
noise_multiplier = 8.0
expected_batch_size = 40.0
"""
STATISTICS = f"""
kind = "statistics"
name = "scales"
{HEAD}
[plan]
noise_multiplier = 4.0

[[plan.features]]
name = "acceleration x"
statistic = "moments"
channel = 0
low = -2.0
high = 2.0
"""


@dataclass
class Operator:
    """A configured aggregator in a folder, and its command."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch

    def __post_init__(self) -> None:
        (self.folder / "model.covey").write_bytes((BUNDLES / "watch_features.covey").read_bytes())
        self.config.write_text(CONFIG)
        self.write("watch.toml", TRAINING)
        self.write("scales.toml", STATISTICS)
        self.patch.setenv("COLUMNS", "300")

    @property
    def config(self) -> Path:
        return self.folder / "aggregator.toml"

    def write(self, name: str, text: str) -> Path:
        (self.folder / name).write_text(text)
        return self.folder / name

    def run(self, *arguments: str) -> Result:
        """Exit code, standard output, standard error.

        The configuration is named where an argument is ``CONFIG``; one that begins with ``./`` is in the folder.
        """
        given: list[str] = []
        for word in arguments:
            if word == "CONFIG":
                given += ["--config", str(self.config)]
            else:
                given.append(str(self.folder / word[2:]) if word.startswith("./") else word)
        self.patch.setattr(sys, "argv", ["covey-aggregator", *given])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = self.capture.readouterr()
        return code, captured.out, captured.err

    def says(self, *arguments: str) -> str:
        """Standard output of a command that has to work."""
        code, out, err = self.run(*arguments)
        assert (code, err) == (0, ""), (arguments, err)
        return out

    def json(self, *arguments: str) -> Any:
        return msgspec.json.decode(self.says(*arguments, "--json"))

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert old in text
        (self.folder / name).write_text(text.replace(old, new))

    def store(self) -> AggregatorStore:
        return AggregatorFiles.load(self.config).open_store()


def one_sentence(result: Result, code: int, *words: str) -> None:
    assert result[0] == code, result
    assert result[1] == ""
    assert result[2].count("\n") == 1
    assert result[2].startswith("covey-aggregator: ")
    for word in words:
        assert word in result[2], f"{word!r} is not in {result[2]!r}"


@dataclass
class Events:
    """A journal that keeps the names of events."""

    names: list[str] = field(default_factory=list)

    def write(self, event: str, /, *, at_s: float, **fields: Any) -> None:
        del at_s, fields
        self.names.append(event)


class Running:
    """What ``covey-aggregator run`` runs, on a virtual broker; every step takes more than a second of its own time."""

    def __init__(self, operator: Operator, *, name: str = "aggregator", coordinates: bool = True) -> None:
        files = AggregatorFiles.load(operator.config)
        self.key, self.broker, self.journal = files.signing_key(), VirtualBroker(), Events()
        self.now_s = time.time()
        operator.patch.setattr(time, "time", lambda: self.now_s)  # commands and service go by one clock
        self.service = make_service(
            tenant="clinic",
            name=name,
            coordinates=coordinates,
            signing_key=self.key,
            store=files.open_store(),
            transport=VirtualTransport(self.broker),
            journal=self.journal,
            entropy=os.urandom,
            now_s=lambda: self.now_s,
            monotonic_s=lambda: self.now_s,
            limits=IntakeLimits(),
        )
        self.devices = {f"watch-{index}": Ed25519PrivateKey.generate() for index in range(3)}
        for device, key in self.devices.items():
            self.service.store.devices.add(device, key.public_key().public_bytes_raw(), self.now_s)
        self.service.start()
        self.steps(2)

    def steps(self, count: int = 4) -> None:
        for _ in range(count):
            self.now_s += 1.1
            self.service.step()

    def round(self, task: str, values: np.ndarray[Any, np.dtype[np.float32]] | None = None) -> None:
        """All devices send an update for the open round, and it closes."""
        raw = self.broker.retained[round_topic("clinic", task)]
        manifest = verify(raw, RoundManifestMsg, self.key.public_key())
        plan = manifest.plan
        length = manifest.num_parameters if isinstance(plan, TrainingPlanMsg) else plan.length
        update = np.full(length, 0.01, np.float32) if values is None else values
        for device, key in self.devices.items():
            update_id = os.urandom(16)
            body = UpdateBodyMsg(num_parameters=length, values=update.astype("<f4").tobytes())
            sealed = seal_update(body, manifest=manifest, device=device, update_id=update_id, signing_key=key)
            for chunk in split(update_id, sealed, data_bytes=9000):
                topic = upload_topic("clinic", device, update_id, chunk.index)
                self.broker.publish(topic, encode(chunk), retain=False)
        self.steps()


@pytest.fixture
def operator(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Operator:
    return Operator(tmp_path, capsys, monkeypatch)
