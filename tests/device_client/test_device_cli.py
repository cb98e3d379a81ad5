"""``covey-device``: what it prints, its exit codes, and errors a person can act on."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_client.assembly import DeviceFiles, assemble
from device_client.cli import main
from device_client.daemon import DeviceDaemon
from fl_protocol.signing import public_key_hex
from tests.device_client.ports import make_plan
from tests.virtual_fleet import AGGREGATOR_KEY, MemoryJournal, bundle_folder, load_bundle, synthetic_records

Result = tuple[int, str, str]


@dataclass
class Device:
    """A configured device in a folder, and its command."""

    folder: Path
    capture: pytest.CaptureFixture[str]

    @property
    def config(self) -> Path:
        return self.folder / "device.toml"

    def run(self, *arguments: str) -> Result:
        """Exit code, standard output, standard error."""
        command, *rest = arguments
        try:
            code = main([command, "--config", str(self.config), *rest])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = self.capture.readouterr()
        return code, captured.out, captured.err

    def edit(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))

    def import_windows(self) -> Result:
        records = synthetic_records(load_bundle(), seed=1, count=12)
        np.savez(self.folder / "windows.npz", x=records.x, y=records.y)
        return self.run("import", str(self.folder / "windows.npz"))


@pytest.fixture
def device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Device:
    publisher = (bundle_folder() / "publisher.pub").read_text().strip()
    (tmp_path / "model.covey").write_bytes((bundle_folder() / "watch_features.covey").read_bytes())
    (tmp_path / "device.toml").write_text(
        f"""
[study]
tenant = "clinic"
task = "watch"
bundle = "model.covey"
publisher_key = "{publisher}"
aggregator_key = "{public_key_hex(AGGREGATOR_KEY.public_key())}"

[device]
id = "watch-7"
store = "store"
store_key = "keys/store.key"

[broker]
host = "localhost"
port = 1883

