"""The store on disk: encrypted, bound to names, locked, durable, whole after every failure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_client.adapters import encrypted_files
from device_client.adapters.encrypted_files import EncryptedFiles
from device_client.device_store import (
    create_identity,
    load_identity,
    load_records,
    load_session,
    save_records,
    save_session,
)
from device_client.errors import LedgerError, StoreError
from device_client.events import SessionState
from device_client.ledger import LOG_NAME, Budget, PrivacyLedger
from device_client.training import Records
from fl_protocol.adapters.files import append_durably
from fl_protocol.model_manifest import LabelSchema
from tests.device_client.ports import make_plan, make_records
from tests.virtual_fleet import SeededEntropy

KEY = b"\x11" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_what_is_written_is_read_back_by_the_next_process(folder: Path) -> None:
    store = EncryptedFiles(folder, KEY)
    store.write("outbox/0a", b"one")
    store.write("outbox/0b", b"two")
    store.write("session", b"three")
    store.write("session", b"four")
    store.append_log(LOG_NAME, b"line")
    store.delete("outbox/0a")
    store.delete("outbox/0a")
    store.close()
    again = EncryptedFiles(folder, KEY)
    assert again.read("session") == b"four"
    assert again.read("outbox/0a") is None
    assert list(again.names("outbox/")) == ["outbox/0b"]
    assert again.read_log(LOG_NAME) == b"line\n"
    assert again.read_log("never.jsonl") == b""


def test_nothing_but_logs_is_readable_on_disk_and_only_by_the_owner(folder: Path) -> None:
    store = EncryptedFiles(folder, KEY)
    store.write("records", b"the wearer's heart rate" * 10)
    raw = (folder / "records").read_bytes()
    assert b"heart" not in raw
    store.write("records", b"the wearer's heart rate" * 10)
    assert (folder / "records").read_bytes() != raw  # a nonce is never used twice
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / "records").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("position", [0, 5, 12, 20, -1])
def test_a_changed_byte_is_noticed(folder: Path, position: int) -> None:
    store = EncryptedFiles(folder, KEY)
    store.write("records", b"data of some length")
    raw = bytearray((folder / "records").read_bytes())
    raw[position] ^= 1
    (folder / "records").write_bytes(bytes(raw))
    with pytest.raises(StoreError, match="was changed"):
        store.read("records")


@pytest.mark.parametrize("length", [0, 5, 12, 27])
def test_a_cut_file_is_noticed(folder: Path, length: int) -> None:
    store = EncryptedFiles(folder, KEY)
    store.write("records", b"data")
    (folder / "records").write_bytes((folder / "records").read_bytes()[:length])
    with pytest.raises(StoreError, match="was changed"):
        store.read("records")


def test_swapped_files_are_noticed(folder: Path) -> None:
    store = EncryptedFiles(folder, KEY)
    store.write("identity", b"a" * 32)
    store.write("records", b"b" * 32)
    (folder / "records").rename(folder / "identity")
    with pytest.raises(StoreError, match="was changed"):
        store.read("identity")


def test_another_key_opens_nothing(folder: Path) -> None:
    store = EncryptedFiles(folder, KEY)
    store.write("records", b"data")
    store.close()
    with pytest.raises(StoreError, match="another one"):
        EncryptedFiles(folder, b"\x12" * 32).read("records")


def test_one_process_at_a_time(folder: Path) -> None:
    store = EncryptedFiles(folder, KEY)
    code = (
        "import sys; from pathlib import Path; from device_client.adapters.encrypted_files import EncryptedFiles\n"
        "EncryptedFiles(Path(sys.argv[1]), bytes(32))"
    )
    other = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert "in use by another process" in other.stderr
    store.close()
    other = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert other.returncode == 0


def test_a_refused_opening_leaves_no_descriptor_behind(folder: Path) -> None:
    store = EncryptedFiles(folder, KEY)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(StoreError, match="in use"):
            EncryptedFiles(folder, KEY)
    assert len(os.listdir("/proc/self/fd")) == before
    store.close()


BAD_NAMES = [
    "",
    "..",
    "../x",
    "a/../b",
    "/etc/passwd",
    "a/b/c",
    ".hidden",
    "a/.b",
    "A",
    "a b",
    "a\n",
    "a/",
    "ä",
    "a..b",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_could_leave_the_folder_are_refused(folder: Path, name: str) -> None:
    store = EncryptedFiles(folder, KEY)
    actions: list[Callable[[], object]] = [
        lambda: store.read(name),
        lambda: store.write(name, b""),
        lambda: store.delete(name),
        lambda: store.append_log(name, b""),
        lambda: store.read_log(name),
        lambda: store.truncate_log(name, 0),
    ]
    for action in actions:
        with pytest.raises(StoreError, match="store name"):
            action()


@given(name=st.text(alphabet="ab./\\-_\x00", max_size=12))
def test_no_name_leads_out_of_the_folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = EncryptedFiles.__new__(EncryptedFiles)
    store._folder = Path("/store")
    try:
        path = store._path(name)
    except StoreError:
        return
    assert os.path.normpath(path) == str(path)
    assert path.is_relative_to("/store")
    assert path != Path("/store")


def test_what_a_power_cut_left_half_written_is_removed(folder: Path) -> None:
    store = EncryptedFiles(folder, KEY)
    store.write("outbox/0a", b"old")
    store.close()
    leftover = folder / "outbox" / ".0a.tmp"
    leftover.write_bytes(b"half of the new on")
    again = EncryptedFiles(folder, KEY)
    assert again.read("outbox/0a") == b"old"
    assert not leftover.exists()
    assert list(again.names("")) == ["outbox/0a"]


def test_a_store_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be opened"):
        EncryptedFiles(tmp_path / "file", KEY)
    with pytest.raises(StoreError, match="cannot be opened"):
        EncryptedFiles(tmp_path / "file" / "store", KEY)


class FullDisk:
    """`os.write`, and every stream's, on a disk that takes `room` more bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self._room, self._write = room, os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, descriptor: int, data: bytes) -> int:
        taken = self._write(descriptor, data[: self._room]) if self._room else 0
        self._room -= taken
        if not taken:
            raise OSError(28, "No space left on device")
        return taken


