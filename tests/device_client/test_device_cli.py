"""``covey-device``: what it prints, its exit codes, and errors a person can act on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_client.assembly import DeviceFiles, RealDevice
from device_client.cli import _EPILOG, _parser, main
from device_client.events import PendingUpdate
from device_client.recordings.frames import DamagedFramesError
from fl_protocol.errors import CoveyError
from fl_protocol.signing import public_key_hex
from tests.device_client.ports import make_plan
from tests.virtual_fleet import AGGREGATOR_KEY, bundle_folder, load_bundle, synthetic_records

Result = tuple[int, str, str]
ROOT = Path(__file__).resolve().parents[2]
STUDY = "clinic/watch"
WITHIN_S = 60.0


@dataclass
class Desk:
    """A configured device in a folder, and its command."""

    folder: Path
    capture: pytest.CaptureFixture[str]

    @property
    def config(self) -> Path:
        return self.folder / "device.toml"

    def run(self, command: str, *rest: str) -> Result:
        """Exit code, standard output, standard error."""
        try:
            code = main([command, "--config", str(self.config), *rest])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = self.capture.readouterr()
        return code, captured.out, captured.err

    def process(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """The command as a process of its own."""
        command, *rest = arguments
        words = [sys.executable, "-m", "device_client.cli", command, "--config", str(self.config), *rest]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        settings: dict[str, Any] = {"stdout": subprocess.PIPE, **options}
        return subprocess.run(
            words, env=environment, stderr=subprocess.PIPE, text=True, check=False, timeout=WITHIN_S, **settings
        )

    def edit(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new, 1))

    def import_windows(self, count: int = 12) -> Result:
        records = synthetic_records(load_bundle(), seed=1, count=count)
        np.savez(self.folder / "windows.npz", x=records.x, y=records.y)
        return self.run("import", str(self.folder / "windows.npz"))

    def prepare(self) -> None:
        assert self.run("init")[0] == 0
        assert self.import_windows()[0] == 0

    def charge_and_release(self, number: int = 9) -> None:
        """As if it had taken part in a round."""
        with RealDevice.open(self.config) as device:
            device.ledger.reserve(task=STUDY, round_number=number, plan=make_plan(), now_s=1_800_000_000.0)
            device.ledger.record_release(
                PendingUpdate(
                    update_id=bytes([number]) * 16,
                    study=STUDY,
                    device="watch-7",
                    round=number,
                    envelope=b"sealed",
                    sealed_digest=bytes(32),
                    deadline_s=0.0,
                    recipient_key="ab" * 16,
                ),
                now_s=1_800_000_000.0,
            )

    @contextmanager
    def daemon(self) -> Iterator[RealDevice]:
        """The daemon at work in this process, without a broker."""
        with RealDevice.open(self.config) as device:
            device.listen()
            thread = threading.Thread(target=device.run)
            thread.start()
            try:
                yield device
            finally:
                device.stop()
                thread.join(WITHIN_S)
                assert not thread.is_alive()


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    publisher = (bundle_folder() / "publisher.pub").read_text().strip()
    (tmp_path / "model.covey").write_bytes((bundle_folder() / "watch_features.covey").read_bytes())
    (tmp_path / "device.toml").write_text(
        f"""
[[study]]
tenant = "clinic"
task = "watch"
id = "watch-7"
bundle = "model.covey"
publisher_key = "{publisher}"
aggregator_key = "{public_key_hex(AGGREGATOR_KEY.public_key())}"

[study.broker]
host = "localhost"
port = 1

[device]
store = "store"
store_key = "keys/store.key"

[privacy]
epsilon = 3.0
delta = 1e-5

[eligibility]
require_idle = false

[board]
battery = "none"
thermal_zone = "none"
network = "unmetered"
"""
    )
    return Desk(tmp_path, capsys)


SECOND_STUDY = """
[[study]]
tenant = "clinic"
task = "steps"
id = "watch-8"
bundle = "model.covey"
publisher_key = "{publisher}"
aggregator_key = "{aggregator}"
broker = {{ host = "localhost", port = 1 }}

