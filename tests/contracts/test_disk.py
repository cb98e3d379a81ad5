"""One suite over the operating system's files and the virtual flashes: same results, same errors."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from firmware_sim.lasting_flash import LastingFlash
from firmware_sim.virtual_flash import VirtualFlash
from fl_protocol.adapters.files import SystemDisk
from fl_protocol.durable import Disk, append_durably, clear_leftovers, remove_durably, write_atomic

DISKS: dict[str, Callable[[Path], Disk]] = {
    "system": SystemDisk,
    "virtual": lambda _folder: VirtualFlash(),
    "lasting": lambda _folder: LastingFlash(),
}


@pytest.fixture(params=DISKS.values(), ids=DISKS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    made: Disk = request.param(tmp_path)
    return made


def test_what_is_written_is_read(disk: Disk) -> None:
    disk.write("state", b"a long first content")
    disk.write("state", b"content")
    assert disk.read("state") == b"content"
    assert disk.size("state") == 7
    assert disk.read_at("state", 3, 2) == b"te"
    assert disk.read_at("state", 5, 100) == b"nt"
    assert disk.read_at("state", 7, 1) == disk.read_at("state", 100, 1) == b""


def test_a_file_grows_at_its_end_changes_in_place_and_is_cut(disk: Disk) -> None:
    disk.append("log", b"one")
    disk.append("log", b"two")
    disk.write_at("log", 2, b"EE")
    assert disk.read("log") == b"onEEwo"
    disk.write_at("log", 5, b"OO")
    disk.write_at("log", 8, b"!")
    assert disk.read("log") == b"onEEwOO\0!"
    disk.truncate("log", 2)
    disk.truncate("log", 4)
    assert disk.read("log") == b"on\0\0"


def test_a_rename_replaces(disk: Disk) -> None:
    disk.write("old", b"1")
    disk.write("new", b"2")
    disk.rename("old", "new")
    assert disk.names() == ["new"]
    assert disk.read("new") == b"1"
    disk.rename("new", "new")
    assert disk.read("new") == b"1"


def test_names_are_sorted_and_found_in_subfolders(disk: Disk) -> None:
    disk.make_folder("outbox")
    disk.make_folder("outbox")
    for name in ("b", "outbox/2", "outbox/1", "a", ".hidden"):
        disk.write(name, b"")
        disk.sync(name)
    disk.sync_folder("outbox")
    disk.sync_folder()
    assert disk.names() == [".hidden", "a", "b", "outbox/1", "outbox/2"]
    assert disk.names("outbox/") == ["outbox/1", "outbox/2"]
    disk.remove("outbox/1")
    disk.rename("a", "outbox/0")
    assert disk.names("out") == ["outbox/0", "outbox/2"]


def test_what_is_not_there_reads_as_none_and_goes_silently(disk: Disk) -> None:
    assert [disk.read("no"), disk.size("no"), disk.read("no/no"), disk.size("no/no")] == [None] * 4
    disk.remove("no")
    disk.remove("no/no")


MISSING: dict[str, Callable[[Disk], object]] = {
    "read_at": lambda disk: disk.read_at("no", 0, 1),
    "write_at": lambda disk: disk.write_at("no", 0, b"x"),
    "truncate": lambda disk: disk.truncate("no", 0),
    "sync": lambda disk: disk.sync("no"),
    "rename": lambda disk: disk.rename("no", "new"),
    "rename into": lambda disk: disk.rename("there", "no/new"),
    "write in": lambda disk: disk.write("no/file", b"x"),
    "append in": lambda disk: disk.append("no/file", b"x"),
    "sync_folder": lambda disk: disk.sync_folder("no"),
    "write_atomic": lambda disk: write_atomic(disk, "no/file", b"x"),
    "append_durably": lambda disk: append_durably(disk, "no/file", b"x"),
}


@pytest.mark.parametrize("act", MISSING.values(), ids=MISSING)
def test_what_needs_a_file_says_that_there_is_none(disk: Disk, act: Callable[[Disk], object]) -> None:
    disk.write("there", b"1")
    with pytest.raises(FileNotFoundError):
        act(disk)
    assert disk.names() == ["there"]


def test_files_and_folders_are_not_confused(disk: Disk) -> None:
    disk.write("file", b"1")
    disk.make_folder("folder")
    with pytest.raises(FileExistsError):
        disk.make_folder("file")
    under_a_file: tuple[Callable[[], object], ...] = (
        lambda: disk.write("file/x", b""),
        lambda: disk.read("file/x"),
        lambda: disk.make_folder("file/x"),
        lambda: disk.sync_folder("file"),
    )
    for act in under_a_file:
        with pytest.raises(NotADirectoryError):
            act()
    for act in (
        lambda: disk.write("folder", b""),
        lambda: disk.read("folder"),
        lambda: disk.remove("folder"),
        lambda: disk.rename("file", "folder"),
    ):
        with pytest.raises(IsADirectoryError):
            act()


def test_durable_changes_are_built_on_it(disk: Disk) -> None:
    disk.make_folder("outbox")
    write_atomic(disk, "outbox/a", b"1")
    write_atomic(disk, "outbox/a", b"2")
    append_durably(disk, "log", b"1")
    append_durably(disk, "log", b"2")
    disk.write("outbox/.b.tmp", b"half")
    clear_leftovers(disk)
    assert disk.names() == ["log", "outbox/a"]
    assert (disk.read("outbox/a"), disk.read("log")) == (b"2", b"12")
    remove_durably(disk, "log")
    remove_durably(disk, "log")
    assert disk.names() == ["outbox/a"]


NAMES = st.sampled_from([f"{folder}{leaf}" for folder, leaf in itertools.product(("", "one/", "two/"), "ab")])
FOLDERS = st.sampled_from(["", "one", "two"])
DATA = st.binary(max_size=6)
PLACES = st.integers(0, 8)


class AllDisks(RuleBasedStateMachine):
    """Whatever is done to all comes out the same."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.system, self.virtual, self.lasting = SystemDisk(Path(self.folder.name)), VirtualFlash(), LastingFlash()

    def teardown(self) -> None:
        self.folder.cleanup()

    def all(self, act: Callable[[Disk], object]) -> None:
        assert outcome(act, self.system) == outcome(act, self.virtual) == outcome(act, self.lasting)

    @invariant()
    def wear_is_the_same(self) -> None:
        assert self.virtual.page_writes == self.lasting.page_writes
        assert self.virtual.image() == self.lasting.image()

    @rule(name=NAMES, data=DATA)
    def write(self, name: str, data: bytes) -> None:
        self.all(lambda disk: disk.write(name, data))

    @rule(name=NAMES, data=DATA)
    def append(self, name: str, data: bytes) -> None:
        self.all(lambda disk: disk.append(name, data))

    @rule(name=NAMES, offset=PLACES, data=DATA)
    def write_at(self, name: str, offset: int, data: bytes) -> None:
        self.all(lambda disk: disk.write_at(name, offset, data))

    @rule(name=NAMES, length=PLACES)
    def truncate(self, name: str, length: int) -> None:
        self.all(lambda disk: disk.truncate(name, length))

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: str, new: str) -> None:
        self.all(lambda disk: disk.rename(old, new))

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        self.all(lambda disk: disk.remove(name))

    @rule(name=FOLDERS)
    def make_folder(self, name: str) -> None:
        self.all(lambda disk: disk.make_folder(name))

    @rule(name=FOLDERS)
    def sync_folder(self, name: str) -> None:
        self.all(lambda disk: disk.sync_folder(name))

    @rule(name=NAMES, offset=PLACES, length=PLACES)
    def look(self, name: str, offset: int, length: int) -> None:
        self.all(lambda disk: disk.sync(name))
        self.all(lambda disk: disk.read_at(name, offset, length))
        self.all(
            lambda disk: (disk.read(name), disk.size(name), disk.names(), disk.names(name[:3]), disk.names("one/"))
        )