@pytest.mark.parametrize("room", [0, 1, 17, 60])
def test_a_disk_that_fills_up_in_the_middle_of_a_line_leaves_the_log_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    store = EncryptedFiles(folder, KEY)
    ledger = PrivacyLedger(store, Budget(3.0, 1e-5))
    ledger.reserve(task="watch", round_number=1, plan=make_plan(), now_s=1.0)
    before, spent = store.read_log(LOG_NAME), ledger.spent_epsilon
    with monkeypatch.context() as patch:
        FullDisk(patch, room)
        with pytest.raises(StoreError, match="No space left"):
            ledger.reserve(task="watch", round_number=2, plan=make_plan(), now_s=2.0)
    assert store.read_log(LOG_NAME) == before
    assert ledger.spent_epsilon == spent
    ledger.reserve(task="watch", round_number=2, plan=make_plan(), now_s=3.0)
    store.close()
    assert PrivacyLedger(EncryptedFiles(folder, KEY), Budget(3.0, 1e-5)).last_round("watch") == 2


def test_a_write_that_fails_keeps_the_old_blob(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EncryptedFiles(folder, KEY)
    store.write("session", b"old")

    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(StoreError, match="Input/output error"):
            store.write("session", b"new")
    assert store.read("session") == b"old"
    assert not list(folder.rglob("*.tmp"))


def careless_append(path: Path, data: bytes) -> None:
    """Broken: the line may still be in the page cache when this returns."""
    with path.open("ab") as stream:
        stream.write(data)


def check_a_line_is_synced_before_append_returns(
    append: Callable[[Path, bytes], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    true_fsync = os.fsync
    store = EncryptedFiles(folder, KEY)
    with monkeypatch.context() as patch:
        patch.setattr(encrypted_files, "append_durably", append)
        patch.setattr(os, "fsync", lambda fd: (true_fsync(fd), synced.append(os.fstat(fd).st_size))[0])
        store.append_log(LOG_NAME, b"x" * 99)
    store.close()
    assert 100 in synced, "the line was not synced"


def test_a_line_is_synced_before_append_returns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_a_line_is_synced_before_append_returns(append_durably, folder, monkeypatch)


def test_an_append_without_sync_is_caught(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="not synced"):
        check_a_line_is_synced_before_append_returns(careless_append, folder, monkeypatch)


def test_a_truncated_ledger_on_disk_stops_the_device(folder: Path) -> None:
    store = EncryptedFiles(folder, KEY)
    ledger = PrivacyLedger(store, Budget(3.0, 1e-5))
    for number in (1, 2):
        ledger.reserve(task="watch", round_number=number, plan=make_plan(), now_s=1.0)
    first = store.read_log(LOG_NAME).splitlines(keepends=True)[0]
    (folder / LOG_NAME).write_bytes(first)
    with pytest.raises(LedgerError, match="cut or exchanged"):
        PrivacyLedger(store, Budget(3.0, 1e-5))


def test_identity_session_and_records_survive(folder: Path) -> None:
    store = EncryptedFiles(folder, KEY)
    with pytest.raises(StoreError, match="covey-device init"):
        load_identity(store)
    key = create_identity(store, SeededEntropy("identity"))
    assert create_identity(store, SeededEntropy("another")).private_bytes_raw() == key.private_bytes_raw()
    assert load_session(store) == SessionState()
    save_session(store, SessionState("clinic/watch", highest_round=3, decided_round=2, participated_s=1.5))
    assert load_session(store).highest_round == 3
    records = make_records(count=5)
    save_records(store, records)
    loaded = load_records(store, window_shape=(3, 2), label=LabelSchema("class", ("a", "b")))
    np.testing.assert_array_equal(loaded.x, records.x)
    np.testing.assert_array_equal(loaded.y, records.y)


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (np.zeros((2, 4, 2)), [0, 1], "import others"),
        (np.zeros((2, 3, 2)), [0, 2], "labels"),
        (np.zeros((2, 3, 2)), [-1, 0], "labels"),
        (np.full((2, 3, 2), np.nan), [0, 1], "not finite"),
    ],
)
def test_records_that_do_not_fit_the_model_are_refused(folder: Path, x: np.ndarray, y: list[int], reason: str) -> None:
    store = EncryptedFiles(folder, KEY)
    with pytest.raises(StoreError, match="covey-device import"):
        load_records(store, window_shape=(3, 2), label=LabelSchema("class", ("a", "b")))
    save_records(store, Records(x.astype(np.float32), np.array(y, np.int32)))
    with pytest.raises(StoreError, match=reason):
        load_records(store, window_shape=(3, 2), label=LabelSchema("class", ("a", "b")))


def test_labels_that_are_numbers_survive(folder: Path) -> None:
    store, label = EncryptedFiles(folder, KEY), LabelSchema("value", ("rate", "trend"), ("1/min", "1"))
    records = Records(np.zeros((4, 3, 2), np.float32), np.arange(8, dtype=np.float32).reshape(4, 2))
    save_records(store, records)
    np.testing.assert_array_equal(load_records(store, window_shape=(3, 2), label=label).y, records.y)
    with pytest.raises(StoreError, match="takes 1 numbers an example"):
        load_records(store, window_shape=(3, 2), label=LabelSchema("value", ("rate",)))