[device]
"""


def add_study(desk: Desk, **changes: str) -> None:
    text = desk.config.read_text()
    publisher, aggregator = re.findall(r'_key = "([0-9a-f]{64})"', text)
    second = SECOND_STUDY.format(publisher=publisher, aggregator=aggregator)
    for old, new in changes.items():
        second = re.sub(rf'^{old} = ".*"', f'{old} = "{new}"', second, flags=re.M)
    desk.edit("[device]\n", second)


def one_sentence(result: Result, code: int, *words: str) -> None:
    """Nothing on standard output, one line on standard error, no traceback, the exit code as documented."""
    assert result[0] == code, result
    assert result[1] == ""
    assert result[2].count("\n") == 1, result[2]
    assert result[2].startswith("covey-device: ")
    for word in words:
        assert word in result[2], f"{word!r} is not in {result[2]!r}"


# What works.


def test_init_import_and_ledger(desk: Desk) -> None:
    code, out, err = desk.run("init")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"[0-9a-f]{64}\n", out)
    assert desk.run("init")[1] == out  # keys are made once
    key_file = desk.folder / "keys" / "store.key"
    assert key_file.stat().st_mode & 0o077 == 0
    code, out, _ = desk.import_windows()
    assert (code, out.split()[0]) == (0, "12")
    code, out, _ = desk.run("ledger")
    assert code == 0
    assert out.splitlines()[:2] == ["spent: epsilon 0.0000 of 3 at delta 1e-05", "charges: 0"]
    desk.charge_and_release()
    code, out, _ = desk.run("ledger")
    assert "charges: 1\nenforced at Rényi order 7.5\n" in out
    assert "clinic/watch round 9: 1 step(s), sampling rate 1, noise multiplier 4" in out
    found = json.loads(desk.run("ledger", "--json")[1])
    assert [line["round"] for line in found["lines"]] == [9]
    assert found["studies"] == {STUDY: found["spent_epsilon"]}


def test_a_csv_file_is_imported_and_rows_that_were_left_out_are_told(desk: Desk) -> None:
    desk.run("init")
    schema = load_bundle().manifest.input
    rate, samples = schema.sampling_rate_hz, schema.shape[0]
    names = [f"{channel}[{unit}]" for channel, unit in zip(schema.channels, schema.units, strict=True)]
    rows = [f"{index / rate:.6f},{','.join(['0.5'] * len(names))},{0}" for index in range(samples + samples // 2)]
    path = desk.folder / "Walk.CSV"
    path.write_text("\n".join([",".join(["t_s", *names, "label"]), *rows]) + "\n")
    code, out, err = desk.run("import", str(path))
    assert code == 0, err
    assert out.startswith("1 windows stored, encrypted, in store\n")
    assert f"{samples // 2} rows were left out" in out


def test_sent_shows_every_update_that_left(desk: Desk) -> None:
    desk.prepare()
    assert desk.run("sent") == (0, "nothing was ever sent\n", "")
    assert json.loads(desk.run("sent", "--json")[1]) == []
    desk.charge_and_release()
    code, out, _ = desk.run("sent")
    assert code == 0
    line = (
        r"2027-01-15 08:00  clinic/watch round 9: 6 bytes as watch-7, sealed to key (ab){16}, epsilon by then \d\.\d{4}"
    )
    assert re.fullmatch(rf"{line}, dropped\n", out), out
    (one,) = json.loads(desk.run("sent", "--json")[1])
    assert (one["task"], one["round"], one["num_bytes"], one["outcome"]) == (STUDY, 9, 6, "dropped")


def test_consent_is_listed_granted_and_withdrawn(desk: Desk) -> None:
    desk.prepare()
    code, out, _ = desk.run("consent", "list")
    assert code == 0
    assert out.startswith(f"{STUDY}: does not run: not granted")
    assert "privacy: epsilon at most 3 in all, at delta 1e-05" in out
    code, out, _ = desk.run("consent", "grant", "watch")
    assert code == 0
    assert out.startswith(f"granted: {STUDY}\n  study: {STUDY}\n")
    (listed,) = json.loads(desk.run("consent", "list", "--json")[1])
    assert listed["problem"] == ""
    assert desk.run("consent", "list")[1].startswith(f"{STUDY}: granted 20")
    code, out, _ = desk.run("consent", "withdraw", STUDY)
    assert (code, out) == (0, f"withdrawn: {STUDY}; 0 update(s) that were not delivered are dropped\n")
    assert "consent was withdrawn" in desk.run("consent", "list")[1]
    found = json.loads(desk.run("consent", "grant", "watch", "--json")[1])
    assert (found["study"], found["terms"]["study"]) == (STUDY, STUDY)


def test_withdrawing_while_no_daemon_runs_drops_what_waits(desk: Desk) -> None:
    desk.run("init")
    desk.run("consent", "grant", "watch")
    fill_with_secrets(desk)
    assert json.loads(desk.run("status", "--json")[1])["studies"][0]["pending"] == 1
    out = desk.run("consent", "withdraw", "watch")[1]
    assert out == f"withdrawn: {STUDY}; 1 update(s) that were not delivered are dropped\n"
    assert not list((desk.folder / "store" / "outbox").iterdir())
    assert json.loads(desk.run("status", "--json")[1])["studies"][0]["pending"] == 0
    (sent,) = json.loads(desk.run("sent", "--json")[1])
    assert sent["outcome"] == "dropped"
    assert "charges: 1" in desk.run("ledger")[1]


def test_status_says_what_it_does_and_why_it_does_not_train(desk: Desk) -> None:
    desk.prepare()
    code, out, _ = desk.run("status")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "may train: yes"
    assert any(line.startswith(f"{STUDY}: not granted") for line in lines)
    assert "privacy: epsilon 0.0000 of 3 at delta 1e-05 in this period" in lines
    assert any(re.fullmatch(r"records default: 12, \d+ of them held out", line) for line in lines)
    desk.edit('network = "unmetered"', 'network = "metered"')
    found = json.loads(desk.run("status", "--json")[1])
    assert found["may_train"] is False
    assert "metered" in found["blocked"][0]
    assert desk.run("status")[1].splitlines()[0] == "may train: no"


def test_a_budget_without_limit_is_told_in_words(desk: Desk) -> None:
    desk.edit("epsilon = 3.0", "epsilon = inf")
    desk.prepare()
    with RealDevice.open(desk.config) as device:
        device.ledger.reserve(task=STUDY, round_number=1, plan=make_plan(noise_multiplier=0.0), now_s=1.0)
    assert "epsilon without bound of no limit" in desk.run("status")[1]
    assert desk.run("ledger")[1].startswith("spent: epsilon without bound of no limit at delta")
    for command in ("status", "ledger"):
        found = json.loads(desk.run(command, "--json")[1])
        assert found["spent_epsilon"] is None


def test_erasing_the_recordings_keeps_identity_consent_and_ledger(desk: Desk) -> None:
    desk.prepare()
    desk.run("consent", "grant", "watch")
    desk.charge_and_release()
    key = desk.run("init")[1]
    code, out, _ = desk.run("erase", "--data", "--yes")
    assert (code, out.split(":")[0]) == (0, "erased")
    found = json.loads(desk.run("status", "--json")[1])
    assert found["streams"] == [{"stream": "default", "records": 0, "held_out": 0}]
    assert desk.run("init")[1] == key
    assert json.loads(desk.run("consent", "list", "--json")[1])[0]["problem"] == ""
    assert "charges: 1" in desk.run("ledger")[1]
    assert desk.import_windows()[0] == 0


def test_erasing_everything_leaves_no_key_no_store_and_a_device_that_can_begin_anew(desk: Desk) -> None:
    desk.prepare()
    desk.charge_and_release()
    key = desk.run("init")[1]
    code, out, _ = desk.run("erase", "--all", "--yes")
    assert (code, out) == (0, "erased: the store, its key and the ledger\n")
    left = sorted(path.name for path in desk.folder.rglob("*") if path.is_file())
    assert left == ["device.toml", "model.covey", "windows.npz"]
    one_sentence(desk.run("status"), 3, "covey-device init")
    desk.prepare()
    assert desk.run("init")[1] != key
    assert "charges: 0" in desk.run("ledger")[1]


def test_erasing_everything_needs_no_key_and_may_be_repeated(desk: Desk) -> None:
    desk.prepare()
    (desk.folder / "keys" / "store.key").unlink()
    for _ in range(2):
        assert desk.run("erase", "--all", "--yes")[0] == 0
        assert not (desk.folder / "store").exists()


@pytest.mark.parametrize("answer", ["no\n", "", "y\n"])
def test_nothing_is_erased_without_a_yes(desk: Desk, answer: str) -> None:
    desk.prepare()
    for which in ("--data", "--all"):
        result = desk.process("erase", which, input=answer)
        assert result.returncode == 1, result
        assert result.stdout.endswith("nothing was erased\n")
        assert "There is no way back" in result.stdout
        assert result.stderr == ""
    assert json.loads(desk.run("status", "--json")[1])["streams"][0]["records"] == 12


def test_pseudonyms_are_asked_for_and_listed(desk: Desk) -> None:
    desk.edit('id = "watch-7"\n', "")
    assert desk.run("init")[1] == "the store is ready; next: covey-device enroll, or covey-device pseudonyms request\n"
    request = desk.folder / "request.json"
    code, out, _ = desk.run("pseudonyms", "request", "--out", str(request), "--count", "3")
    assert code == 0
    assert "3 pseudonyms in clinic/watch" in out
    assert request.stat().st_size > 0
    assert desk.run("pseudonyms", "list")[0] == 0
    assert json.loads(desk.run("pseudonyms", "list", "--json")[1]) == {
        "study": "clinic/watch", "waiting": 3, "pseudonyms": []
    }  # fmt: skip
    one_sentence(desk.run("pseudonyms", "request"), 2, "--out")
    one_sentence(desk.run("pseudonyms", "install"), 2, "answer")
    one_sentence(desk.run("pseudonyms", "install", "missing.json"), 2, "missing.json")
    desk.run("consent", "grant", "watch")
    with desk.daemon():
        (study,) = json.loads(desk.run("status", "--json")[1])["studies"]
    assert study["running"] is False
    assert "pseudonym" in study["doing"]


# Help.


def examples() -> list[list[str]]:
    found = re.findall(r"^  covey-device (\w+) +--config (\S+)((?: \S+)*)", _EPILOG, re.M)
    return [[command, "--config", path, *rest.split()] for command, path, rest in found]


def test_every_example_of_the_help_can_be_typed() -> None:
    assert len(examples()) == _EPILOG.count("\n  covey-device ")
    for words in examples():
        assert _parser().parse_args(words).config == Path("device.toml")
    assert {words[0] for words in examples()} >= {"init", "import", "consent", "run", "status", "ledger", "sent"}


def test_help_tells_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    whole = capsys.readouterr().out
    assert "exit codes: 0 done, 1 other error, 2 usage or configuration, 3 store or ledger, 4 model bundle" in whole
    commands = re.findall(r"^    (\w+)", whole, re.M)
    assert len(commands) == 11
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"usage: covey-device {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["init"],
        ["import", "--config", "x"],
        ["consent", "--config", "x"],
        ["consent", "--config", "x", "marry"],
        ["erase", "--config", "x"],
        ["erase", "--config", "x", "--data", "--all"],
        ["ledger", "--config", "x", "burn"],
        ["pseudonyms", "--config", "x", "request", "--count", "many"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: covey-device" in capsys.readouterr().err


# A running daemon.


def test_a_running_daemon_answers_instead_of_the_store(desk: Desk) -> None:
    desk.prepare()
    with desk.daemon() as device:
        assert json.loads(desk.run("status", "--json")[1])["streams"][0]["records"] == 12
        assert desk.run("consent", "grant", "watch")[0] == 0
        assert device.consents.problem(STUDY, terms="") != "not granted"
        (study,) = json.loads(desk.run("status", "--json")[1])["studies"]
        assert (study["running"], study["device"]) == (True, "watch-7")
        for command in ("ledger", "sent"):
            assert desk.run(command)[0] == 0
        assert desk.run("consent", "withdraw", "watch")[0] == 0
        assert "consent was withdrawn" in desk.run("status")[1]
        assert desk.run("erase", "--data", "--yes")[0] == 0
        assert json.loads(desk.run("status", "--json")[1])["streams"][0]["records"] == 0
        one_sentence(desk.run("consent", "grant", "waltz"), 2, "waltz", STUDY)
        one_sentence(desk.run("erase", "--all", "--yes"), 3, "in use by another process")
        one_sentence(desk.import_windows(), 3, "in use by another process")
        one_sentence(desk.run("run"), 3, "in use by another process")
    assert not (desk.folder / "store.sock").exists()
    assert desk.run("status")[0] == 0


def test_the_socket_of_a_daemon_that_was_killed_is_passed_over(desk: Desk) -> None:
    desk.prepare()
    with desk.daemon():
        shutil.copy2(desk.config, desk.folder / "kept.toml")
        (desk.folder / "store.sock").rename(desk.folder / "dead.sock")
    (desk.folder / "dead.sock").rename(desk.folder / "store.sock")
    for command in ("status", "ledger", "sent"):
        assert desk.run(command)[0] == 0, command
    with desk.daemon():
        assert desk.run("status")[0] == 0


def test_withdrawing_and_erasing_work_whatever_else_is_broken(desk: Desk) -> None:
    desk.prepare()
    desk.run("consent", "grant", "watch")
    (desk.folder / "model.covey").unlink()
    (desk.folder / "store" / "ledger.jsonl").write_text("{}\n")
    one_sentence(desk.run("consent", "withdraw", "waltz"), 2, "waltz", STUDY)
    assert desk.run("consent", "withdraw", "watch")[0] == 0
    assert desk.run("erase", "--data", "--yes")[0] == 0
    assert not list((desk.folder / "store").glob("recordings/*"))


# Configuration.


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epsilon = 3.0", "epsilon = 0.0", ["privacy.epsilon"]),
        ("epsilon = 3.0", "epsilon = nan", ["epsilon"]),
        ("epsilon = 3.0", "epsilonn = 3.0", ["epsilonn"]),
        ("epsilon = 3.0", 'epsilon = "much"', ["privacy.epsilon"]),
        ("epsilon = 3.0", "epsilon = 3.0\nperiod_days = 0.5", ["privacy.period_days"]),
        ("epsilon = 3.0", "epsilon = 3.0\nperiod_days = inf", ["period"]),
        ("delta = 1e-5\n", "", ["delta"]),
        ("delta = 1e-5", "delta = 1.0", ["privacy.delta"]),
        ("delta = 1e-5", "delta = 1e-5\nminimum_cohort = 0", ["privacy.minimum_cohort"]),
        ("delta = 1e-5", "delta = 1e-5\nminimum_cohort = 2.5", ["privacy.minimum_cohort"]),
        ("port = 1\n", 'port = "1883"\n', ["study[0].broker.port"]),
        ("port = 1\n", "", ["study[0].broker", "port"]),
        ('id = "watch-7"', 'id = "Watch 7"', ["study[0].id"]),
        ('task = "watch"', 'task = "a/b"', ["study[0].task"]),
        ('task = "watch"', 'task = "watch"\nrole = "dance"', ["study[0].role"]),
        ('task = "watch"', 'task = "watch"\nepsilon = -1', ["study[0].epsilon"]),
        ('task = "watch"', 'task = "watch"\nshare = 1', ["study[0]", "share"]),
        ("[privacy]", "[privacy", ["device.toml"]),
        ("[[study]]", "[study]", ["study"]),
        ('store = "store"\n', "", ["device", "store"]),
        ('store = "store"', 'store = "store"\nid = "watch-7"', ["device", "id"]),
        ('store = "store"', 'store = "store"\nmaximum_outbox_bytes = 1', ["device.maximum_outbox_bytes"]),
        ("require_idle = false", 'require_idle = "no"', ["eligibility.require_idle"]),
        ("require_idle = false", "minimum_battery_percent = 101", ["eligibility.minimum_battery_percent"]),
        ("require_idle = false", 'windows = ["25:00-26:00"]', ["eligibility", "windows", "25:00-26:00"]),
        ("require_idle = false", 'windows = ["22:00"]', ["eligibility", "windows", "22:00"]),
        ("require_idle = false", "new_records_noise = 0.5", ["eligibility.new_records_noise"]),
        ('battery = "none"', "battery = 3", ["board.battery"]),
        ('network = "unmetered"', 'network = "lan"', ["board.network"]),
        ("[board]", "[records]\nheld_out_fraction = 1.0\n[board]", ["records.held_out_fraction"]),
        ("[board]", "[records]\nmaximum_count = 0\n[board]", ["records.maximum_count"]),
        ("[board]", "[dance]\n[board]", ["dance"]),
    ],
)
def test_a_wrong_key_in_the_configuration_is_named(desk: Desk, old: str, new: str, words: list[str]) -> None:
    desk.edit(old, new)
    one_sentence(desk.run("ledger"), 2, "device.toml", *words)


def test_a_study_may_be_named_once_only(desk: Desk) -> None:
    add_study(desk, task="watch")
    one_sentence(desk.run("status"), 2, "study", "clinic/watch, clinic/watch")


def test_studies_that_want_different_recordings_need_streams_of_their_own(desk: Desk) -> None:
    (desk.folder / "other.covey").write_bytes((bundle_folder() / "ecg_beat.covey").read_bytes())
    add_study(desk, bundle="other.covey")
    desk.run("init")
    one_sentence(desk.run("status"), 2, "clinic/steps", "stream default", "a stream of its own")
    desk.edit('task = "steps"', 'task = "steps"\nstream = "steps"')
    assert {one["stream"] for one in json.loads(desk.run("status", "--json")[1])["streams"]} == {"default", "steps"}


def test_where_there_are_several_studies_one_has_to_be_named(desk: Desk) -> None:
    add_study(desk)
    assert desk.run("init")[1].count("\n") == 2
    for arguments in (["consent", "grant"], ["consent", "withdraw"], ["pseudonyms", "list"]):
        one_sentence(desk.run(*arguments), 2, "clinic/watch, clinic/steps")
    assert desk.run("consent", "grant", "steps")[0] == 0
    listed = json.loads(desk.run("consent", "list", "--json")[1])
    assert [(one["study"], one["problem"] == "") for one in listed] == [(STUDY, False), ("clinic/steps", True)]
    one_sentence(desk.run("import", "x.npz", "--stream", "naps"), 2, "--stream naps", "default")


def test_a_missing_configuration_is_named(desk: Desk) -> None:
    desk.config.unlink()
    one_sentence(desk.run("run"), 2, str(desk.config))
    desk.config.mkdir()
    one_sentence(desk.run("run"), 2, str(desk.config), "Is a directory")


@pytest.mark.parametrize("key", ["publisher_key", "aggregator_key"])
def test_a_key_that_is_none_is_refused(desk: Desk, key: str) -> None:
    desk.run("init")
    desk.config.write_text(re.sub(f'{key} = ".*"', f'{key} = "nonsense"', desk.config.read_text()))
    one_sentence(desk.run("run"), 2, f"study.{key}", "Ed25519 public key", "nonsense")


# Keys and stores.


@pytest.mark.parametrize("command", ["ledger", "run", "status", "sent"])
def test_without_init_the_store_says_what_to_do(desk: Desk, command: str) -> None:
    one_sentence(desk.run(command), 3, "covey-device init")


@pytest.mark.parametrize(
    ("mode", "content", "words"), [(0o644, None, "chmod 600"), (0o600, b"short", "32 bytes, got 5")]
)
def test_a_store_key_that_cannot_be_trusted_is_refused(
    desk: Desk, mode: int, content: bytes | None, words: str
) -> None:
    desk.run("init")
    key = desk.folder / "keys" / "store.key"
    if content is not None:
        key.write_bytes(content)
    key.chmod(mode)
    for command in ("ledger", "init", "run"):
        one_sentence(desk.run(command), 3, words)


def test_another_store_key_opens_nothing(desk: Desk) -> None:
    desk.prepare()
    (desk.folder / "keys" / "store.key").write_bytes(bytes(32))
    one_sentence(desk.run("status"), 3, "another")


def test_a_store_key_from_systemd_needs_its_folder(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.prepare()
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    desk.edit('store_key = "keys/store.key"', 'store_key = "credential:store.key"')
    one_sentence(desk.run("status"), 2, "device.store_key", "credential:store.key", "systemd")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(desk.folder / "keys"))
    assert desk.run("status")[0] == 0


def test_an_edited_ledger_stops_the_device(desk: Desk) -> None:
    desk.prepare()
    (desk.folder / "store" / "ledger.jsonl").write_text("{}\n")
    for command in ("ledger", "run"):
        one_sentence(desk.run(command), 3, "ledger", "nothing is trained")


def test_an_old_copy_of_the_store_is_noticed_and_a_person_may_accept_it(desk: Desk) -> None:
    desk.prepare()
    desk.charge_and_release(1)
    shutil.copytree(desk.folder / "store", desk.folder / "copy")
    desk.charge_and_release(2)
    shutil.rmtree(desk.folder / "store")
    (desk.folder / "copy").rename(desk.folder / "store")
    for command in ("ledger", "run", "status"):
        one_sentence(desk.run(command), 3, "ledger")
    code, out, _ = desk.run("ledger", "accept-counter")
    assert (code, out) == (0, "accepted; 1 charges are known, and the budget counts as spent for good\n")
    assert desk.run("ledger")[1].startswith("spent: epsilon at least 3.0000 of 3")
    one_sentence(desk.run("ledger", "accept-counter"), 3, "nothing to accept")


@pytest.mark.parametrize(
    ("old", "new"),
    [('store_key = "keys/store.key"', 'store_key = "device.toml/keys/key"'), ('"store"', '"device.toml/store"')],
)
def test_a_place_that_cannot_be_written_to_is_one_sentence(desk: Desk, old: str, new: str) -> None:
    desk.edit(old, new)
    one_sentence(desk.run("init"), 3, "Not a directory")


def no_room() -> None:
    """In the child: any file that grows meets its limit at once, much as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_a_disk_that_takes_nothing_is_one_sentence(desk: Desk) -> None:
    for command in ("init", "import"):
        arguments = [str(desk.folder / "windows.npz")] if command == "import" else []
        result = desk.process(command, *arguments, preexec_fn=no_room)
        one_sentence((result.returncode, result.stdout, result.stderr), 3, "File too large")
        desk.prepare()


