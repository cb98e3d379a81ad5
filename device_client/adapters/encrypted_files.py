"""The store on a disk: each blob one AES-256-GCM file (`cryptography`), replaced atomically and durably.

The file's name is bound as associated data, so files cannot be swapped. Logs are appended in the clear: the ledger
holds nothing about the wearer but what was spent, and a wearer should be able to read it.

What comes of the wearer's data (`DATA_FOLDERS`) is encrypted under a data key of its own, which lies here encrypted
under the store's key. `shred` destroys that key first, so that the files mean nothing to whoever has the store's key,
even those that a power cut keeps from being removed. The key's file is overwritten in place before it is removed.
Honestly: flash controllers and copy-on-write file systems (btrfs, F2FS, ZFS) put what overwrites elsewhere and keep the
old page until they need it. Whoever reads the bare chips *and* has the store's key may then find the old data key;
against that person only destroying the store's key helps (`shred_all`, and a key sealed to a TPM), or the medium's own
secure erase.

Nonces are random. NIST SP 800-38D (section 8.3) allows 2^32 messages under one key with random 96-bit nonces; a device
that writes once a second takes 136 years for that.

One process at a time. What the process before left in the system's memory is made durable at the opening, before
anything is decided on what it says. Nothing here reads a clock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from device_client.adapters.system_entropy import system_entropy
from device_client.errors import StoreError
from device_client.recordings.frames import NONCE_BYTES, DamagedFramesError, open_frames, seal_frame
from fl_protocol.adapters.files import SystemDisk, fsync_folder
from fl_protocol.durable import Disk, append_durably, clear_leftovers, remove_durably, write_atomic
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import Entropy

KEY_BYTES = 32
DATA_SCOPE = "data"
DATA_FOLDERS = frozenset(
    (
        "control",
        "counted",
        "damaged",
        "download",
        "evaluation",
        "outbox",
        "personal",
        "records",
        "recordings",
        "residual",
        "work",
    )
)
"""First parts of the names that `shred` destroys: recordings, what was learnt from them, and what waits to be sent."""

_FOLDERS = DATA_FOLDERS | {"consent", "identity", "pseudonyms", "session"}
_DATA_KEY, _SHREDDED_KEY, _ERASING, _LOCK = ".data-key", ".data-key-shredded", ".erasing", ".lock"
_KEY_BOUND = b"data key"  # no blob's name has a space
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9]+)?(/[a-z0-9_-]+(\.[a-z0-9]+)?)?")
_Files = TypeVar("_Files", bound="EncryptedFiles")


class EncryptedFiles:
    """`device_client.ports.Store` on a disk, and `device_client.recordings.frames.WindowFiles`.

    Args:
        disk: it is this store's alone.
        key: 32 bytes; whoever has it can read everything here.
        entropy: where nonces and data keys come from; the operating system's CSPRNG outside of simulations.
        where: what sentences call the place.
        on_close: called by `close`.

    Raises:
        StoreError: the disk cannot be read, or what was interrupted cannot be finished.
    """

    def __init__(
        self,
        disk: Disk,
        key: bytes,
        *,
        entropy: Entropy = system_entropy,
        where: str = "the store",
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._disk, self._aead, self.entropy, self._where, self._on_close = disk, AESGCM(key), entropy, where, on_close
        self._data_aead: AESGCM | None = None
        self._ends: dict[str, tuple[int, int]] = {}
        self._folders: set[str] = set()
        try:
            clear_leftovers(disk)
            self._settle()
            self._finish_erasure()
        except OSError as error:
            raise StoreError(f"the store at {where} cannot be opened ({error.strerror})") from error

    @classmethod
    def in_folder(cls: type[_Files], folder: Path, key: bytes, *, entropy: Entropy = system_entropy) -> _Files:
        """The store in a folder, locked until `close`.

        Args:
            folder: created if missing, readable by its owner only.
            key: 32 bytes.
            entropy: see the class.

        Raises:
            StoreError: another process has it open, it belongs to another user or others may write to it, or it
                cannot be opened.
        """
        lock = _locked(folder)
        try:
            return cls(SystemDisk(folder), key, entropy=entropy, where=str(folder), on_close=lambda: os.close(lock))
        except BaseException:
            os.close(lock)
            raise

    def close(self) -> None:
        """Let another process open the store."""
        self._on_close()

    def read(self, name: str) -> bytes | None:
        """The decrypted blob, or None."""
        with self._told(name, "read from"):
            raw = self._disk.read(_checked(name))
            if raw is None:
                return None
            key = self._key_of(name)
        try:
            return key.decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], name.encode())
        except (InvalidTag, ValueError):
            raise StoreError(f"{name} in {self._where} was changed, or the store key is another one") from None

    def write(self, name: str, data: bytes) -> None:
        """Encrypt and durably replace."""
        _checked(name)
        with self._told(name, "written to"):
            sealed = self._sealed(self._key_of(name), data, name.encode())
            self._make_folder(name)
            write_atomic(self._disk, name, sealed)

    def delete(self, name: str) -> None:
        """Durably remove."""
        with self._told(name, "deleted from"):
            remove_durably(self._disk, _checked(name))
        self._ends.pop(name, None)

    def names(self, prefix: str) -> Iterable[str]:
        """Names that begin with `prefix`, sorted."""
        with self._told(prefix, "listed in"):
            return [name for name in self._disk.names(prefix) if _NAME.fullmatch(name)]

    def read_log(self, name: str) -> bytes:
        """The log's bytes."""
        with self._told(name, "read from"):
            return self._disk.read(_checked(name)) or b""

    def append_log(self, name: str, line: bytes) -> None:
        """Append a line and sync."""
        with self._told(name, "appended to in"):
            append_durably(self._disk, _checked(name), line + b"\n")

    def truncate_log(self, name: str, length: int) -> None:
        """Cut and sync."""
        with self._told(name, "cut in"):
            self._disk.truncate(_checked(name), length)
            self._disk.sync(name)

    def frames(self, name: str) -> list[bytes]:
        """Every frame of a file, decrypted."""
        raw = self._read_frames(_checked(name))
        if raw is None:
            return []
        with self._told(name, "read from"):
            key = self._key_of(name)
        known = self._ends.get(name)
        found, end = open_frames(key, name, raw if known is None else raw[: known[1]])
        if known is not None and known != (len(found), end):
            raise DamagedFramesError(f"{name} in {self._where} was changed or damaged at byte {end}")
        self._ends[name] = len(found), end
        return found

    def append_frame(self, name: str, number: int, data: bytes) -> None:
        """Append a frame and sync; what a torn append left behind the last frame is cut off."""
        if number and name not in self._ends:
            self.frames(name)
        count, end = self._ends.get(name, (0, 0))
        if number != count:
            raise LocalMisuseError(f"{name}: expected frame {count} next, got {number}")
        with self._told(_checked(name), "appended to in"):
            frame = seal_frame(self._key_of(name), name, number, data, nonce=self.entropy(NONCE_BYTES))
            self._make_folder(name)
            size = self._disk.size(name) or 0
            if size < end:
                raise DamagedFramesError(f"{name} in {self._where} is shorter than what was written to it")
            if size > end:
                self._disk.truncate(name, end)
            append_durably(self._disk, name, frame)
        self._ends[name] = number + 1, end + len(frame)

    def set_aside(self, name: str, new: str) -> None:
        """Durably rename; frames do not open under another name."""
        _checked(new)
        with self._told(_checked(name), "set aside in"):
            self._make_folder(new)
            self._disk.rename(name, new)
            for folder in sorted({_folder(name), _folder(new)}):
                self._disk.sync_folder(folder)
        self._ends.pop(name, None)

    def shred(self, scope: str) -> None:
        """Destroy the data key, then remove what it encrypted; the next write makes a new key.

        A power cut at any moment leaves the data as it was, or nothing that can be read; the next opening finishes.

        Args:
            scope: `DATA_SCOPE`, the only one.

        Raises:
            LocalMisuseError: another scope.
            StoreError: the disk refuses; try again.
        """
        if scope != DATA_SCOPE:
            raise LocalMisuseError(f"scope: expected {DATA_SCOPE!r}, got {scope!r}")
        with self._told("the wearer's data", "erased from"):
            self._data_aead = None
            self._ends.clear()
            # The renamed key is the tombstone: a rename needs no room on a full disk, and an opening that finds it
            # finishes.
            if self._disk.size(_DATA_KEY) is not None:
                self._disk.rename(_DATA_KEY, _SHREDDED_KEY)
            elif self._disk.size(_SHREDDED_KEY) is None:
                self._disk.write(_SHREDDED_KEY, b"")
                self._disk.sync(_SHREDDED_KEY)
            self._disk.sync_folder()
            self._finish_erasure()

    def shred_all(self, destroy_key: Callable[[], None] = lambda: None) -> None:
        """Remove everything, logs too; then only `close` makes sense.

        Args:
            destroy_key: destroys the store's own key, wherever it is kept; called once an opening would finish the
                removal, whatever key it is given.

        Raises:
            StoreError: the disk refuses; try again, or open the store again, which finishes it.
        """
        self.shred(DATA_SCOPE)
        with self._told("everything", "erased from"):
            self._disk.write(_ERASING, b"")
            self._disk.sync(_ERASING)
            self._disk.sync_folder()
            destroy_key()
            self._finish_erasure()

    def _settle(self) -> None:
        """Make durable what a killed process left in the system's memory."""
        names = self._disk.names()
        for name in names:
            self._disk.sync(name)
        self._sync_folders({"", *map(_folder, names)})

    def _finish_erasure(self) -> None:
        """Do what is left of a shredding that has begun; nothing where none has."""
        if self._disk.size(_SHREDDED_KEY) is not None:
            self._overwrite(_SHREDDED_KEY)
            self._remove(name for name in self._disk.names() if _in_data_scope(name))
            remove_durably(self._disk, _SHREDDED_KEY)
        if self._disk.size(_ERASING) is not None:
            names = [name for name in self._disk.names() if name not in (_ERASING, _LOCK)]
            for name in names:
                self._overwrite(name)
            self._remove(names)
            remove_durably(self._disk, _ERASING)

    def _overwrite(self, name: str) -> None:
        """Durably overwrite in place; the module says what that is worth."""
        self._disk.write_at(name, 0, bytes(self._disk.size(name) or 0))
        self._disk.sync(name)

    def _remove(self, names: Iterable[str]) -> None:
        """Durably remove files."""
        folders = set()
        for name in list(names):
            self._disk.remove(name)
            folders.add(_folder(name))
        self._sync_folders(folders)

    def _sync_folders(self, folders: Iterable[str]) -> None:
        """Sync these folders and all that may have become empty: a process that was killed, or a removal that was
        refused half-way, may have left a file gone from sight and not from the disk.
        """
        for folder in sorted({*folders, *_FOLDERS}):
            with suppress(FileNotFoundError, NotADirectoryError):
                self._disk.sync_folder(folder)

    def _key_of(self, name: str) -> AESGCM:
        """What a name is encrypted under."""
        return self._data_key() if _in_data_scope(name) else self._aead

    def _data_key(self) -> AESGCM:
        """The data key, made where there is none yet. Raises StoreError, and OSError where none can be made."""
        if self._data_aead is None:
            self._finish_erasure()
            raw = self._disk.read(_DATA_KEY)
            if raw is None:
                key = self._make_data_key()
            else:
                try:
                    key = self._aead.decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], _KEY_BOUND)
                except (InvalidTag, ValueError):
                    raise StoreError(
                        f"the key of the wearer's data in {self._where} was changed, or the store key is another one"
                    ) from None
            self._data_aead = AESGCM(key)
        return self._data_aead

    def _make_data_key(self) -> bytes:
        """A new data key, durable. Raises StoreError if there are files that another one encrypted."""
        if any(_in_data_scope(name) for name in self._disk.names()):
            raise StoreError(
                f"the key of the wearer's data is missing from {self._where}, so the data cannot be read any more; "
                "put the key back, or run covey-device erase --data"
            )
        key = self.entropy(KEY_BYTES)
        write_atomic(self._disk, _DATA_KEY, self._sealed(self._aead, key, _KEY_BOUND))
        return key

    def _sealed(self, aead: AESGCM, data: bytes, bound: bytes) -> bytes:
        """Nonce, ciphertext and tag."""
        nonce = self.entropy(NONCE_BYTES)
        return nonce + aead.encrypt(nonce, data, bound)

    def _make_folder(self, name: str) -> None:
        """Durably make the folder that a name is in."""
        folder = _folder(name)
        if folder and folder not in self._folders:
            self._disk.make_folder(folder)
            self._disk.sync_folder()
            self._folders.add(folder)

    def _read_frames(self, name: str) -> bytes | None:
        """A file's bytes. Raises DamagedFramesError where the medium cannot read them, StoreError otherwise."""
        try:
            return self._disk.read(name)
        except OSError as error:
            kind = DamagedFramesError if error.errno == errno.EIO else StoreError
            raise kind(f"{name} cannot be read from {self._where} ({error.strerror})") from error

    @contextmanager
    def _told(self, name: str, what: str) -> Iterator[None]:
        """Turn the disk's errors into a sentence."""
        try:
            yield
        except OSError as error:
            raise StoreError(f"{name} cannot be {what} {self._where} ({error.strerror})") from error


