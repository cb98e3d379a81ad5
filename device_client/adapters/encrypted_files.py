"""The store on a file system: each blob one AES-256-GCM file (`cryptography`), replaced atomically and fsynced.

The file's name is bound as associated data, so files cannot be swapped. Logs are appended in the clear: the ledger
holds nothing about the wearer but what was spent, and a wearer should be able to read it.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from device_client.errors import StoreError
from fl_protocol.adapters.files import append_durably, fsync_folder, write_atomic

KEY_BYTES = 32
_NONCE_BYTES = 12
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9]+)?(/[a-z0-9_-]+(\.[a-z0-9]+)?)?")


class EncryptedFiles:
    """`device_client.ports.Store` in one folder; one process at a time.

    Args:
        folder: created if missing, readable by its owner only.
        key: 32 bytes; whoever has it can read everything here.
    """

    def __init__(self, folder: Path, key: bytes) -> None:
        self._folder = folder
        self._aead = AESGCM(key)
        try:
            if not folder.exists():
                folder.mkdir(mode=0o700, parents=True)
                fsync_folder(folder.parent)
            self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"the store at {folder} cannot be opened ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in folder.rglob(".*.tmp"):  # a write that a power cut interrupted
                leftover.unlink()
        except BlockingIOError:
            self.close()
            raise StoreError(f"the store at {folder} is in use by another process; stop that one first") from None
        except OSError as error:
            self.close()
            raise StoreError(f"the store at {folder} cannot be opened ({error.strerror})") from error

    def close(self) -> None:
        """Let another process open the store."""
        os.close(self._lock)

    def read(self, name: str) -> bytes | None:
        """The decrypted blob, or None."""
        try:
            raw = self._path(name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{name} cannot be read from {self._folder} ({error.strerror})") from error
        try:
            return self._aead.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], name.encode())
        except (InvalidTag, ValueError):
            raise StoreError(f"{name} in {self._folder} was changed, or the store key is another one") from None

    def write(self, name: str, data: bytes) -> None:
        """Encrypt and durably replace."""
        path = self._path(name)
        nonce = os.urandom(_NONCE_BYTES)
        try:
            if not path.parent.exists():
                path.parent.mkdir(mode=0o700)
                fsync_folder(self._folder)
            write_atomic(path, nonce + self._aead.encrypt(nonce, data, name.encode()))
        except OSError as error:
            raise StoreError(f"{name} cannot be written to {self._folder} ({error.strerror})") from error

    def delete(self, name: str) -> None:
        """Durably unlink."""
        path = self._path(name)
        try:
            path.unlink(missing_ok=True)
            if path.parent.exists():
                fsync_folder(path.parent)
        except OSError as error:
            raise StoreError(f"{name} cannot be deleted from {self._folder} ({error.strerror})") from error

    def names(self, prefix: str) -> Iterable[str]:
        """Names that begin with `prefix`, sorted."""
        found = (path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file())
        return sorted(name for name in found if name.startswith(prefix) and _NAME.fullmatch(name))

    def read_log(self, name: str) -> bytes:
        """The log's bytes."""
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise StoreError(f"{name} cannot be read from {self._folder} ({error.strerror})") from error

    def append_log(self, name: str, line: bytes) -> None:
        """Append a line and fsync."""
        try:
            append_durably(self._path(name), line + b"\n")
        except OSError as error:
            raise StoreError(f"{name} cannot be appended to in {self._folder} ({error.strerror})") from error

    def truncate_log(self, name: str, length: int) -> None:
        """Cut and fsync."""
        try:
            with self._path(name).open("r+b") as stream:
                stream.truncate(length)
                os.fsync(stream.fileno())
        except OSError as error:
            raise StoreError(f"{name} cannot be cut in {self._folder} ({error.strerror})") from error

    def _path(self, name: str) -> Path:
        """Where a name lives; names that could leave the folder are refused."""
        if not _NAME.fullmatch(name):
            raise StoreError(f"expected a store name such as outbox/0a1b, got {name!r}")
        return self._folder / name
