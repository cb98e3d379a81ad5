"""Durable changes of files, in terms of the few things a disk can do; each of those is a moment the power can go.

A `Disk` is one folder. The real one is `fl_protocol.adapters.files.SystemDisk`; the simulator has one that loses what
was not synced. Everything that a device keeps goes through these functions, so that a power cut at any moment is
something a test can do thousands of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Disk(Protocol):
    """One folder of files, named by relative paths such as ``outbox/0a1b``; everything raises OSError.

    What was written is durable only after `sync` of the file and, where its name is new or changed, `sync_folder`.
    """

    def read(self, name: str) -> bytes | None:
        """The whole file, or None if there is none."""

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; FileNotFoundError if there is none."""

    def size(self, name: str) -> int | None:
        """Its length in bytes, or None if there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Create or empty the file, then write; not durable yet."""

    def append(self, name: str, data: bytes) -> None:
        """Write at its end, creating it where there is none; not durable yet."""

    def write_at(self, name: str, offset: int, data: bytes) -> None:
        """Overwrite in place within a file that exists; not durable yet."""

    def truncate(self, name: str, length: int) -> None:
        """Cut to `length` bytes; not durable yet."""

    def sync(self, name: str) -> None:
        """Make the file's content durable (fsync)."""

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, replacing what had it, atomically; not durable yet."""

    def remove(self, name: str) -> None:
        """Remove a file, if there is one; not durable yet."""

    def make_folder(self, name: str) -> None:
        """Create a subfolder where there is none; not durable yet."""

    def sync_folder(self, name: str = "") -> None:
        """Make a folder's names durable: new files, renames, removals."""

    def names(self, prefix: str = "") -> Sequence[str]:
        """All files, in subfolders too, whose names begin with `prefix`, sorted."""


TEMPORARY_SUFFIX = ".tmp"
"""A file whose name ends so was being written when the power went; it means nothing."""


def write_atomic(disk: Disk, name: str, data: bytes) -> None:
    """Replace a file: after a power cut it is whole, the old one or the new.

    Raises:
        OSError: for example a full disk; the file is then unchanged and nothing is left beside it.
    """
    folder, _, leaf = name.rpartition("/")
    temporary = f"{folder}/.{leaf}{TEMPORARY_SUFFIX}" if folder else f".{leaf}{TEMPORARY_SUFFIX}"
    try:
        disk.write(temporary, data)
        disk.sync(temporary)
        disk.rename(temporary, name)
    except OSError:
        disk.remove(temporary)
        raise
    disk.sync_folder(folder)


def append_durably(disk: Disk, name: str, data: bytes) -> None:
    """Append and sync; after a power cut the end may be torn, what was there before is whole.

    Raises:
        OSError: for example a full disk; the file then holds what it held before.
    """
    before = disk.size(name)
    try:
        disk.append(name, data)
        disk.sync(name)
        # An empty file may be left of an append that failed, its name not durable yet.
        if not before:
            disk.sync_folder(name.rpartition("/")[0])
    except OSError:
        if before is None:
            disk.remove(name)
        else:
            disk.truncate(name, before)
            disk.sync(name)  # or a power cut could bring back what was refused
        raise


def remove_durably(disk: Disk, name: str) -> None:
    """Remove a file, if there is one. Raises OSError."""
    if disk.size(name) is not None:
        disk.remove(name)
        disk.sync_folder(name.rpartition("/")[0])


def clear_leftovers(disk: Disk) -> None:
    """Remove what interrupted writes left. Raises OSError."""
    for name in disk.names():
        if name.endswith(TEMPORARY_SUFFIX):
            disk.remove(name)