def test_output_that_cannot_be_written_is_one_sentence(desk: Desk) -> None:
    desk.prepare()
    with Path("/dev/full").open("w") as full:
        result = desk.process("ledger", stdout=full)
    assert (result.returncode, result.stderr) == (1, "covey-device: output: No space left on device\n")


def test_a_reader_that_went_away_ends_it_quietly(desk: Desk) -> None:
    desk.prepare()
    read, write = os.pipe()
    os.close(read)
    try:
        result = desk.process("consent", "list", stdout=write)
    finally:
        os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


# Bundles and brokers.


def test_nothing_that_a_file_says_speaks_to_the_terminal(desk: Desk) -> None:
    desk.prepare()
    desk.config.write_text(desk.config.read_text().replace("[privacy]", '["\\u001b[2Jprivacy"]', 1))
    result = desk.run("status")
    one_sentence(result, 2, r"\x1b[2J")
    assert "\x1b" not in result[2]


def test_a_missing_bundle_is_named(desk: Desk) -> None:
    desk.prepare()
    (desk.folder / "model.covey").unlink()
    one_sentence(desk.run("run"), 2, "bundle", "model.covey")


@pytest.mark.parametrize("position", [200, 5000, 10_000])
def test_a_tampered_bundle_is_refused(desk: Desk, position: int) -> None:
    desk.prepare()
    bundle = desk.folder / "model.covey"
    raw = bytearray(bundle.read_bytes())
    raw[position] ^= 0xFF
    bundle.write_bytes(bytes(raw))
    one_sentence(desk.run("run"), 4, "bundle")


