"""Which names a flash's file system takes, and what it refuses: for every flash in memory, whatever a file is to it.

The errors are those of POSIX, as the operating system raises them (`tests/contracts/test_disk.py`). No I/O.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Sequence
from typing import Generic, TypeVar

File = TypeVar("File")


class FlashFiles(Generic[File]):
    """Files by name, and the folders that they are in.

    Attributes:
        read_only: refuse every change with EROFS, as a worn-out card does; may be set at any time.
    """

    def __init__(self, files: dict[str, File], *, read_only: bool) -> None:
        self.read_only, self._files = read_only, files
        self._folders = {"", *(folder for name in files for folder in ancestors(name))}

    def names(self, prefix: str = "") -> Sequence[str]:
        """All files, sorted."""
        self._powered()
        return sorted(name for name in self._files if name.startswith(prefix))

    def _new_folders(self, name: str) -> frozenset[str]:
        """What making a folder makes, with those that it is in."""
        wanted = ancestors(name) | {name}
        for folder in sorted(wanted & self._files.keys()):
            raise file_error(errno.EEXIST if folder == name else errno.ENOTDIR, folder)
        if not wanted <= self._folders:
            self._refuse_read_only(name)
        return wanted

    def _require_folder(self, name: str) -> None:
        """Refuse what is no folder."""
        if name not in self._folders:
            raise file_error(errno.ENOTDIR if name in self._files else errno.ENOENT, name)

    def _look(self, name: str) -> File | None:
        """The file of a name, if there is one."""
        self._powered()
        if (file := self._files.get(name)) is not None:  # then no folder goes by its name, and all above it are folders
            return file
        if name in self._folders:
            raise file_error(errno.EISDIR, name)
        for folder in ancestors(name):
            if folder in self._files:
                raise file_error(errno.ENOTDIR, name)
        return None

    def _existing(self, name: str) -> File:
        """The file of a name. Raises FileNotFoundError."""
        file = self._look(name)
        if file is None:
            raise file_error(errno.ENOENT, name)
        return file

    def _place(self, name: str) -> None:
        """Refuse a name where no file can be."""
        if self._look(name) is None and folder_of(name) not in self._folders:
            raise file_error(errno.ENOENT, name)

    def _writable(self, name: str) -> None:
        """Refuse to write where nothing can be written."""
        self._place(name)
        self._refuse_read_only(name)

    def _refuse_read_only(self, name: str) -> None:
        """Refuse any change of a read-only disk."""
        self._powered()
        if self.read_only:
            raise file_error(errno.EROFS, name)

    def _powered(self) -> None:
        """Whether anything works at all; a flash whose power can go says so here."""


_strerror = functools.cache(os.strerror)


def file_error(number: int, name: str) -> OSError:
    """As the operating system raises it."""
    return OSError(number, _strerror(number), name)


@functools.lru_cache(maxsize=4096)
def folder_of(name: str) -> str:
    """The folder that a name is in."""
    return name.rpartition("/")[0]


@functools.lru_cache(maxsize=4096)
def ancestors(name: str) -> frozenset[str]:
    """All folders that a name is in, but the root."""
    parts = name.split("/")
    return frozenset("/".join(parts[:end]) for end in range(1, len(parts)))
