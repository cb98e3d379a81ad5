"""The log as a file that anybody can verify: JSON lines, each entry's bytes as they are, checkpoints where they belong.

{"covey_audit":1,"origin":"covey/clinic","entries":3}
{"action":"task.created", ...}
{"action":"round.opened", ...}
{"checkpoint":"covey/clinic\\n2\\n..."}
{"action":"round.closed", ...}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
from sqlalchemy import Connection, inspect

from aggregator.audit.checkpoint_rows import stored_notes
from aggregator.audit.checkpoints import CheckpointError, Note, parse_note
from aggregator.audit.entries import LONGEST_ENTRY_BYTES, AuditError
from aggregator.audit.log import StoredEntry, log_size, stored_entries
from aggregator.audit.verification import LogKeys, LogVerifier, Verified
from aggregator.store import schema
from aggregator.store.database import Database
from fl_protocol.errors import ConfigError

Progress = Callable[[int, int], None]
"""Called with how many entries are done, and how many there are."""
_TELL_EVERY = 5000
_LONGEST_LINE = 2 * LONGEST_ENTRY_BYTES


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line of an export."""

    covey_audit: int
    origin: str
    entries: int


class CheckpointLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint in an export."""

    checkpoint: str


def verify_database(
    database: Database, keys: LogKeys, *, kept: Iterable[Note] = (), progress: Progress = lambda _done, _all: None
) -> Verified:
    """Verify the log in a database, as of one moment.

    Args:
        database: with the log.
        keys: whom it is verified against.
        kept: checkpoints that somebody kept elsewhere, which have to fit as well.
        progress: for people.

    Raises:
        DatabaseError: it cannot be read.
    """
    with database.reading() as connection:
        return verify_log(connection, keys, kept=kept, progress=progress)


def verify_log(
    connection: Connection,
    keys: LogKeys,
    *,
    kept: Iterable[Note] = (),
    progress: Progress = lambda _done, _all: None,
) -> Verified:
    """The same within the caller's transaction; a database from before there was a log has an empty one."""
    verifier = LogVerifier(keys)
    if not inspect(connection).has_table(schema.audit_entries.name):
        return verifier.finish()
    total = log_size(connection)
    try:
        for one in merged(connection, kept):
            if isinstance(one, Note):
                verifier.note(one)
            else:
                verifier.entry(one.entry, leaf=one.leaf, listed=one[:5])
                if verifier.size % _TELL_EVERY == 0:
                    progress(verifier.size, total)
            if verifier.is_done:
                break
    except AuditError as error:
        verifier.bad_note(str(error))
    progress(verifier.size, total)
    return verifier.finish()


def merged(connection: Connection, kept: Iterable[Note] = ()) -> Iterator[StoredEntry | Note]:
    """All entries in order, each checkpoint after the last entry that it covers."""
    notes = _in_order(stored_notes(connection), sorted(kept, key=_size))
    waiting = next(notes, None)
    for count, row in enumerate(stored_entries(connection)):
        while waiting is not None and waiting.checkpoint.size <= count:
            yield waiting
            waiting = next(notes, None)
        yield row
    while waiting is not None:
        yield waiting
        waiting = next(notes, None)


def export_log(
    database: Database, origin: str, file: BinaryIO, *, progress: Progress = lambda _done, _all: None
) -> int:
    """Write the log to a file, as of one moment; how many entries.

    Args:
        database: with the log; it is not verified.
        origin: of the log.
        file: that is written to.
        progress: for people.
    """
    count = 0
    with database.reading() as connection:
        total = log_size(connection)
        file.write(msgspec.json.encode(Header(1, origin, total)) + b"\n")
        for one in merged(connection):
            if isinstance(one, Note):
                file.write(msgspec.json.encode(CheckpointLine(one.text)) + b"\n")
                continue
            file.write(one.entry + b"\n")
            count += 1
            if count % _TELL_EVERY == 0:
                progress(count, total)
    progress(count, total)
    return count


def verify_file(
    path: Path, keys: LogKeys, *, kept: Iterable[Note] = (), progress: Progress = lambda _done, _all: None
) -> Verified:
    """Verify an export.

    Args:
        path: of the file.
        keys: whom it is verified against.
        kept: checkpoints that somebody kept elsewhere, which have to fit as well.
        progress: for people.

    Raises:
        ConfigError: it cannot be read.
        AuditError: it is no export of this log.
    """
    verifier, more = LogVerifier(keys), sorted(kept, key=_size)
    try:
        with path.open("rb") as file:
            header = _header(file.readline(_LONGEST_LINE), keys.origin)
            while (line := file.readline(_LONGEST_LINE)) and not verifier.is_done:
                if line.startswith(b'{"checkpoint":'):
                    _take_note(verifier, line)
                    continue
                while more and _size(more[0]) <= verifier.size:
                    verifier.note(more.pop(0))
                verifier.entry(line.removesuffix(b"\n"))
                if verifier.size % _TELL_EVERY == 0:
                    progress(verifier.size, header.entries)
    except OSError as error:
        raise ConfigError(f"the export {path} cannot be read ({error.strerror})") from error
    for note in more:
        verifier.note(note)
    progress(verifier.size, header.entries)
    return verifier.finish(told_entries=header.entries)


def _take_note(verifier: LogVerifier, line: bytes) -> None:
    """A checkpoint's line; one that cannot be read is one that no log has signed."""
    try:
        note = parse_note(msgspec.json.decode(line, type=CheckpointLine).checkpoint)
    except (msgspec.MsgspecError, CheckpointError) as error:
        verifier.bad_note(f"expected a checkpoint; {error}")
    else:
        verifier.note(note)


def _header(line: bytes, origin: str) -> Header:
    """The first line."""
    try:
        header = msgspec.json.decode(line, type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise AuditError(f"expected an export of covey-aggregator audit export; {error}") from error
    if (header.covey_audit, header.origin) != (1, origin):
        raise AuditError(
            f"expected an export of {origin}, version 1; got {header.origin[:100]}, version {header.covey_audit}"
        )
    return header


def _size(note: Note) -> int:
    """Entries under a checkpoint."""
    return note.checkpoint.size


def _in_order(stored: Iterator[Note], kept: list[Note]) -> Iterator[Note]:
    """Two rows of checkpoints as one."""
    for note in stored:
        while kept and _size(kept[0]) <= _size(note):
            yield kept.pop(0)
        yield note
    yield from kept
