"""The store on disk: encrypted, bound to names, locked, durable, whole after every failure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_client.adapters import encrypted_files
from device_client.adapters.encrypted_files import EncryptedFiles
from device_client.errors import StoreError
from device_client.recordings.frames import DamagedFramesError
from firmware_sim.virtual_flash import PowerCut, PowerCutError, VirtualFlash
from fl_protocol.durable import Disk, append_durably
from fl_protocol.errors import LocalMisuseError

KEY = b"\x11" * 32
LOG_NAME = "ledger.jsonl"


def seeded(seed: int) -> Random:
    return Random(seed)  # noqa: S311 - chance, not secrecy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_what_is_written_is_read_back_by_the_next_process(folder: Path) -> None:
    store = EncryptedFiles.in_folder(folder, KEY)
    store.write("outbox/0a", b"one")
    store.write("outbox/0b", b"two")
    store.write("session", b"three")
    store.write("session", b"four")
    store.append_log(LOG_NAME, b"line")
    store.delete("outbox/0a")
    store.delete("outbox/0a")
    store.close()
    again = EncryptedFiles.in_folder(folder, KEY)
    assert again.read("session") == b"four"
    assert again.read("outbox/0a") is None
    assert list(again.names("outbox/")) == ["outbox/0b"]
    assert again.read_log(LOG_NAME) == b"line\n"
    assert again.read_log("never.jsonl") == b""


def test_nothing_but_logs_is_readable_on_disk_and_only_by_the_owner(folder: Path) -> None:
    store = EncryptedFiles.in_folder(folder, KEY)
    store.write("records", b"the wearer's heart rate" * 10)
    raw = (folder / "records").read_bytes()
    assert b"heart" not in raw
    store.write("records", b"the wearer's heart rate" * 10)
    assert (folder / "records").read_bytes() != raw  # a nonce is never used twice
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / "records").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("position", [0, 5, 12, 20, -1])
def test_a_changed_byte_is_noticed(folder: Path, position: int) -> None:
    store = EncryptedFiles.in_folder(folder, KEY)
    store.write("records", b"data of some length")
    raw = bytearray((folder / "records").read_bytes())
    raw[position] ^= 1
    (folder / "records").write_bytes(bytes(raw))
    with pytest.raises(StoreError, match="was changed"):
        store.read("records")


@pytest.mark.parametrize("length", [0, 5, 12, 27])
def test_a_cut_file_is_noticed(folder: Path, length: int) -> None:
    store = EncryptedFiles.in_folder(folder, KEY)
    store.write("records", b"data")
    (folder / "records").write_bytes((folder / "records").read_bytes()[:length])
    with pytest.raises(StoreError, match="was changed"):
        store.read("records")


def test_swapped_files_are_noticed(folder: Path) -> None:
    store = EncryptedFiles.in_folder(folder, KEY)
    store.write("identity", b"a" * 32)
    store.write("records", b"b" * 32)
    (folder / "records").rename(folder / "identity")
    with pytest.raises(StoreError, match="was changed"):
        store.read("identity")


def test_another_key_opens_nothing(folder: Path) -> None:
    store = EncryptedFiles.in_folder(folder, KEY)
    store.write("records", b"data")
    store.close()
    with pytest.raises(StoreError, match="another one"):
        EncryptedFiles.in_folder(folder, b"\x12" * 32).read("records")


def test_one_process_at_a_time(folder: Path) -> None:
    store = EncryptedFiles.in_folder(folder, KEY)
    code = (
        "import sys; from pathlib import Path; from device_client.adapters.encrypted_files import EncryptedFiles\n"
        "EncryptedFiles.in_folder(Path(sys.argv[1]), bytes(32))"
    )
    other = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert "in use by another process" in other.stderr
    store.close()
    other = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert other.returncode == 0


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(folder: Path, mode: int) -> None:
    EncryptedFiles.in_folder(folder, KEY).close()
    folder.chmod(mode)
    with pytest.raises(StoreError, match="can be changed by others; run chmod 700"):
        EncryptedFiles.in_folder(folder, KEY)
    folder.chmod(0o755)  # as systemd's StateDirectory is made
    EncryptedFiles.in_folder(folder, KEY).close()


def test_the_store_of_another_user_is_refused_and_left_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EncryptedFiles.in_folder(folder, KEY).close()
    (folder / ".lock").unlink()
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 70_000)
    with pytest.raises(StoreError, match=r"belongs to .+ runs as '#\d+': run it as that user \(sudo -u"):
        EncryptedFiles.in_folder(folder, KEY)
    assert list(folder.iterdir()) == []


def test_a_refused_opening_leaves_no_descriptor_behind(folder: Path) -> None:
    store = EncryptedFiles.in_folder(folder, KEY)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(StoreError, match="in use"):
            EncryptedFiles.in_folder(folder, KEY)
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
    store = EncryptedFiles.in_folder(folder, KEY)
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
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    flash = VirtualFlash()
    try:
        EncryptedFiles(flash, KEY).write(name, b"x")
    except StoreError:
        assert not flash.names()
        return
    assert flash.names() == [name]
    assert os.path.normpath(name) == name
    assert not os.path.isabs(name)


def test_what_a_power_cut_left_half_written_is_removed(folder: Path) -> None:
    store = EncryptedFiles.in_folder(folder, KEY)
    store.write("outbox/0a", b"old")
    store.close()
    leftover = folder / "outbox" / ".0a.tmp"
    leftover.write_bytes(b"half of the new on")
    again = EncryptedFiles.in_folder(folder, KEY)
    assert again.read("outbox/0a") == b"old"
    assert not leftover.exists()
    assert list(again.names("")) == ["outbox/0a"]


def test_a_store_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be opened"):
        EncryptedFiles.in_folder(tmp_path / "file", KEY)
    with pytest.raises(StoreError, match="cannot be opened"):
        EncryptedFiles.in_folder(tmp_path / "file" / "store", KEY)


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
    store = EncryptedFiles.in_folder(folder, KEY)
    store.append_log(LOG_NAME, b"a first line")
    with monkeypatch.context() as patch:
        FullDisk(patch, room)
        with pytest.raises(StoreError, match="No space left"):
            store.append_log(LOG_NAME, b"x" * 100)
    assert store.read_log(LOG_NAME) == b"a first line\n"
    store.append_log(LOG_NAME, b"a second")
    store.close()
    assert EncryptedFiles.in_folder(folder, KEY).read_log(LOG_NAME) == b"a first line\na second\n"


def test_a_write_that_fails_keeps_the_old_blob(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EncryptedFiles.in_folder(folder, KEY)
    store.write("session", b"old")

    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(StoreError, match="Input/output error"):
            store.write("session", b"new")
    assert store.read("session") == b"old"
    assert not list(folder.rglob("*.tmp"))


def careless_append(disk: Disk, name: str, data: bytes) -> None:
    """Broken: the line may still be in memory when this returns."""
    disk.append(name, data)


def check_a_line_is_durable_when_append_returns(
    append: Callable[[Disk, str, bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = VirtualFlash()
    store = EncryptedFiles(flash, KEY)
    with monkeypatch.context() as patch:
        patch.setattr(encrypted_files, "append_durably", append)
        store.append_log(LOG_NAME, b"one")
        store.append_log(LOG_NAME, b"two")
    for seed in range(20):
        found = EncryptedFiles(flash.after_power_cut(seeded(seed)), KEY).read_log(LOG_NAME)
        assert found == b"one\ntwo\n", "a line is gone"


def test_a_line_is_durable_when_append_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    check_a_line_is_durable_when_append_returns(append_durably, monkeypatch)


def test_an_append_without_sync_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="a line is gone"):
        check_a_line_is_durable_when_append_returns(careless_append, monkeypatch)


def fill(store: EncryptedFiles) -> None:
    """One change of each kind."""
    store.write("session", b"state")
    store.append_log(LOG_NAME, b"line")
    store.append_frame("recordings/default.00000001", 0, b"window")


def contents(store: EncryptedFiles) -> tuple[object, ...]:
    return store.read("session"), store.read_log(LOG_NAME), store.frames("recordings/default.00000001")


def check_what_a_killed_process_left_stays(kind: type[EncryptedFiles]) -> None:
    """The next process acts on what it reads, so a power cut must not take it back."""
    flash = VirtualFlash()
    fill(EncryptedFiles(flash, KEY))
    for at in range(flash.operations):
        flash = VirtualFlash(power_cut=PowerCut(at, "after"))
        with pytest.raises(PowerCutError):
            fill(EncryptedFiles(flash, KEY))
        seen = contents(kind(flash.after_kill(), KEY))
        for seed in range(10):
            found = contents(EncryptedFiles(flash.after_power_cut(seeded(seed)), KEY))
            assert found == seen, "what was seen after a kill is gone after a power cut"


def test_what_a_killed_process_left_is_durable_before_it_is_read() -> None:
    check_what_a_killed_process_left_stays(EncryptedFiles)


def check_what_a_killed_process_removed_stays_away(kind: type[EncryptedFiles]) -> None:
    """The last file of a folder: nothing that is left would have the folder synced."""
    for removed in ("outbox/0a", "pseudonyms/0a"):
        flash = VirtualFlash()
        EncryptedFiles(flash, KEY).write(removed, b"one")
        store = EncryptedFiles(flash, KEY)
        flash.power_cut = PowerCut(flash.operations + 1)
        with pytest.raises(PowerCutError):
            store.delete(removed)
        flash = flash.after_kill()
        assert kind(flash, KEY).read(removed) is None
        for seed in range(10):
            assert EncryptedFiles(flash.after_power_cut(seeded(seed)), KEY).read(removed) is None, "it is back"


class TrustingFiles(EncryptedFiles):
    """Broken: it believes what is only in the system's memory."""

    def _settle(self) -> None:
        pass


