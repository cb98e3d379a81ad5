"""Files of the operating system: `fl_protocol.durable.Disk`, and durable changes of single paths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fl_protocol import durable


class SystemDisk:
    """`fl_protocol.durable.Disk` in a folder that exists.

    Args:
        folder: every name is relative to it.
        mode: permissions of new files; folders get the same with search added for whoever may read.
    """

    def __init__(self, folder: Path, *, mode: int = 0o600) -> None:
        self.folder, self._mode = folder, mode

    def read(self, name: str) -> bytes | None:
        """The whole file, or None."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`."""
        with self._open(name, os.O_RDONLY) as descriptor:
            return os.pread(descriptor, length, offset)

    def size(self, name: str) -> int | None:
        """Its length in bytes, or None."""
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Create or empty, then write."""
        with self._open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            _write_all(descriptor, data)

    def append(self, name: str, data: bytes) -> None:
        """Write at the end."""
        with self._open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
            _write_all(descriptor, data)

    def write_at(self, name: str, offset: int, data: bytes) -> None:
        """Overwrite in place."""
        with self._open(name, os.O_WRONLY) as descriptor:
            os.lseek(descriptor, offset, os.SEEK_SET)
            _write_all(descriptor, data)

    def truncate(self, name: str, length: int) -> None:
        """Cut."""
        os.truncate(self.folder / name, length)

    def sync(self, name: str) -> None:
        """Sync its content."""
        with self._open(name, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)

    def rename(self, old: str, new: str) -> None:
        """Atomic rename."""
        (self.folder / old).replace(self.folder / new)

    def remove(self, name: str) -> None:
        """Unlink."""
        (self.folder / name).unlink(missing_ok=True)

    def make_folder(self, name: str) -> None:
        """Create a subfolder."""
        (self.folder / name).mkdir(mode=self._mode | (self._mode & 0o444) >> 2, parents=True, exist_ok=True)

    def sync_folder(self, name: str = "") -> None:
        """Fsync of the folder."""
        fsync_folder(self.folder / name)

    def names(self, prefix: str = "") -> Sequence[str]:
        """All files, sorted."""
        start = self.folder / prefix.rpartition("/")[0]  # not the whole disk to list one folder
        found = (
            (Path(folder) / leaf).relative_to(self.folder).as_posix()
            for folder, _, leaves in os.walk(start)
            for leaf in leaves
        )
        return sorted(name for name in found if name.startswith(prefix))

    @contextmanager
    def _open(self, name: str, flags: int) -> Iterator[int]:
        """A descriptor, closed in the end."""
        descriptor = os.open(self.folder / name, flags | os.O_CLOEXEC, self._mode)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace a file durably and atomically (`fl_protocol.durable.write_atomic`). Raises OSError."""
    durable.write_atomic(SystemDisk(path.parent, mode=mode), path.name, data)


def append_durably(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Append to a file durably (`fl_protocol.durable.append_durably`). Raises OSError."""
    durable.append_durably(SystemDisk(path.parent, mode=mode), path.name, data)


def fsync_folder(folder: Path) -> None:
    """Make a folder's entries (renames, new files, deletions) durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    """Write every byte; the system may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