def outcome(act: Callable[[Disk], object], disk: Disk) -> object:
    """What it returned, or the error it raised."""
    try:
        return act(disk)
    except OSError as error:
        return error.errno


TestAllDisks = AllDisks.TestCase
TestAllDisks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class FullFlashes(RuleBasedStateMachine):
    """What does not fit, or may not be changed, ends in the same bytes, the same wear and the same error."""

    def __init__(self) -> None:
        super().__init__()
        self.flashes = [VirtualFlash(page_bytes=4), LastingFlash(page_bytes=4)]

    def all(self, act: Callable[[Disk], object]) -> None:
        assert outcome(act, self.flashes[0]) == outcome(act, self.flashes[1])
        assert self.flashes[0].image() == self.flashes[1].image()
        assert self.flashes[0].page_writes == self.flashes[1].page_writes

    @rule(room=st.none() | st.integers(0, 12), read_only=st.sampled_from([False, False, False, True]))
    def change(self, room: int | None, *, read_only: bool) -> None:
        for flash in self.flashes:
            flash.capacity_bytes, flash.read_only = room, read_only

    @rule(name=NAMES, data=DATA)
    def write(self, name: str, data: bytes) -> None:
        self.all(lambda disk: disk.write(name, data))

    @rule(name=NAMES, data=DATA)
    def append(self, name: str, data: bytes) -> None:
        self.all(lambda disk: disk.append(name, data))

    @rule(name=NAMES, data=DATA)
    def replace(self, name: str, data: bytes) -> None:
        self.all(lambda disk: write_atomic(disk, name, data))

    @rule(name=NAMES, place=PLACES)
    def truncate(self, name: str, place: int) -> None:
        self.all(lambda disk: disk.truncate(name, place))

    @rule(name=NAMES, data=DATA)
    def overwrite(self, name: str, data: bytes) -> None:
        self.all(lambda disk: disk.write_at(name, 0, data))

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        self.all(lambda disk: disk.remove(name))

    @rule(name=FOLDERS)
    def make_folder(self, name: str) -> None:
        self.all(lambda disk: disk.make_folder(name or "one"))


TestFullFlashes = FullFlashes.TestCase
TestFullFlashes.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
