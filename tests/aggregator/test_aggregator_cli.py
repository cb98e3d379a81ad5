"""``covey-aggregator``: what it prints, its exit codes, and errors a person can act on."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from aggregator.assembly import AggregatorFiles, assemble
from aggregator.cli import main
from aggregator.combine import GlobalModel
from aggregator.rounds import Phase, RoundState
from fl_protocol.bundle import open_bundle
from fl_protocol.errors import RefusalReason
from fl_protocol.signing import public_key_from_hex
from tests.virtual_fleet import MemoryJournal, bundle_folder, load_bundle

Result = tuple[int, str, str]


@dataclass
class Operator:
    """A configured aggregator in a folder, and its command."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch

    @property
    def config(self) -> Path:
        return self.folder / "aggregator.toml"

    def run(self, *arguments: str) -> Result:
        """Exit code, standard output, standard error; the configuration is named where an argument is ``CONFIG``."""
        given = [
            part for word in arguments for part in (["--config", str(self.config)] if word == "CONFIG" else [word])
        ]
        self.patch.setattr(sys, "argv", ["covey-aggregator", *given])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = self.capture.readouterr()
        return code, captured.out, captured.err

    def edit(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))


@pytest.fixture
def operator(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Operator:
    publisher = (bundle_folder() / "publisher.pub").read_text().strip()
    (tmp_path / "model.covey").write_bytes((bundle_folder() / "watch_features.covey").read_bytes())
    (tmp_path / "aggregator.toml").write_text(
        f"""
[aggregator]
tenant = "clinic"
database = "aggregator.db"
signing_key = "keys/aggregator.key"

[broker]
host = "localhost"
port = 1883

[task]
name = "watch"
bundle = "model.covey"
publisher_key = "{publisher}"
rounds = 3
goal = 3
minimum_cohort = 2
round_duration_s = 60.0

[task.plan]
sampling_rate = 1.0
local_steps = 1
learning_rate = 1.0
l2_norm_clip = 0.5
noise_multiplier = 8.0
expected_batch_size = 40.0
"""
    )
    return Operator(tmp_path, capsys, monkeypatch)


def one_sentence(result: Result, code: int, *words: str) -> None:
    assert result[0] == code, result
    assert result[1] == ""
    assert result[2].count("\n") == 1
    assert result[2].startswith("covey-aggregator: ")
    for word in words:
        assert word in result[2], f"{word!r} is not in {result[2]!r}"


def test_init_register_status_export(operator: Operator) -> None:
    code, key, err = operator.run("init", "CONFIG")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"[0-9a-f]{64}\n", key)
    assert operator.run("init", "CONFIG")[1] == key
    assert (operator.folder / "keys" / "aggregator.key").stat().st_mode & 0o077 == 0
    code, out, _ = operator.run("device", "add", "CONFIG", "watch-7", "ab" * 31 + "aa")
    assert (code, out) == (0, "watch-7 may send updates\n")
    assert operator.run("device", "list", "CONFIG")[1] == f"watch-7  {'ab' * 31}aa\n"
    store = AggregatorFiles.load(operator.config).open_store()
    store.count_refusal(RefusalReason.NOT_FINITE)
    code, out, _ = operator.run("status", "CONFIG")
    assert code == 0
    for words in ("clinic/watch", "committed rounds", "0 of 3", "registered devices", "refused: not finite"):
        assert words in out
    params = load_bundle().params + 1
    with store.transaction() as connection:
        store.add_model(connection, 1, GlobalModel(params, params))
        store.save_state(connection, RoundState(Phase.IDLE, 1, 1))
    code, out, _ = operator.run("export", "CONFIG", "--out", str(operator.folder / "out"))
    assert code == 0
    bundle = open_bundle((operator.folder / "out" / "model.covey").read_bytes(), publisher=public_key_from_hex(key))
    np.testing.assert_array_equal(bundle.params, params)
    assert bundle.graph == load_bundle().graph
    assert bundle.manifest.version == load_bundle().manifest.version + 1
    assert (operator.folder / "out" / "model.tflite").read_bytes() == load_bundle().inference_model(params)
    assert params.tobytes() in (operator.folder / "out" / "model.tflite").read_bytes()


def test_help_shows_examples_and_exit_codes(operator: Operator) -> None:
    code, out, _ = operator.run("--help")
    assert code == 0
    assert "covey-aggregator init" in out
    assert "Exit codes: 0 done, 1 other error, 2 usage or configuration, 3 database, 4 model bundle." in " ".join(
        out.split()
    )
    for command in (["init"], ["run"], ["status"], ["export"], ["device"], ["device", "add"]):
        assert operator.run(*command, "--help")[0] == 0
    assert operator.run("--version")[1].startswith("covey-aggregator ")


