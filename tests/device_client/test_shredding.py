"""Erasure destroys keys: whoever holds the store's key and every byte of the disk finds nothing, whenever the power
goes.

The searcher here has the store's key, the disk as it is, and copies of every data file from before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Literal, get_args

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from device_client.adapters.encrypted_files import DATA_FOLDERS, DATA_SCOPE, EncryptedFiles
from device_client.errors import StoreError
from device_client.recordings.frames import DamagedFramesError, open_frames
from firmware_sim.virtual_flash import PowerCut, PowerCutError, VirtualFlash
from fl_protocol.adapters.files import SystemDisk
from fl_protocol.durable import Disk
from fl_protocol.errors import LocalMisuseError

KEY = b"\x11" * 32
SECRET = b"heart rate 71 of this wearer"
SEGMENT = "recordings/default.00000001"
Moment = Literal["before", "during", "after"]


def fill(store: EncryptedFiles) -> None:
    store.write("identity/clinic", b"identity")
    store.append_log("ledger.jsonl", b"spent 1")
    for number in range(3):
        store.append_frame(SEGMENT, number, SECRET * 10)
    for folder in ("outbox", "personal"):
        store.write(f"{folder}/0a", SECRET)


def data_of(store: EncryptedFiles) -> tuple[object, ...]:
    return store.frames(SEGMENT), store.read("outbox/0a"), store.read("personal/0a")


EVERYTHING: tuple[object, ...] = ([SECRET * 10] * 3, SECRET, SECRET)
NOTHING: tuple[object, ...] = ([], None, None)


def files_of(disk: Disk) -> dict[str, bytes]:
    return {name: disk.read(name) or b"" for name in disk.names()}


def blob(key: AESGCM, raw: bytes, bound: bytes) -> bytes | None:
    try:
        return key.decrypt(raw[:12], raw[12:], bound)
    except (InvalidTag, ValueError):
        return None


def found(files: Mapping[str, bytes], copies: Mapping[str, bytes], *, store_key: bytes = KEY) -> Iterator[bytes]:
    """Everything that can be read from `files`, and with the keys in them from `copies`."""
    keys = [AESGCM(store_key)]
    for raw in files.values():
        unwrapped = blob(keys[0], raw, b"data key")
        keys += [AESGCM(unwrapped)] if unwrapped is not None else []
    for name, raw in [*files.items(), *copies.items()]:
        yield raw
        for key in keys:
            yield blob(key, raw, name.encode()) or b""
            try:
                yield from open_frames(key, name, raw)[0]
            except DamagedFramesError:
                continue


def is_found(files: Mapping[str, bytes], copies: Mapping[str, bytes]) -> bool:
    return any(SECRET in readable for readable in found(files, copies))


def copies_of(disk: Disk) -> dict[str, bytes]:
    return {name: raw for name, raw in files_of(disk).items() if name.split("/")[0] in DATA_FOLDERS}


def check_nothing_is_found_after_shredding(kind: type[EncryptedFiles], disk: Disk) -> None:
    store = kind(disk, KEY)
    fill(store)
    copies = copies_of(disk)
    assert is_found(files_of(disk), {})
    assert is_found(files_of(disk), copies)
    store.shred(DATA_SCOPE)
    assert not is_found(files_of(disk), copies), "the wearer's data can still be read"
    assert data_of(store) == NOTHING
    fill(store)
    assert data_of(kind(disk, KEY)) == EVERYTHING


@pytest.mark.parametrize("kind", ["system", "virtual"])
def test_nothing_is_found_after_shredding(kind: str, tmp_path: Path) -> None:
    disk = SystemDisk(tmp_path) if kind == "system" else VirtualFlash()
    check_nothing_is_found_after_shredding(EncryptedFiles, disk)


class RemovingFiles(EncryptedFiles):
    """Broken: it removes the files and keeps their key."""

    def shred(self, scope: str) -> None:
        for name in self._disk.names():
            if name.split("/")[0] in DATA_FOLDERS:
                self.delete(name)


def test_a_shredding_that_keeps_the_key_is_caught() -> None:
    with pytest.raises(AssertionError, match="can still be read"):
        check_nothing_is_found_after_shredding(RemovingFiles, VirtualFlash())


def filled(kind: type[EncryptedFiles]) -> tuple[VirtualFlash, EncryptedFiles]:
    flash = VirtualFlash()
    store = kind(flash, KEY)
    fill(store)
    return flash, store


def every_cut(kind: type[EncryptedFiles], act: Callable[[EncryptedFiles], None]) -> Iterator[VirtualFlash]:
    """What may be found after the power went at each boundary of `act` on a filled store."""
    flash, store = filled(kind)
    start = flash.operations
    act(store)
    for at in range(start, flash.operations):
        for moment in get_args(Moment):
            cut, store = filled(kind)
            cut.power_cut = PowerCut(at, moment)
            with pytest.raises(PowerCutError):
                act(store)
            for seed in range(6):
                yield cut.after_power_cut(Random(seed))  # noqa: S311 - chance, not secrecy


def check_a_power_cut_while_shredding_leaves_all_or_nothing(kind: type[EncryptedFiles]) -> None:
    outcomes = set()
    for flash in every_cut(kind, lambda store: store.shred(DATA_SCOPE)):
        copies = copies_of(flash)
        try:
            store = kind(flash, KEY)
            data = data_of(store)
            if data == NOTHING:
                fill(store)
                assert data_of(store) == EVERYTHING
                store.shred(DATA_SCOPE)
        except StoreError as error:
            raise AssertionError(f"the store cannot be used after a cut: {error}") from error
        assert data in (EVERYTHING, NOTHING), "half of the data is left"
        if data == NOTHING:
            assert not is_found(files_of(flash), copies), "erased data can still be read"
        assert store.read("identity/clinic") == b"identity"
        assert store.read_log("ledger.jsonl").startswith(b"spent 1\n")
        outcomes.add(data == NOTHING)
    assert outcomes == {True, False}


def test_a_power_cut_while_shredding_leaves_all_or_nothing() -> None:
    check_a_power_cut_while_shredding_leaves_all_or_nothing(EncryptedFiles)


class TombstonelessFiles(EncryptedFiles):
    """Broken: nothing says that a shredding has begun."""

    def shred(self, scope: str) -> None:
        self._data_aead = None
        self._ends.clear()
        if self._disk.size(".data-key") is not None:
            self._overwrite(".data-key")
            self._remove([".data-key"])
        self._remove(name for name in self._disk.names() if name.split("/")[0] in DATA_FOLDERS)


def test_a_shredding_without_a_tombstone_is_caught() -> None:
    with pytest.raises(AssertionError, match="cannot be used after a cut"):
        check_a_power_cut_while_shredding_leaves_all_or_nothing(TombstonelessFiles)


def test_a_shredding_that_the_disk_interrupts_is_finished_before_new_data_is_written() -> None:
    flash, store = filled(EncryptedFiles)
    remove, flash.remove = flash.remove, _broken  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="Input/output error"):
        store.shred(DATA_SCOPE)
    with pytest.raises(StoreError, match="Input/output error"):
        store.write("personal/0b", b"new")
    flash.remove = remove  # type: ignore[method-assign]
    store.write("personal/0b", b"new")
    again = EncryptedFiles(flash, KEY)
    assert again.read("personal/0b") == b"new"
    assert again.read("personal/0a") is None


def _broken(name: str) -> None:
    raise OSError(5, "Input/output error")


def test_the_key_is_overwritten_in_place_before_it_is_removed(tmp_path: Path) -> None:
    """Seen through a second name of the same file."""
    folder = tmp_path / "store"
    store = EncryptedFiles.in_folder(folder, KEY)
    fill(store)
    (tmp_path / "other").hardlink_to(folder / ".data-key")
    store.shred(DATA_SCOPE)
    assert not (folder / ".data-key").exists()
    assert (tmp_path / "other").read_bytes() == bytes(60)


class ListingFlash(VirtualFlash):
    """Notes what is done to the key's file."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, str]] = []

    def write_at(self, name: str, offset: int, data: bytes) -> None:
        self.done.append(("write_at", name))
        super().write_at(name, offset, data)

    def sync(self, name: str) -> None:
        self.done.append(("sync", name))
        super().sync(name)

    def remove(self, name: str) -> None:
        self.done.append(("remove", name))
        super().remove(name)