class TidyFiles(EncryptedFiles):
    """Broken: it makes durable only what it can see."""

    def _sync_folders(self, folders: Iterable[str]) -> None:
        for folder in folders:
            self._disk.sync_folder(folder)


def test_what_a_killed_process_removed_does_not_come_back_after_a_power_cut() -> None:
    check_what_a_killed_process_removed_stays_away(EncryptedFiles)


def test_a_store_that_makes_durable_only_what_it_sees_is_caught() -> None:
    with pytest.raises(AssertionError, match="it is back"):
        check_what_a_killed_process_removed_stays_away(TidyFiles)


def test_a_store_that_trusts_the_systems_memory_is_caught() -> None:
    with pytest.raises(AssertionError, match="gone after a power cut"):
        check_what_a_killed_process_left_stays(TrustingFiles)


NAME = "recordings/default.00000001"


def with_frames(*frames: bytes) -> tuple[VirtualFlash, EncryptedFiles]:
    flash = VirtualFlash()
    store = EncryptedFiles(flash, KEY)
    for number, frame in enumerate(frames):
        store.append_frame(NAME, number, frame)
    return flash, store


def test_frames_are_read_back_in_order_by_the_next_process() -> None:
    flash, store = with_frames(b"one", b"", b"three")
    assert store.frames(NAME) == [b"one", b"", b"three"]
    again = EncryptedFiles(flash, KEY)
    again.append_frame(NAME, 3, b"four")
    assert again.frames(NAME) == [b"one", b"", b"three", b"four"]
    assert again.frames("recordings/no.00000001") == []
    with pytest.raises(LocalMisuseError, match="expected frame 4 next, got 7"):
        again.append_frame(NAME, 7, b"")