def test_a_bundle_of_another_publisher_or_an_older_one_is_refused(desk: Desk) -> None:
    desk.prepare()
    desk.edit('task = "watch"', 'task = "watch"\nminimum_bundle_version = 1000')
    one_sentence(desk.run("run"), 4, "version 1000")
    stranger = public_key_hex(Ed25519PrivateKey.from_private_bytes(b"\x09" * 32).public_key())
    desk.config.write_text(re.sub('publisher_key = ".*"', f'publisher_key = "{stranger}"', desk.config.read_text()))
    one_sentence(desk.run("run"), 4, "not signed by the pinned publisher")


def stands_still(desk: Desk) -> str:
    """Why the one study does not run although it was granted, as status tells it."""
    desk.run("consent", "grant", "watch")
    with desk.daemon():
        (study,) = json.loads(desk.run("status", "--json")[1])["studies"]
    assert study["running"] is False
    return str(study["doing"])


def test_a_broker_elsewhere_needs_tls(desk: Desk) -> None:
    desk.prepare()
    desk.edit('host = "localhost"', 'host = "broker.example"')
    assert "broker.example is not on this machine, so it needs ca, certificate and key" in stands_still(desk)
    desk.edit("port = 1\n", 'port = 8883\nca = "ca.pem"\n')
    assert "together" in stands_still(desk)


