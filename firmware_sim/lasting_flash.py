"""A device's flash with a file system on it, in memory, on which everything lasts that was written.

For the devices of a fleet, whose daemons are killed while the power stays: what was not synced is there as well. Where
the power goes, `firmware_sim.virtual_flash.VirtualFlash` says what may be lost; it has to remember every change for
that, which takes most of its time. Both refuse the same, and count the same wear. No I/O, no clock.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from firmware_sim.flash_files import FlashFiles, file_error
from firmware_sim.virtual_flash import PAGE_BYTES


class LastingFlash(FlashFiles[bytes]):
    """`fl_protocol.durable.Disk` in memory.

    Args:
        files: that are on it.
        capacity_bytes: of file contents; a write beyond it is taken in part and refused with ENOSPC.
        read_only: refuse every change with EROFS, as a worn-out card does; may be set at any time.
        page_bytes: unit of wear.

    Attributes:
        page_writes: pages written so far, as if nothing were cached: an upper bound on wear.
    """

    def __init__(
        self,
        files: Mapping[str, bytes] | None = None,
        *,
        capacity_bytes: int | None = None,
        read_only: bool = False,
        page_bytes: int = PAGE_BYTES,
    ) -> None:
        super().__init__(dict(files or {}), read_only=read_only)
        self.capacity_bytes, self.page_bytes, self.page_writes = capacity_bytes, page_bytes, 0
        self._used_bytes = sum(map(len, self._files.values()))

    def image(self) -> dict[str, bytes]:
        """Every file."""
        return dict(self._files)

    def decay(self, name: str, content: bytes) -> None:
        """The medium holds other bytes than were written, and nobody noticed: no write, no wear.

        Args:
            name: of a file that exists.
            content: as long as it was.
        """
        self._existing(name)
        self._files[name] = content

    def read(self, name: str) -> bytes | None:
        """The whole file, or None."""
        return self._look(name)

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`."""
        return self._existing(name)[offset : offset + length]

    def size(self, name: str) -> int | None:
        """Its length in bytes, or None."""
        content = self._look(name)
        return None if content is None else len(content)

    def write(self, name: str, data: bytes) -> None:
        """Create or empty, then write."""
        self._writable(name)
        self._used_bytes -= len(self._files.get(name, b""))
        self._put(name, b"", 0, data)

    def append(self, name: str, data: bytes) -> None:
        """Write at the end."""
        self._writable(name)
        content = self._files.get(name, b"")
        self._put(name, content, len(content), data)

    def write_at(self, name: str, offset: int, data: bytes) -> None:
        """Overwrite in place."""
        content = self._existing(name)
        self._writable(name)
        self._put(name, content, offset, data)

    def truncate(self, name: str, length: int) -> None:
        """Cut."""
        content = self._existing(name)
        self._writable(name)
        self._used_bytes += length - len(content)
        self._files[name] = content[:length].ljust(length, b"\0")

    def sync(self, name: str) -> None:
        """Nothing: it lasts."""
        self._existing(name)

    def rename(self, old: str, new: str) -> None:
        """Atomic rename."""
        self._refuse_read_only(new)
        content = self._existing(old)
        self._place(new)
        if old != new:
            self._used_bytes -= len(self._files.get(new, b""))
            self._files[new] = content
            del self._files[old]

    def remove(self, name: str) -> None:
        """Unlink."""
        self._refuse_read_only(name)
        if (content := self._look(name)) is not None:
            self._used_bytes -= len(content)
            del self._files[name]

    def make_folder(self, name: str) -> None:
        """Create a subfolder, and those it is in."""
        self._folders |= self._new_folders(name)

    def sync_folder(self, name: str = "") -> None:
        """It wears the flash, and names last in any case."""
        self._require_folder(name)
        self.page_writes += 1

    def _put(self, name: str, content: bytes, offset: int, data: bytes) -> None:
        """Write what there is room for; raises ENOSPC if that is not all."""
        growth, taken = max(0, offset + len(data) - len(content)), data
        if self.capacity_bytes is not None and growth > (room := max(0, self.capacity_bytes - self._used_bytes)):
            taken = data[: len(data) - (growth - room)] if growth - room < len(data) else b""
        if taken or offset <= len(content):
            after = content[:offset].ljust(offset, b"\0") + taken + content[offset + len(taken) :]
            self._used_bytes += len(after) - len(content)
            self.page_writes += -(-(offset + len(taken)) // self.page_bytes) - offset // self.page_bytes
            content = after
        self._files[name] = content
        if len(taken) < len(data):
            raise file_error(errno.ENOSPC, "")
