"""`aggregator.store.blobs.Blobs` in a folder of this machine: a file each, synced before its name is given away.

Files can be read by their owner only. A file that was being written when the machine stopped is listed too, so that
it is collected like any blob that no row names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aggregator.errors import BlobError, MissingBlobError
from aggregator.store.blobs import StoredBlob, checked_blob_name, new_blob_name
from fl_protocol.adapters.files import SystemDisk, fsync_folder
from fl_protocol.durable import write_atomic


class LocalBlobs:
    """See the module docstring.

    Args:
        folder: made if there is none, with a subfolder for each kind.
        entropy: for names.

    Raises:
        BlobError: from every method, when the folder cannot be read or written.
    """

    def __init__(self, folder: Path, *, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._disk, self._entropy = SystemDisk(folder), entropy
        self._folders: set[str] = set()
        with _translated(f"the folder of blobs {folder} cannot be made"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fsync_folder(folder.parent)

    def put(self, data: bytes, *, kind: str) -> str:
        """Write and sync a file, then its name."""
        name = new_blob_name(kind, self._entropy)
        with _translated(f"a blob of {len(data)} bytes cannot be written to {self._disk.folder}"):
            if kind not in self._folders:
                self._disk.make_folder(kind)
                self._disk.sync_folder()  # also where another process made it just now
                self._folders.add(kind)
            write_atomic(self._disk, name, data)
        return name

    def get(self, name: str) -> bytes:
        """The whole file."""
        with _translated(f"the blob {name} cannot be read"):
            data = self._disk.read(checked_blob_name(name))
            is_empty = data is None and not any(self._disk.folder.iterdir())
        if data is None:
            # An empty folder is one where nothing is mounted: what is missing may come back.
            kind = BlobError if is_empty else MissingBlobError
            raise kind(f"the blob {name} is not in {self._disk.folder}; was the folder moved, or is it another?")
        return data

    def delete(self, names: Iterable[str]) -> None:
        """Unlink; not synced, since a name that comes back is collected again."""
        for name in names:
            with _translated(f"the blob {name} cannot be removed"):
                self._disk.remove(checked_blob_name(name))

    def stored(self) -> Iterator[StoredBlob]:
        """Every file, interrupted ones too; others' files are passed over."""
        with _translated(f"the folder of blobs {self._disk.folder} cannot be listed"):
            for folder in os.scandir(self._disk.folder):
                yield from _files(folder) if folder.is_dir(follow_symlinks=False) else ()


def _files(folder: os.DirEntry[str]) -> Iterator[StoredBlob]:
    """The blobs of one kind; one that is removed meanwhile is left out."""
    for file in os.scandir(folder):
        name = f"{folder.name}/{file.name}"
        try:
            found = file.stat(follow_symlinks=False)
            yield StoredBlob(checked_blob_name(name), found.st_mtime, found.st_size)
        except (FileNotFoundError, BlobError):
            continue


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """The system's errors as ours."""
    try:
        yield
    except OSError as error:
        raise BlobError(f"{what} ({error.strerror})") from error