def test_without_a_runtime_status_says_what_to_install(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.prepare()
    for module in ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"):
        monkeypatch.setitem(sys.modules, module, None)  # what importing a missing module sees
    assert "no TFLite runtime" in stands_still(desk)
    assert "pip install 'covey[device]'" in stands_still(desk)


# Recordings.


def damaged_npz(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(100))


def missing_labels(path: Path) -> None:
    np.savez(path, x=np.zeros((2, 3, 2)))


def single_array(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))


def pickled(path: Path) -> None:
    np.savez(path, x=np.array([{}], dtype=object), y=np.zeros(1))


@pytest.mark.parametrize(
    "make",
    [
        damaged_npz,
        missing_labels,
        single_array,
        pickled,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("x,y\n1,2\n"),
        lambda path: None,
    ],
)
def test_windows_that_cannot_be_read_are_refused(desk: Desk, make: Callable[[Path], object]) -> None:
    desk.run("init")
    path = desk.folder / "windows.npz"
    make(path)
    one_sentence(desk.run("import", str(path)), 2, "windows.npz")


def test_windows_of_another_shape_or_number_are_refused(desk: Desk) -> None:
    desk.prepare()
    path = desk.folder / "others.npz"
    np.savez(path, x=np.zeros((2, 3, 2)), y=np.zeros(2))
    one_sentence(desk.run("import", str(path)), 1, "import others")
    np.savez(path, x=np.zeros((2, 128, 6)), y=np.zeros(3))
    one_sentence(desk.run("import", str(path)), 2, "as many labels")
    assert json.loads(desk.run("status", "--json")[1])["streams"][0]["records"] == 12  # what was there is still there