@pytest.mark.parametrize("arguments", [["dance"], ["init"], ["export", "CONFIG"], ["device", "add", "CONFIG"]])
def test_wrong_usage_is_exit_code_2(operator: Operator, arguments: list[str]) -> None:
    code, _, err = operator.run(*arguments)
    assert code == 2
    assert "Usage" in err


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("rounds = 3", "rounds = 0", "task.rounds"),
        ("rounds = 3", "roundz = 3", "roundz"),
        ("goal = 3", "goal = 1", "minimum_cohort is above task.goal"),
        ("noise_multiplier = 8.0", "noise_multiplier = -1.0", "noise_multiplier"),
        ("noise_multiplier = 8.0", "", "noise_multiplier"),
        ("sampling_rate = 1.0", "sampling_rate = 1.5", "sampling_rate"),
        ("l2_norm_clip = 0.5", "l2_norm_clip = inf", "l2_norm_clip"),
        ("round_duration_s = 60.0", "round_duration_s = inf", "round_duration_s"),
        ('tenant = "clinic"', 'tenant = "Clinic/1"', "aggregator.tenant"),
        ("port = 1883", "port = 99999", "broker.port"),
        ("[task]", "[task", "aggregator.toml"),
    ],
)
def test_a_wrong_key_in_the_configuration_is_named(operator: Operator, old: str, new: str, word: str) -> None:
    operator.edit(old, new)
    one_sentence(operator.run("init", "CONFIG"), 2, word)


def test_a_missing_configuration_key_or_bundle_is_named(operator: Operator) -> None:
    one_sentence(operator.run("run", "CONFIG"), 2, "aggregator.signing_key")
    operator.run("init", "CONFIG")
    (operator.folder / "model.covey").unlink()
    one_sentence(operator.run("run", "CONFIG"), 2, "task.bundle", "model.covey")
    operator.config.unlink()
    one_sentence(operator.run("run", "CONFIG"), 2, "aggregator.toml")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.chmod(0o644),
        lambda path: path.write_bytes(b"short"),
    ],
)
def test_a_signing_key_that_cannot_be_trusted_is_refused(operator: Operator, spoil: Callable[[Path], object]) -> None:
    operator.run("init", "CONFIG")
    spoil(operator.folder / "keys" / "aggregator.key")
    one_sentence(operator.run("run", "CONFIG"), 2, "signing key")


def test_a_tampered_bundle_is_refused(operator: Operator) -> None:
    path = operator.folder / "model.covey"
    raw = bytearray(path.read_bytes())
    raw[3000] ^= 0xFF
    path.write_bytes(bytes(raw))
    one_sentence(operator.run("init", "CONFIG"), 4, "bundle")


def test_a_database_that_is_none_or_has_no_task_is_one_sentence(operator: Operator) -> None:
    one_sentence(operator.run("status", "CONFIG"), 3, "covey-aggregator init")
    (operator.folder / "aggregator.db").write_bytes(b"this is no database" * 100)
    one_sentence(operator.run("status", "CONFIG"), 3, "database")
    operator.edit('database = "aggregator.db"', 'database = "nowhere/aggregator.db"')
    one_sentence(operator.run("status", "CONFIG"), 3, "database")


@pytest.mark.parametrize(
    ("name", "key", "word"),
    [("Watch 7", "ab" * 32, "device"), ("watch-7", "xyz", "64 hex digits"), ("../x", "ab" * 32, "device")],
)
def test_a_device_that_cannot_be_registered_is_one_sentence(operator: Operator, name: str, key: str, word: str) -> None:
    operator.run("init", "CONFIG")
    one_sentence(operator.run("device", "add", "CONFIG", name, key), 1, word)
    assert operator.run("device", "list", "CONFIG")[1] == ""


def test_an_export_that_cannot_be_written_is_one_sentence(operator: Operator) -> None:
    operator.run("init", "CONFIG")
    (operator.folder / "file").write_text("")
    one_sentence(operator.run("export", "CONFIG", "--out", str(operator.folder / "file" / "x")), 2, "--out")


def test_a_configured_aggregator_assembles(operator: Operator) -> None:
    operator.run("init", "CONFIG")
    daemon = assemble(AggregatorFiles.load(operator.config), journal=MemoryJournal())
    assert daemon.store.round_state() == RoundState()
    assert daemon.store.model(0).digest == daemon.store.model(0).digest
    operator.edit('name = "watch"', 'name = "other"')
    assert operator.run("init", "CONFIG")[0] == 0