[privacy]
epsilon = 3.0
delta = 1e-5
"""
    )
    return Device(tmp_path, capsys)


def one_sentence(result: Result, code: int, *words: str) -> None:
    """Nothing on standard output, one line on standard error, no traceback, the exit code as documented."""
    assert result[0] == code, result
    assert result[1] == ""
    assert result[2].count("\n") == 1
    assert result[2].startswith("covey-device: ")
    for word in words:
        assert word in result[2], f"{word!r} is not in {result[2]!r}"


def test_init_import_and_ledger(device: Device) -> None:
    code, out, err = device.run("init")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"[0-9a-f]{64}\n", out)
    assert device.run("init")[1] == out  # keys are made once
    key_file = device.folder / "keys" / "store.key"
    assert key_file.stat().st_mode & 0o077 == 0
    code, out, _ = device.import_windows()
    assert (code, out.split()[0]) == (0, "12")
    code, out, _ = device.run("ledger")
    assert code == 0
    assert out.splitlines() == ["spent: epsilon 0.0000 of 3 at delta 1e-05", "participations: 0"]
    files = DeviceFiles.load(device.config)
    store = files.open_store()
    files.open_ledger(store).reserve(task="watch", round_number=9, plan=make_plan(), now_s=1.0)
    store.close()
    code, out, _ = device.run("ledger")
    assert "participations: 1\nenforced at Rényi order 7.5\n" in out
    assert "watch round 9: 1 step(s), sampling rate 1, noise multiplier 4" in out


def test_help_shows_examples_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["init", "--help"], ["import", "--help"], ["run", "--help"], ["ledger", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "exit codes: 0 done, 1 other error, 2 usage or configuration, 3 store or ledger, 4 model bundle" in out
    assert "covey-device init" in out


@pytest.mark.parametrize("arguments", [[], ["dance"], ["init"], ["import", "--config", "x"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: covey-device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epsilon = 3.0", "epsilon = 0.0", ["epsilon"]),
        ("epsilon = 3.0", "epsilonn = 3.0", ["epsilonn"]),
        ("delta = 1e-5\n", "", ["delta"]),
        ("delta = 1e-5", "delta = 1.0", ["delta"]),
        ("port = 1883", 'port = "1883"', ["broker.port"]),
        ('id = "watch-7"', 'id = "Watch 7"', ["device.id"]),
        ('task = "watch"', 'task = "a/b"', ["study.task"]),
        ("[privacy]", "[privacy", ["device.toml"]),
        ('store = "store"', 'store = "store"\nrole = "dance"', ["device.role"]),
    ],
)
def test_a_wrong_key_in_the_configuration_is_named(device: Device, old: str, new: str, words: list[str]) -> None:
    device.edit(old, new)
    one_sentence(device.run("ledger"), 2, *words)


def test_a_missing_configuration_is_named(device: Device) -> None:
    device.config.unlink()
    one_sentence(device.run("run"), 2, str(device.config))


@pytest.mark.parametrize("key", ["publisher_key", "aggregator_key"])
def test_a_key_that_is_none_is_refused(device: Device, key: str) -> None:
    device.run("init")
    device.import_windows()
    device.config.write_text(re.sub(f'{key} = ".*"', f'{key} = "nonsense"', device.config.read_text()))
    one_sentence(device.run("run"), 2, f"study.{key}", "Ed25519 public key", "nonsense")


def test_without_init_the_store_says_what_to_do(device: Device) -> None:
    for command in ("ledger", "run"):
        one_sentence(device.run(command), 3, "covey-device init")


def test_without_records_run_says_what_to_do(device: Device) -> None:
    device.run("init")
    one_sentence(device.run("run"), 3, "covey-device import")


def test_import_without_init_still_leaves_run_asking_for_it(device: Device) -> None:
    device.import_windows()
    one_sentence(device.run("run"), 3, "covey-device init")


@pytest.mark.parametrize(
    ("mode", "content", "words"), [(0o644, None, "chmod 600"), (0o600, b"short", "32 bytes, got 5")]
)
def test_a_store_key_that_cannot_be_trusted_is_refused(
    device: Device, mode: int, content: bytes | None, words: str
) -> None:
    device.run("init")
    key = device.folder / "keys" / "store.key"
    if content is not None:
        key.write_bytes(content)
    key.chmod(mode)
    one_sentence(device.run("ledger"), 3, words)


def test_another_store_key_opens_nothing(device: Device) -> None:
    device.run("init")
    device.import_windows()
    (device.folder / "keys" / "store.key").write_bytes(bytes(32))
    one_sentence(device.run("run"), 3, "another one")


def prepared(device: Device) -> Path:
    device.run("init")
    device.import_windows()
    return device.folder / "model.covey"


def test_a_missing_bundle_is_named(device: Device) -> None:
    prepared(device).unlink()
    one_sentence(device.run("run"), 2, "study.bundle", "model.covey")


@pytest.mark.parametrize("position", [200, 5000, 10_000])
def test_a_tampered_bundle_is_refused(device: Device, position: int) -> None:
    bundle = prepared(device)
    raw = bytearray(bundle.read_bytes())
    raw[position] ^= 0xFF
    bundle.write_bytes(bytes(raw))
    one_sentence(device.run("run"), 4, "bundle")


def test_a_bundle_of_another_publisher_or_an_older_one_is_refused(device: Device) -> None:
    prepared(device)
    device.edit('task = "watch"', 'task = "watch"\nminimum_bundle_version = 1000')
    one_sentence(device.run("run"), 4, "version 1000")
    stranger = public_key_hex(Ed25519PrivateKey.from_private_bytes(b"\x09" * 32).public_key())
    device.config.write_text(re.sub('publisher_key = ".*"', f'publisher_key = "{stranger}"', device.config.read_text()))
    one_sentence(device.run("run"), 4, "not signed by the pinned publisher")


def assembled(device: Device) -> DeviceDaemon:
    return assemble(DeviceFiles.load(device.config), software="covey test", journal=MemoryJournal())


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
def test_windows_that_cannot_be_read_are_refused(device: Device, make: Callable[[Path], object]) -> None:
    device.run("init")
    path = device.folder / "windows.npz"
    make(path)
    one_sentence(device.run("import", str(path)), 2, "windows.npz", "arrays x and y")


def test_windows_of_another_shape_or_number_are_refused(device: Device) -> None:
    device.run("init")
    path = device.folder / "others.npz"
    np.savez(path, x=np.zeros((2, 3, 2)), y=np.zeros(2))
    one_sentence(device.run("import", str(path)), 3, "import others")
    assert device.import_windows()[0] == 0
    one_sentence(device.run("import", str(path)), 3, "import others")
    assert len(assembled(device).participant.records) == 12  # what was there is still there
    np.savez(path, x=np.zeros((2, 3, 2)), y=np.zeros(3))
    one_sentence(device.run("import", str(path)), 2, "as many labels")


def test_an_edited_ledger_stops_the_device(device: Device) -> None:
    prepared(device)
    (device.folder / "store" / "ledger.jsonl").write_text("{}\n")
    for command in ("ledger", "run"):
        one_sentence(device.run(command), 3, "ledger", "nothing is trained")


def test_a_broker_elsewhere_needs_tls(device: Device) -> None:
    prepared(device)
    device.edit('host = "localhost"', 'host = "broker.example"')
    one_sentence(device.run("run"), 2, "broker.example", "certificate")
    device.edit("port = 1883", 'port = 8883\nca = "ca.pem"')
    one_sentence(device.run("run"), 2, "together")


def test_without_a_runtime_it_says_what_to_install(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(device)
    for module in ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"):
        monkeypatch.setitem(sys.modules, module, None)  # what importing a missing module sees
    one_sentence(device.run("run"), 1, "no TFLite runtime", "pip install 'covey[device]'")


def test_a_prepared_device_assembles(device: Device) -> None:
    prepared(device)
    assert len(assembled(device).participant.records) == 12
    one_sentence(device.run("ledger"), 3, "in use by another process")