@pytest.mark.parametrize("kept", [0, 1, 15, 16, 30, 43, 46])
def test_a_torn_last_frame_is_cut_off_and_written_over(kept: int) -> None:
    flash, store = with_frames(b"one")
    end = flash.size(NAME) or 0
    store.append_frame(NAME, 1, b"two")
    flash.truncate(NAME, end + kept)
    again = EncryptedFiles(flash, KEY)
    assert again.frames(NAME) == [b"one"]
    again.append_frame(NAME, 1, b"2")
    assert EncryptedFiles(flash, KEY).frames(NAME) == [b"one", b"2"]


@pytest.mark.parametrize("position", range(0, 2 * 47, 5))
def test_a_damaged_frame_before_the_last_is_noticed(position: int) -> None:
    flash, _ = with_frames(b"one", b"two", b"six")
    byte = flash.read_at(NAME, position, 1)[0]
    flash.write_at(NAME, position, bytes([byte ^ 4]))
    with pytest.raises(DamagedFramesError, match="changed or damaged"):
        EncryptedFiles(flash, KEY).frames(NAME)


def test_frames_cannot_be_exchanged_repeated_moved_or_taken_out() -> None:
    flash, store = with_frames(b"one", b"two", b"six")
    raw = flash.read(NAME) or b""
    one, two, six = raw[:47], raw[47:94], raw[94:]
    for forged in (two + one + six, one + one + six, one + six, two + six, one + one + two + six):
        flash.write(NAME, forged)
        with pytest.raises(DamagedFramesError):
            EncryptedFiles(flash, KEY).frames(NAME)
    flash.write("recordings/default.00000002", raw)
    with pytest.raises(DamagedFramesError):
        store.frames("recordings/default.00000002")


