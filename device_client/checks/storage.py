"""Checks of what the device keeps: room, the medium, the counter's place, the store key; and the store, only read.

The store is read beside a running daemon, without its lock and without writing: every file is replaced whole, so what
is read is one of its states. `open_to_read` refuses every change.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from device_client.adapters.encrypted_files import KEY_BYTES, EncryptedFiles
from device_client.checks.findings import AS_ITS_USER, Result, ok, problem, size_text, warning
from fl_protocol.adapters.files import SystemDisk
from fl_protocol.durable import TEMPORARY_SUFFIX

LEAST_FREE_BYTES = 16 * 1024 * 1024
"""Below this nothing works any more."""
SLOW_FSYNC_S = 1.0
_PROBE_BYTES = 4096
_READ_ONLY = 1  # ST_RDONLY of statvfs(3)


@dataclass(frozen=True)
class Volume:
    """A folder and what it lies on; where the folder does not exist, the nearest one above it that does.

    Args:
        folder: that is asked about.
        exists: whether it exists.
        owner_uid: of it, or of the one above.
        device: of the file system.
        free_bytes: for this user.
        read_only: whether the file system is.
        writable: whether this user may write to it, as far as permissions say.
        fsync_s: how long a small write took to be on the medium; None where it was not tried.
    """

    folder: Path
    exists: bool
    owner_uid: int
    device: int
    free_bytes: int
    read_only: bool
    writable: bool
    fsync_s: float | None

    @classmethod
    def of(cls, folder: Path) -> Volume:
        """Look, and write a little into a nameless file if the folder is this user's own. Raises OSError."""
        there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        stat, volume = there.stat(), os.statvfs(there)
        exists, writable = there == folder, os.access(there, os.W_OK | os.X_OK)
        read_only = bool(volume.f_flag & _READ_ONLY)
        ours = exists and writable and not read_only and stat.st_uid == os.geteuid()
        return cls(
            folder=folder,
            exists=exists,
            owner_uid=stat.st_uid,
            device=stat.st_dev,
            free_bytes=volume.f_bavail * volume.f_frsize,
            read_only=read_only,
            writable=writable,
            fsync_s=_fsync_seconds(folder) if ours else None,
        )


def check_volume(volume: Volume, *, wanted_bytes: int, uid: int) -> Result:
    """Whether the device can keep things there.

    Args:
        volume: as found.
        wanted_bytes: what the device may come to hold.
        uid: of this process.
    """
    broken = _unusable(volume)
    if broken is not None:
        return broken
    place, free = volume.folder, f"{size_text(volume.free_bytes)} free"
    if volume.free_bytes < wanted_bytes:
        return warning(f"{place} has {free}; it may come to hold {size_text(wanted_bytes)}", "make room on it")
    if volume.exists and volume.owner_uid != uid:
        return warning(
            f"{place} belongs to the user with id {volume.owner_uid}, this runs as {uid}: what that user may do was "
            "not tried",
            f"run this as that user: sudo -u '#{volume.owner_uid}' covey-device doctor",
        )
    if volume.fsync_s is None:
        return ok(f"{place}: {free}" if volume.exists else f"{place} is not there yet, {free}")
    text = f"{place}: {free}; a small write is on the medium after {volume.fsync_s * 1e3:.0f} ms"
    return ok(text) if volume.fsync_s < SLOW_FSYNC_S else warning(text, "the medium is slow or worn: replace it")


def _unusable(volume: Volume) -> Result | None:
    """Why nothing can be kept there; None if something can."""
    place = volume.folder
    if volume.read_only:
        return problem(
            f"{place} is on a file system that is read-only",
            "look into the system's log (sudo dmesg): a worn or pulled card becomes read-only; check it, replace it",
        )
    if not volume.writable:
        return problem(f"{place} cannot be written by this user", AS_ITS_USER)
    if volume.free_bytes < LEAST_FREE_BYTES:
        return problem(f"{place} has {size_text(volume.free_bytes)} free: nothing can be stored", "make room on it")
    return None


