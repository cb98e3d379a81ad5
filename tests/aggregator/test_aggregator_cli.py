"""``covey-aggregator``: what it prints, its exit codes, and errors a person can act on."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import OperationalError

from aggregator.assembly import AggregatorFiles, assemble
from aggregator.cli import main
from aggregator.combine import GlobalModel
from aggregator.rounds import Phase, RoundState
from device_client.pseudonyms import Pseudonyms
from fl_protocol.bundle import open_bundle
from fl_protocol.enrolment import PseudonymAnswer, decode_file
from fl_protocol.errors import RefusalReason
from fl_protocol.signing import public_key_from_hex
from tests.device_client.ports import MemoryStore
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
    for words in ("clinic/watch", "committed rounds", "0 of 3", "registered ids", "refused: not finite"):
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
    for command in ("init", "run", "status", "export", "device", "device add", "device admit", "device list"):
        assert operator.run(*command.split(), "--help")[0] == 0
    for command in ("ca", "ca init", "ca server", "ca client"):
        assert operator.run(*command.split(), "--help")[0] == 0
    assert operator.run("--version")[1].startswith("covey-aggregator ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        ["init"],
        ["export", "CONFIG"],
        ["device", "add", "CONFIG"],
        ["device", "admit", "request.json", "CONFIG"],
        ["device", "admit", "r", "CONFIG", "--ca", "c", "--out", "o", "--period-days", "1"],
        ["ca", "init"],
        ["ca", "server", "--ca", "ca", "--out", "mosquitto"],
    ],
)
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


def make_request(count: int = 3) -> bytes:
    return Pseudonyms(MemoryStore(), tenant="clinic", task="watch").prepare(count=count, entropy=os.urandom)


def admit(operator: Operator, request: str = "request.json", *options: str, out: str = "answer.json") -> Result:
    folder = operator.folder
    places = ["--ca", str(folder / "ca"), "--out", str(folder / out)]
    return operator.run("device", "admit", str(folder / request), "CONFIG", *places, *options)


def test_a_ca_admits_devices_and_certifies_broker_and_aggregator(operator: Operator) -> None:
    folder = operator.folder
    _, key, _ = operator.run("init", "CONFIG")
    code, out, err = operator.run("ca", "init", "--ca", str(folder / "ca"))
    assert (code, err) == (0, "")
    assert "ca.key for nobody else" in out
    assert {path.name: path.stat().st_mode & 0o777 for path in (folder / "ca").iterdir()} == {
        "ca.pem": 0o644,
        "ca.key": 0o600,
    }
    (folder / "request.json").write_bytes(make_request())
    code, out, err = admit(operator)
    assert (code, err) == (0, "")
    assert out.startswith("3 pseudonyms may send updates, one after the other, ")
    assert "then delete it" in out
    answer = decode_file((folder / "answer.json").read_bytes(), PseudonymAnswer)
    assert answer.aggregator_key == key.strip()
    assert (folder / "answer.json").stat().st_mode & 0o077 == 0
    listed = operator.run("device", "list", "CONFIG")[1]
    assert sorted(line.split()[0] for line in listed.splitlines()) == sorted(one.id for one in answer.certificates)
    for command, names in (
        (["server", "--host", "127.0.0.1", "--host", "localhost"], {"broker.pem", "broker.key", "ca.pem"}),
        (["client", "--name", "aggregator"], {"aggregator.pem", "aggregator.key", "ca.pem"}),
    ):
        place = folder / command[0]
        code, out, err = operator.run("ca", *command, "--ca", str(folder / "ca"), "--out", str(place))
        assert (code, err) == (0, "")
        assert {path.name for path in place.iterdir()} == names
        assert all(path.stat().st_mode & 0o077 == 0 for path in place.glob("*.key"))


def test_nothing_is_overwritten(operator: Operator) -> None:
    operator.run("init", "CONFIG")
    ca, server = str(operator.folder / "ca"), str(operator.folder / "mosquitto")
    operator.run("ca", "init", "--ca", ca)
    operator.run("ca", "server", "--ca", ca, "--host", "localhost", "--out", server)
    (operator.folder / "request.json").write_bytes(make_request())
    before = {path: path.read_bytes() for path in operator.folder.rglob("*") if path.is_file()}
    one_sentence(operator.run("ca", "init", "--ca", ca), 2, "--ca", "exists and is not replaced")
    again = operator.run("ca", "server", "--ca", ca, "--host", "localhost", "--out", server)
    one_sentence(again, 2, "--out", "exists and is not replaced")
    one_sentence(admit(operator, out="request.json"), 2, "--out", "exists and is not replaced")
    assert {path: path.read_bytes() for path in operator.folder.rglob("*") if path.is_file()} == before


def test_names_for_the_time_after_a_row_follow_it_without_a_gap(operator: Operator) -> None:
    operator.run("init", "CONFIG")
    operator.run("ca", "init", "--ca", str(operator.folder / "ca"))
    device = Pseudonyms(MemoryStore(), tenant="clinic", task="watch")
    for name, options in (("this", ()), ("next", ("--next-period",))):
        (operator.folder / name).write_bytes(device.prepare(count=1, entropy=os.urandom))
        assert admit(operator, name, "--period-days", "366", *options, out=f"{name}.json")[0] == 0
        answer = (operator.folder / f"{name}.json").read_bytes()
        device.install(answer, aggregator_key=AggregatorFiles.load(operator.config).signing_key().public_key())
    first, second = device.installed()
    assert first.period.begins_s <= time.time() < first.period.ends_s == second.period.begins_s


def test_a_request_admitted_twice_is_one_sentence_and_no_file(operator: Operator) -> None:
    operator.run("init", "CONFIG")
    operator.run("ca", "init", "--ca", str(operator.folder / "ca"))
    (operator.folder / "request.json").write_bytes(make_request())
    assert admit(operator)[0] == 0
    one_sentence(admit(operator, out="second.json"), 1, "was admitted before", "--anew")
    assert not (operator.folder / "second.json").exists()


def test_an_admission_that_cannot_be_is_one_sentence(operator: Operator) -> None:
    folder = operator.folder
    (folder / "request.json").write_bytes(make_request())
    one_sentence(admit(operator), 2, "aggregator.signing_key")
    operator.run("init", "CONFIG")
    one_sentence(admit(operator), 2, "--ca")
    operator.run("ca", "init", "--ca", str(folder / "ca"))
    one_sentence(admit(operator, "nothing.json"), 2, "REQUEST")
    one_sentence(admit(operator, "aggregator.toml"), 1, "not a pseudonym request")
    one_sentence(admit(operator, out="request.json/answer.json"), 2, "--out")
    (folder / "ca" / "ca.key").chmod(0o644)
    one_sentence(admit(operator), 2, "chmod 600")
    (folder / "ca" / "ca.key").chmod(0o600)
    (folder / "ca" / "ca.pem").write_bytes((folder / "ca" / "ca.key").read_bytes())
    one_sentence(admit(operator), 1, "the CA")
    assert operator.run("device", "list", "CONFIG")[1] == ""
    one_sentence(operator.run("ca", "init", "--ca", str(folder / "b"), "--name", ""), 2, "--name")


def test_an_answer_whose_pseudonyms_the_database_refused_is_not_left_behind(operator: Operator) -> None:
    operator.run("init", "CONFIG")
    operator.run("ca", "init", "--ca", str(operator.folder / "ca"))
    (operator.folder / "request.json").write_bytes(make_request())
    seen = []

    def full(connection: Connection) -> None:
        del connection
        if (operator.folder / "answer.json").exists():
            seen.append("the answer is written before the commit")
            raise OperationalError("COMMIT", {}, Exception("database or disk is full"))

    event.listen(Engine, "commit", full)
    try:
        one_sentence(admit(operator), 3, "database", "disk is full")
    finally:
        event.remove(Engine, "commit", full)
    assert seen
    assert not (operator.folder / "answer.json").exists()
    assert operator.run("device", "list", "CONFIG")[1] == ""
    assert admit(operator)[0] == 0
