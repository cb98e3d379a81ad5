"""A device's flash with a file system on it, in memory: what was not synced may be lost, torn or garbled by a power
cut.

`VirtualFlash` is a `fl_protocol.durable.Disk`. Each change is a numbered boundary at which a planned `PowerCut` ends
the process; `after_power_cut` is what the next process finds. The model is as harsh as POSIX allows and a journaling
file system keeps (T. Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014, section 3):

- bytes that were synced stay, unless a later write touched them;
- of bytes written since the last sync any page may be old, new, new only at its beginning, or garbage, and the file's
  length anything between;
- a name that was made, changed or removed since its folder was synced may be as before or as after; a rename is one
  step, old or new; unrelated names do not keep their order;
- syncing a file says nothing about its name, and a folder's sync nothing about the folder's own name.

No I/O, no clock; chance comes from the `random.Random` that is passed in.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Literal

from firmware_sim.flash_files import FlashFiles, ancestors, file_error, folder_of
from firmware_sim.flash_loss import FileState, NameChange, apply_names, chains_of, surviving_content

PAGE_BYTES = 4096


class PowerCutError(BaseException):
    """The process ends here: nothing of ours may catch it."""


@dataclass(frozen=True)
class PowerCut:
    """When the power goes.

    Args:
        at: the number of the operation, counted from 0.
        moment: before it, after it, or in its middle: of written data only a beginning or some pages arrived.
    """

    at: int
    moment: Literal["before", "during", "after"] = "before"


class VirtualFlash(FlashFiles[FileState]):
    """`fl_protocol.durable.Disk` in memory.

    Args:
        capacity_bytes: of file contents; a write beyond it is taken in part and refused with ENOSPC.
        read_only: refuse every change with EROFS, as a worn-out card does; may be set at any time.
        power_cut: when the power goes; may be set at any time.
        random: decides what arrives of an operation in whose middle the power goes.
        page_bytes: unit of tearing and of wear.

    Attributes:
        operations: boundaries so far.
        page_writes: pages written so far, as if nothing were cached: an upper bound on wear.
        written_bytes: bytes handed to writes so far.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int | None = None,
        read_only: bool = False,
        power_cut: PowerCut | None = None,
        random: Random | None = None,
        page_bytes: int = PAGE_BYTES,
    ) -> None:
        super().__init__({}, read_only=read_only)
        self.capacity_bytes, self.power_cut = capacity_bytes, power_cut
        self.page_bytes, self.operations, self.page_writes, self.written_bytes = page_bytes, 0, 0, 0
        self._given_random = random
        self._synced_names: dict[str, FileState] = {}
        self._name_changes: list[NameChange] = []
        self._synced_folders = {""}
        self._used_bytes, self._off = 0, False

    @functools.cached_property
    def _random(self) -> Random:
        """What decides; seeding one takes longer than all else that is done here, and most flashes need none."""
        return self._given_random if self._given_random is not None else Random(0)  # noqa: S311 - it repeats itself

    def image(self) -> dict[str, bytes]:
        """Every file as the process sees it: what a kill leaves, while the power stays."""
        return {name: bytes(file.content) for name, file in self._files.items()}

    def boundary(self, kind: str, name: str, effect: Callable[[], object] | None = None) -> None:
        """Count one operation, of this disk or of anything that shares its power, such as a message sent.

        Args:
            kind: what is done; for the reader of a failing test.
            name: to what.
            effect: done here unless the power goes before it.

        Raises:
            PowerCutError: the plan says so, or the power is already off.
        """
        self._step(kind, name, effect or _nothing, half=_nothing)

    def read(self, name: str) -> bytes | None:
        """The whole file, or None."""
        file = self._look(name)
        return None if file is None else bytes(file.content)

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`."""
        return bytes(self._existing(name).content[offset : offset + length])

    def size(self, name: str) -> int | None:
        """Its length in bytes, or None."""
        file = self._look(name)
        return None if file is None else len(file.content)

    def write(self, name: str, data: bytes) -> None:
        """Create or empty, then write."""
        self._writable(name)

        def effect(part: bytes) -> None:
            file = self._created(name)
            if file.content:
                self._used_bytes -= len(file.content)
                file.cut(0)
            self._put(file, 0, part)

        self._write_step("write", name, data, effect)

    def append(self, name: str, data: bytes) -> None:
        """Write at the end."""
        self._writable(name)

        def effect(part: bytes) -> None:
            file = self._created(name)
            self._put(file, len(file.content), part)

        self._write_step("append", name, data, effect)

    def write_at(self, name: str, offset: int, data: bytes) -> None:
        """Overwrite in place."""
        file = self._existing(name)
        self._writable(name)
        self._write_step("write_at", name, data, lambda part: self._put(file, offset, part))

    def truncate(self, name: str, length: int) -> None:
        """Cut."""
        file = self._existing(name)
        self._writable(name)

        def effect() -> None:
            self._used_bytes += length - len(file.content)
            file.cut(length)

        self._step("truncate", name, effect)

    def sync(self, name: str) -> None:
        """Nothing of the file is lost from here on, if its name is not."""
        file = self._existing(name)
        self._step("sync", name, file.changes.clear, half=_nothing)

    def rename(self, old: str, new: str) -> None:
        """Atomic rename."""
        self._refuse_read_only(new)
        file = self._existing(old)
        self._place(new)

        def effect() -> None:
            if old != new:
                replaced = self._files.get(new)
                self._used_bytes -= len(replaced.content) if replaced is not None else 0
                self._change_names({old: None, new: file})

        self._step("rename", new, effect)

    def remove(self, name: str) -> None:
        """Unlink."""
        self._refuse_read_only(name)
        file = self._look(name)

        def effect() -> None:
            if file is not None:
                self._used_bytes -= len(file.content)
                self._change_names({name: None})

        self._step("remove", name, effect)

    def make_folder(self, name: str) -> None:
        """Create a subfolder, and those it is in."""
        wanted = self._new_folders(name)
        self._step("make_folder", name, lambda: self._folders.update(wanted))

    def sync_folder(self, name: str = "") -> None:
        """Make the names in this folder durable."""
        self._require_folder(name)

        def effect() -> None:
            kept = []
            for chain in chains_of(self._name_changes) if self._name_changes else ():
                # A rename between folders is one journal entry: either folder's sync makes it durable, and with it
                # what it rests on.
                here = [any(folder_of(leaf) == name for leaf in change.after) for change in chain]
                stop = len(here) - here[::-1].index(True) if True in here else 0
                for change in chain[:stop]:
                    apply_names(change, self._synced_names)
                kept += chain[stop:]
            self._name_changes = kept
            if len(self._synced_folders) < len(self._folders):
                self._synced_folders.update(folder for folder in self._folders if folder and folder_of(folder) == name)
            self.page_writes += 1

        self._step("sync_folder", name, effect, half=_nothing)

    def after_power_cut(self, random: Random) -> VirtualFlash:
        """What the next process finds if the power goes now; this flash is unchanged and may be asked again.

        Args:
            random: chooses among the outcomes that the file system allows.
        """
        after = VirtualFlash(capacity_bytes=self.capacity_bytes, random=random, page_bytes=self.page_bytes)
        after.page_writes = self.page_writes
        after._folders = self._surviving_folders(random)
        for name, file in self._surviving_names(random).items():
            if folder_of(name) in after._folders:
                after._files[name] = FileState(surviving_content(file, random, self.page_bytes))
        after._synced_names, after._synced_folders = dict(after._files), set(after._folders)
        after._used_bytes = sum(len(file.content) for file in after._files.values())
        return after

    def after_kill(self) -> VirtualFlash:
        """What the next process finds if this one was killed while the power stayed: everything, synced or not."""
        self._off, self.power_cut = False, None
        return self

    def decay(self, name: str, content: bytes) -> None:
        """The medium holds other bytes than were written, and nobody noticed: no write, no boundary, no wear.

        Args:
            name: of a file that exists.
            content: as long as it was.
        """
        file = self._existing(name)
        file.content[:] = content
        file.changes.clear()

    def durable(self) -> dict[str, bytes]:
        """Every file's content as it is sure to be after a power cut now; for tests that search the medium."""
        return {name: bytes(file.synced()) for name, file in self._synced_names.items()}

    def _surviving_folders(self, random: Random) -> set[str]:
        """Synced folders, and by chance others whose parents survive."""
        folders = set(self._synced_folders)
        for folder in sorted(self._folders - folders):
            if folder_of(folder) in folders and random.random() < 0.5:
                folders.add(folder)
        return {folder for folder in folders if ancestors(folder) <= folders}

    def _surviving_names(self, random: Random) -> dict[str, FileState]:
        """Synced names, with a beginning of each chain of related changes applied."""
        names = dict(self._synced_names)
        for chain in chains_of(self._name_changes):
            for change in chain[: random.randint(0, len(chain))]:
                apply_names(change, names)
        return names

    def _step(
        self, kind: str, name: str, effect: Callable[[], object], *, half: Callable[[], object] | None = None
    ) -> None:
        """One boundary. `half` is what happens when the power goes in the middle; None: all or nothing, by chance."""
        self._powered()
        number, self.operations = self.operations, self.operations + 1
        cut = self.power_cut
        if cut is None or cut.at != number:
            effect()
            return
        if half is None:
            half = effect if self._random.random() < 0.5 else _nothing
        with suppress(OSError):  # there is nobody left to hear of a full disk
            {"before": _nothing, "during": half, "after": effect}[cut.moment]()
        self._off = True
        raise PowerCutError(f"operation {number}, {cut.moment} {kind} {name}")

    def _write_step(self, kind: str, name: str, data: bytes, effect: Callable[[bytes], None]) -> None:
        """A boundary that moves bytes; in its middle a beginning has arrived."""
        if self.power_cut is None:
            self._powered()
            self.operations += 1
            effect(data)
            return
        self._step(kind, name, lambda: effect(data), half=lambda: effect(data[: self._random.randint(0, len(data))]))

    def _put(self, file: FileState, offset: int, data: bytes) -> None:
        """Write what there is room for; raises ENOSPC if that is not all."""
        growth = max(0, offset + len(data) - len(file.content))
        room = growth if self.capacity_bytes is None else max(0, self.capacity_bytes - self._used_bytes)
        taken = data[: len(data) - max(0, growth - room)] if growth > room else data
        if taken or offset <= len(file.content):
            before = len(file.content)
            file.put(offset, taken)
            self._used_bytes += len(file.content) - before
            self.written_bytes += len(taken)
            self.page_writes += -(-(offset + len(taken)) // self.page_bytes) - offset // self.page_bytes
        if len(taken) < len(data):
            raise file_error(errno.ENOSPC, "")

    def _created(self, name: str) -> FileState:
        """The file of a name, made where there is none."""
        file = self._files.get(name)
        if file is None:
            file = FileState(bytearray())
            self._change_names({name: file})
        return file

    def _change_names(self, after: dict[str, FileState | None]) -> None:
        """Change names, not durably."""
        change = NameChange(after)
        apply_names(change, self._files)
        self._name_changes.append(change)

    def _powered(self) -> None:
        """After the power went nothing works, whoever tries (a `finally`, say)."""
        if self._off:
            raise PowerCutError("the power is off")


def _nothing() -> None:
    """Leave it to chance."""