def check_counter(counter: Volume, *, store: Volume) -> Result:
    """Whether the ledger's counter is apart from the store; `counter` is the folder that it is in."""
    if store.folder in (counter.folder, *counter.folder.parents):
        return problem(
            f"the ledger's counter is inside the store ({counter.folder}), so an old copy of the store brings an old "
            "counter with it",
            "set device.counter to a path outside",
        )
    if counter.device == store.device:
        return warning(
            "the ledger's counter is on the same file system as the store: an old image of it, put back whole, is "
            "not noticed",
            "set device.counter to a path on another medium",
        )
    return ok(f"the ledger's counter is on another file system than the store ({counter.folder})")


def check_store_key(path: Path, *, is_credential: bool, store_uid: int | None) -> Result:
    """Whether the store's key is there, whole and its owner's only.

    Args:
        path: of the key.
        is_credential: whether systemd passes it; it then looks after who can read it, by means that the mode does not
            show.
        store_uid: owner of the store, None where there is no store yet.
    """
    try:
        stat = path.stat()
        key = path.read_bytes()
    except FileNotFoundError:
        return problem(f"there is no store key at {path}", "run covey-device init")
    except PermissionError:
        return problem(f"this user may not read the store key {path}", AS_ITS_USER)
    if len(key) != KEY_BYTES:
        return problem(f"the store key {path}: expected {KEY_BYTES} bytes, got {len(key)}", "put the right file there")
    return (
        ok("the store key is a credential that systemd passes") if is_credential else _key_file(path, stat, store_uid)
    )


def _key_file(path: Path, stat: os.stat_result, store_uid: int | None) -> Result:
    """Who can read a key file."""
    if stat.st_mode & 0o077:
        return problem(f"the store key {path} can be read by others", f"run chmod 600 {path}")
    if store_uid is not None and stat.st_uid != store_uid:
        return problem(
            f"the store key {path} belongs to another user (id {stat.st_uid}) than the store (id {store_uid})",
            f"run sudo chown {store_uid} on it, after finding out who put it there",
        )
    return ok(f"the store key {path} is its owner's only")


def open_to_read(folder: Path, key: bytes) -> EncryptedFiles:
    """The store without its lock, for reading only. Raises StoreError."""
    return EncryptedFiles(_ReadOnlyDisk(folder), key, where=str(folder))


def newest_line_s(log: Path) -> float | None:
    """Time of the newest whole line of the ledger, Unix seconds; None where there is none that can be read."""

    class _Line(msgspec.Struct):
        at_s: float

    try:
        lines = log.read_bytes().splitlines()
    except OSError:
        return None
    for line in reversed(lines):  # the last one may be torn, or just being written
        try:
            return msgspec.json.decode(line, type=_Line).at_s
        except msgspec.DecodeError:
            continue
    return None


def _fsync_seconds(folder: Path) -> float | None:
    """How long a write takes to be on the medium, in a file without a name; None where there are no such files."""
    begun_s = time.monotonic()
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:  # FAT and some network file systems
            return None
        raise
    try:
        os.write(descriptor, os.urandom(_PROBE_BYTES))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return time.monotonic() - begun_s


class _ReadOnlyDisk(SystemDisk):
    """A folder that is only read; what a daemon is just writing beside it is not seen."""

    def names(self, prefix: str = "") -> Sequence[str]:
        """All files but unfinished ones."""
        return [name for name in super().names(prefix) if not name.endswith(TEMPORARY_SUFFIX)]

    def sync(self, name: str) -> None:
        """Nothing was written."""

    def sync_folder(self, name: str = "") -> None:
        """Nothing was written."""

    def write(self, name: str, data: bytes) -> None:
        """Refused."""
        _refuse(name)

    def append(self, name: str, data: bytes) -> None:
        """Refused."""
        _refuse(name)

    def write_at(self, name: str, offset: int, data: bytes) -> None:
        """Refused."""
        _refuse(name)

    def truncate(self, name: str, length: int) -> None:
        """Refused."""
        _refuse(name)

    def rename(self, old: str, new: str) -> None:
        """Refused."""
        _refuse(old)

    def remove(self, name: str) -> None:
        """Refused."""
        _refuse(name)

    def make_folder(self, name: str) -> None:
        """Refused."""
        _refuse(name)


def _refuse(name: str) -> NoReturn:
    raise OSError(errno.EROFS, f"only read here, but {name} would have to be changed: start the daemon once")