def test_a_file_cut_short_under_a_running_store_is_noticed() -> None:
    flash, store = with_frames(b"one", b"two")
    flash.truncate(NAME, 47)
    with pytest.raises(DamagedFramesError):
        store.frames(NAME)
    with pytest.raises(DamagedFramesError, match="shorter"):
        store.append_frame(NAME, 2, b"six")


def test_a_full_disk_leaves_the_frames_as_they_were() -> None:
    flash, store = with_frames(b"one")
    flash.capacity_bytes = sum(flash.size(name) or 0 for name in flash.names()) + 20
    with pytest.raises(StoreError, match="No space left"):
        store.append_frame(NAME, 1, b"two")
    assert store.frames(NAME) == [b"one"]
    flash.capacity_bytes = None
    store.append_frame(NAME, 1, b"2")
    assert EncryptedFiles(flash, KEY).frames(NAME) == [b"one", b"2"]


class FailingFlash(VirtualFlash):
    """A medium that takes the bytes, reports an error and takes nothing back, while `failing`."""

    failing = False

    def sync(self, name: str) -> None:
        super().sync(name)
        if self.failing:
            raise OSError(5, "Input/output error")

    def truncate(self, name: str, length: int) -> None:
        if self.failing:
            raise OSError(5, "Input/output error")
        super().truncate(name, length)


def test_a_frame_that_was_refused_but_cannot_be_taken_back_is_not_read_and_is_written_over() -> None:
    flash = FailingFlash()
    store = EncryptedFiles(flash, KEY)
    store.append_frame(NAME, 0, b"one")
    flash.failing = True
    with pytest.raises(StoreError, match="Input/output error"):
        store.append_frame(NAME, 1, b"refused")
    flash.failing = False
    assert store.frames(NAME) == [b"one"]
    store.append_frame(NAME, 1, b"two")
    assert EncryptedFiles(flash, KEY).frames(NAME) == [b"one", b"two"]


def test_what_is_set_aside_stays_so() -> None:
    flash, store = with_frames(b"one")
    store.set_aside(NAME, "damaged/default.00000001")
    for seed in range(20):
        after = EncryptedFiles(flash.after_power_cut(seeded(seed)), KEY)
        assert list(after.names("")) == ["damaged/default.00000001"]


def test_a_read_only_disk_can_be_read_and_says_what_it_is() -> None:
    flash, _ = with_frames(b"one")
    flash.read_only = True
    store = EncryptedFiles(flash, KEY)
    assert store.frames(NAME) == [b"one"]
    changes: tuple[Callable[[], object], ...] = (
        lambda: store.append_frame(NAME, 1, b"two"),
        lambda: store.write("session", b""),
        lambda: store.append_log(LOG_NAME, b""),
        lambda: store.delete(NAME),
        lambda: store.shred("data"),
        lambda: store.set_aside(NAME, "damaged/default.00000001"),
    )
    for act in changes:
        with pytest.raises(StoreError, match="Read-only file system"):
            act()


def test_the_same_entropy_writes_the_same_bytes() -> None:
    stores = []
    for _ in range(2):
        flash = VirtualFlash()
        fill(EncryptedFiles(flash, KEY, entropy=seeded(3).randbytes))
        stores.append(flash.durable())
    assert stores[0] == stores[1]
