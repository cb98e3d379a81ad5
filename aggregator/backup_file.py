"""The file of a backup: a tar of rows as JSON lines, large values, and at its end a manifest with every digest.

It holds what any database can take, so that a backup of SQLite can be restored into PostgreSQL and back. It never
holds a round's private key, nor anything that such a key opens: what was erased stays erased, and what is going on when
the backup is made can be given up but not read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec
from sqlalchemy import Column, LargeBinary, Table

from aggregator.errors import DatabaseError
from aggregator.store import schema

MANIFEST = "manifest.json"
ROWS, BLOBS = "rows/", "blobs/"
LEFT_OUT = {
    schema.partials,  # sums of the open round, under its key
    schema.leases,
    schema.workers,
}
TABLES: tuple[Table, ...] = tuple(table for table in schema.metadata.sorted_tables if table not in LEFT_OUT)
"""What is backed up."""

ERASED: dict[str, dict[str, None]] = {
    "rounds": {"secret": None, "sums_secret": None},
    "updates": {"segment": None, "start": None, "length": None},  # sealed under that key
}
"""Columns of which no value is backed up."""
ERASED_EARLIER: dict[str, dict[str, None]] = {"updates": {"change": None}}
"""The same, of tables as they once were: an update itself."""

_BLOCK_BYTES = 2**20


class MemberMsg(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file in the tar."""

    num_bytes: int
    sha256: str


class ManifestMsg(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is in a backup.

    Args:
        format: of the file.
        revision: of the database's schema.
        software: version that made it.
        created_s: Unix seconds; the moment that the rows show.
        members: every other file.
        pruned: blobs that rows name and that were pruned while the backup was made.
    """

    format: Literal[1]
    revision: str
    software: str
    created_s: float
    members: dict[str, MemberMsg]
    pruned: list[str]


def encode_row(row: Mapping[str, Any]) -> bytes:
    """A row as a line; bytes in base64."""
    return msgspec.json.encode(dict(row)) + b"\n"


def decode_row(table: Table, line: bytes) -> dict[str, Any]:
    """The inverse of `encode_row`.

    Raises:
        DatabaseError: it is no row of this table.
    """
    try:
        row = json.loads(line)
        return {name: _value(table.c[name], value) for name, value in row.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatabaseError(f"the backup has a line that is no row of the table {table.name} ({error!r})") from error


def _value(column: Column[Any], value: Any) -> Any:
    """A value as the database takes it."""
    if value is None or not isinstance(column.type, LargeBinary):
        return value
    return base64.b64decode(value, validate=True)


class BackupFile:
    """A backup that was read from its first byte to its last, and is whole.

    Args:
        path: of the file.
        revision: of the schema that is wanted.

    Raises:
        DatabaseError: it cannot be read, is damaged or not whole, or is of another schema.
    """

    def __init__(self, path: Path, *, revision: str) -> None:
        self.path = path
        with _translated(path):
            self.manifest = _verified(path)
        if self.manifest.revision != revision:
            raise DatabaseError(
                f"the backup {path} is of a database of revision {self.manifest.revision}, and this software has "
                f"revision {revision}; restore it with the software of that revision, then run covey-aggregator "
                "upgrade with this one"
            )

    def rows(self, table: Table) -> Iterator[dict[str, Any]]:
        """The rows of a table, in order."""
        with _translated(self.path):
            for name, file in _members(self.path):
                if name == f"{ROWS}{table.name}.jsonl":
                    yield from (decode_row(table, line) for line in file)

    def blobs(self) -> Iterator[tuple[str, bytes]]:
        """Every large value with its old name, one at a time in memory."""
        with _translated(self.path):
            for name, file in _members(self.path):
                if name.startswith(BLOBS):
                    yield name.removeprefix(BLOBS), file.read()


def _verified(path: Path) -> ManifestMsg:
    """The manifest, if all the rest is as it says."""
    found: dict[str, MemberMsg] = {}
    manifest = None
    for name, file in _members(path):
        if manifest is not None or name in found:
            raise DatabaseError(f"the backup {path} was changed: {name} does not belong there; use another backup")
        if name == MANIFEST:
            manifest = _decoded(path, file.read())
        else:
            found[name] = digest_of(file)
    if manifest is None:
        raise DatabaseError(f"the backup {path} is not whole: it has no manifest at its end; use another backup")
    wrong = sorted(name for name in {*found, *manifest.members} if found.get(name) != manifest.members.get(name))
    if wrong:
        raise DatabaseError(
            f"the backup {path} is damaged: {wrong[0]} is not what was backed up ({len(wrong)} such files); use "
            "another backup"
        )
    return manifest


def _decoded(path: Path, data: bytes) -> ManifestMsg:
    """The manifest in its form."""
    try:
        return msgspec.json.decode(data, type=ManifestMsg)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DatabaseError(f"the backup {path} has a manifest that this version cannot read ({error})") from error


def digest_of(file: BinaryIO) -> MemberMsg:
    """Length and SHA-256 of what is left of a file."""
    digest, num_bytes = hashlib.sha256(), 0
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
        num_bytes += len(block)
    return MemberMsg(num_bytes, digest.hexdigest())


def _members(path: Path) -> Iterator[tuple[str, BinaryIO]]:
    """Names and contents of a tar's files, in order."""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None:
                raise DatabaseError(f"the backup {path} was changed: {member.name} is no file; use another backup")
            yield member.name, file  # type: ignore[misc]  # the standard library says IO[bytes]


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Errors of the file and its form as ours."""
    try:
        yield
    except OSError as error:
        raise DatabaseError(f"the backup {path} cannot be read ({error.strerror or error})") from error
    except (tarfile.TarError, EOFError) as error:
        raise DatabaseError(f"the backup {path} is damaged, or no backup ({error}); use another backup") from error
