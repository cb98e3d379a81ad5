"""What a command writes: nothing that was not meant is overwritten, and this is said before hours of work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fl_protocol.adapters.files import write_atomic
from fl_protocol.errors import LocalMisuseError
from models.publisher import PUBLIC_KEY_FILE


def check_targets(targets: Sequence[Path], *, others: Sequence[Path] = (), force: bool) -> None:
    """The files can be written, and are not what the command reads or writes otherwise.

    Args:
        targets: files that will be written; the first has ``publisher.pub`` written beside it.
        others: files that the command reads.
        force: whether existing files may be replaced.

    Raises:
        LocalMisuseError: one cannot be written, or is another one.
    """
    taken = {path.resolve() for path in others} | {(targets[0].parent / PUBLIC_KEY_FILE).resolve()}
    for path in targets:
        if path.resolve() in taken:
            raise LocalMisuseError(f"{path} is used for something else by the same command: name another file.")
        taken.add(path.resolve())
        if path.is_dir():
            raise LocalMisuseError(f"{path} is a folder: name a file in it.")
        if path.exists() and not force:
            raise LocalMisuseError(f"{path} exists: name another file, or give --force.")
        make_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder that can be written to. Raises LocalMisuseError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalMisuseError(f"{folder} cannot be made ({error.strerror}): name another file.") from error
    if not os.access(folder, os.W_OK):
        raise LocalMisuseError(f"{folder} cannot be written to: name another file.")


def write(path: Path, data: bytes) -> None:
    """Write a file that others may read, whole or not at all. Raises LocalMisuseError."""
    try:
        write_atomic(path, data, mode=0o644)
    except OSError as error:
        raise LocalMisuseError(f"{path} cannot be written ({error.strerror}): name another file.") from error