def test_the_key_is_gone_from_the_medium_before_the_first_file_is_removed() -> None:
    flash = ListingFlash()
    store = EncryptedFiles(flash, KEY)
    fill(store)
    flash.done.clear()
    store.shred(DATA_SCOPE)
    key = ".data-key-shredded"
    assert flash.done[:2] == [("write_at", key), ("sync", key)]
    assert [name for kind, name in flash.done if kind == "remove"] == ["outbox/0a", "personal/0a", SEGMENT, key]


def test_shredding_needs_no_room() -> None:
    flash, store = filled(EncryptedFiles)
    flash.capacity_bytes = sum(len(raw) for raw in files_of(flash).values())
    store.shred(DATA_SCOPE)
    assert data_of(store) == NOTHING


def test_shredding_an_empty_store_twice_is_fine_and_another_scope_is_refused() -> None:
    flash = VirtualFlash()
    store = EncryptedFiles(flash, KEY)
    store.shred(DATA_SCOPE)
    store.shred(DATA_SCOPE)
    assert not flash.names()
    with pytest.raises(LocalMisuseError, match="scope"):
        store.shred("everything")


def test_erasing_everything_leaves_no_file_but_the_lock(tmp_path: Path) -> None:
    store = EncryptedFiles.in_folder(tmp_path / "store", KEY)
    fill(store)
    store.shred_all()
    store.close()
    assert [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()] == [".lock"]