def _locked(folder: Path) -> int:
    """The descriptor that locks a folder, which is made where there is none. Raises StoreError."""
    try:
        if not folder.exists():
            folder.mkdir(mode=0o700, parents=True)
            fsync_folder(folder.parent)
        _check_owner(folder)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"the store at {folder} cannot be opened ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise StoreError(f"the store at {folder} is in use by another process; stop that one first") from None
        raise StoreError(f"the store at {folder} cannot be locked ({error.strerror})") from error
    return lock


def _check_owner(folder: Path) -> None:
    """Refuse a folder of another user, and one that others may write to. Raises StoreError, and OSError."""
    found, uid = folder.stat(), os.geteuid()
    # What root writes into another user's store, that user could not replace any more.
    if found.st_uid != uid:
        owner = _user_name(found.st_uid)
        raise StoreError(
            f"the store at {folder} belongs to {owner}, and this process runs as {_user_name(uid)}: run it as that "
            f"user (sudo -u {owner} ...)"
        )
    # Security: whoever may write to a folder may exchange its files for old copies of them.
    if found.st_mode & 0o022:
        raise StoreError(f"the store at {folder} can be changed by others; run chmod 700 on it")


def _user_name(uid: int) -> str:
    """A user's name; where there is none, the number as a shell hands it to sudo."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"'#{uid}'"


def _checked(name: str) -> str:
    """The name; one that could leave the folder is refused."""
    if not _NAME.fullmatch(name):
        raise StoreError(f"expected a store name such as outbox/0a1b, got {name!r}")
    return name


def _folder(name: str) -> str:
    """The folder that a name is in."""
    return name.rpartition("/")[0]


def _in_data_scope(name: str) -> bool:
    """Whether a name is the wearer's data."""
    return name.split("/", maxsplit=1)[0] in DATA_FOLDERS