@pytest.mark.parametrize("arguments", [["--unit", "ax"], ["--rate", "0"]])
def test_a_csv_option_that_makes_no_sense_is_named(desk: Desk, arguments: list[str]) -> None:
    desk.run("init")
    (desk.folder / "walk.csv").write_text("t_s,label\n0,0\n")
    code, _, err = desk.run("import", str(desk.folder / "walk.csv"), *arguments)
    assert code == 2, err
    assert err.count("\n") == 1


def test_the_configuration_names_every_file_relative_to_itself(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    desk.prepare()
    files = DeviceFiles.load(desk.config)
    assert files.store_folder == desk.folder / "store"
    assert files.counter_file == desk.folder / "store.counter"
    assert files.control_socket == desk.folder / "store.sock"


# Nothing of the wearer's is left on the disk.


def fill_with_secrets(desk: Desk) -> list[bytes]:
    """Recordings, personal layers, work and a pending update; what of them may not be found afterwards."""
    desk.prepare()
    windows = synthetic_records(load_bundle(), seed=1, count=12).x
    layers = np.linspace(1, 2, 64, dtype="<f4")
    pending = PendingUpdate(
        update_id=b"\x0b" * 16,
        study=STUDY,
        device="watch-7",
        round=3,
        envelope=b"an update that was sealed and waits" * 20,
        sealed_digest=bytes(32),
        deadline_s=0.0,
        recipient_key="ab" * 16,
    )
    with RealDevice.open(desk.config) as device:
        device.ledger.reserve(task=STUDY, round_number=3, plan=make_plan(), now_s=1_800_000_000.0)
        device.outbox.put(pending)
        device.store.write("personal/0123", layers.tobytes())
        device.store.write("control/0123", layers.tobytes()[::-1])
    fragments = [window[row : row + 4].astype("<f4").tobytes() for window in windows for row in (0, 64, 100)]
    return [*fragments, layers.tobytes()[:64], layers.tobytes()[::-1][:64], pending.envelope[:64]]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_erasing_leaves_nothing(desk: Desk, erase: Callable[[], object]) -> None:
    secrets = fill_with_secrets(desk)
    place = desk.folder / "store"
    scopes = ("recordings/", "personal/", "control/", "outbox/")
    before = {name: data for name, data in bytes_of(place).items() if name.startswith(scopes)}
    assert {name.split("/")[0] for name in before} == {scope[:-1] for scope in scopes}
    erase()
    (desk.folder / "windows.npz").unlink()  # the sender's own copy
    for name, data in bytes_of(desk.folder).items():
        assert not any(secret in data for secret in secrets), name
        assert not any(old[:32] in data or old[-32:] in data for old in before.values()), name
    # Somebody kept the ciphertext: what keys are left open none of it.
    store = DeviceFiles.load(desk.config).open_store()
    for name, data in before.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(data)
        opened = None
        with contextlib.suppress(CoveyError, DamagedFramesError):
            opened = store.frames(name) if name.startswith("recordings") else store.read(name)
        assert not opened, f"{name} can still be read"
        (place / name).unlink()
    store.close()
    assert desk.import_windows()[0] == 0
    assert json.loads(desk.run("status", "--json")[1])["streams"][0]["records"] == 12


def test_after_erasing_nothing_of_the_wearers_can_be_found_or_opened(desk: Desk) -> None:
    check_erasing_leaves_nothing(desk, lambda: desk.run("erase", "--data", "--yes"))


def test_after_erasing_through_the_daemon_nothing_can_be_found_or_opened(desk: Desk) -> None:
    def erase() -> None:
        with desk.daemon():
            assert desk.run("erase", "--data", "--yes")[0] == 0

    check_erasing_leaves_nothing(desk, erase)


def test_an_erasure_that_only_removes_files_is_noticed(desk: Desk) -> None:
    def erase() -> None:
        for folder in ("recordings", "personal", "control", "outbox"):
            shutil.rmtree(desk.folder / "store" / folder)

    with pytest.raises(AssertionError, match="can still be read"):
        check_erasing_leaves_nothing(desk, erase)