def test_a_power_cut_while_erasing_everything_never_leaves_a_part_that_counts() -> None:
    """An identity without its ledger would start with a fresh budget."""
    outcomes = set()
    for flash in every_cut(EncryptedFiles, lambda store: store.shred_all()):
        store = EncryptedFiles(flash, KEY)
        logs, names = store.read_log("ledger.jsonl"), list(store.names(""))
        assert logs == (b"spent 1\n" if names else b"")
        assert ("identity/clinic" in names) == bool(names)
        outcomes.add(bool(names))
    assert outcomes == {True, False}


def test_once_the_stores_key_is_destroyed_an_opening_with_any_key_finishes() -> None:
    flash, store = filled(EncryptedFiles)

    def destroy_key() -> None:
        flash.power_cut = PowerCut(flash.operations, "before")

    with pytest.raises(PowerCutError):
        store.shred_all(destroy_key)
    for seed in range(6):
        after = flash.after_power_cut(Random(seed))  # noqa: S311 - chance, not secrecy
        fresh = EncryptedFiles(after, b"\x12" * 32)
        assert not after.names()
        fill(fresh)
        assert data_of(fresh) == EVERYTHING


def test_a_lost_data_key_is_said_in_a_sentence_and_erasing_repairs_it() -> None:
    flash, _ = filled(EncryptedFiles)
    flash.remove(".data-key")
    store = EncryptedFiles(flash, KEY)
    assert store.read("identity/clinic") == b"identity"
    for act in (
        lambda: store.read("personal/0a"),
        lambda: store.write("personal/0b", b""),
        lambda: store.frames(SEGMENT),
        lambda: store.append_frame("recordings/new.00000001", 0, b""),
    ):
        with pytest.raises(StoreError, match=r"is missing.*erase --data"):
            act()
    store.shred(DATA_SCOPE)
    fill(store)
    assert data_of(store) == EVERYTHING


def test_another_store_key_opens_no_data_and_destroys_none() -> None:
    flash, _ = filled(EncryptedFiles)
    other = EncryptedFiles(flash, b"\x12" * 32)
    for act in (lambda: other.read("personal/0a"), lambda: other.frames(SEGMENT), lambda: other.write("work/1", b"")):
        with pytest.raises(StoreError, match="another one"):
            act()
    assert data_of(EncryptedFiles(flash, KEY)) == EVERYTHING


def test_a_copy_of_the_data_key_from_before_is_the_stated_limit() -> None:
    """A flash controller's old page, or a backup: with it and the store's key the copies open; without either, not."""
    flash, store = filled(EncryptedFiles)
    old_key, copies = {".data-key": files_of(flash)[".data-key"]}, copies_of(flash)
    store.shred(DATA_SCOPE)
    assert is_found(old_key, copies)
    assert not any(SECRET in readable for readable in found(old_key, copies, store_key=b"\x12" * 32))
