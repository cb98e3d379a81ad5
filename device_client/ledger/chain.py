"""The ledger's log and the counter that is kept apart from it: nothing is changed or taken away unnoticed.

The counter holds the number of lines and the hash of the last one. A line is durable in the log before the counter
counts it, and counted before anything is released for it. So a power cut leaves the log ahead by at most one line; and
whatever stands beyond the counted lines was never acted upon: one whole line stays charged, anything else was torn and
is cut off. A log that ends before the counter does is an old copy.

Opening only reads; what a power cut left is put right before the next line is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import msgspec

from device_client.errors import LedgerError
from device_client.ledger.lines import FORMAT, GENESIS, Acceptance, Line, decode_line, digest_of, encode_line

LOG_NAME = "ledger.jsonl"
_REMEDY = (
    "nothing is trained. Put back what is missing; or accept the ledger as it stands with `covey-device ledger "
    "accept-counter`: the rest of this period then counts as spent"
)


class LogStore(Protocol):
    """An append-only file; the part of `device_client.ports.Store` that the ledger needs."""

    def read_log(self, name: str) -> bytes:
        """All of a log, empty if there is none.

        What is returned must be durable: a process that was killed may have left a line in the system's memory.
        """

    def append_log(self, name: str, line: bytes) -> None:
        """Durably append one line (without its newline). Raises StoreError."""

    def truncate_log(self, name: str, length: int) -> None:
        """Durably cut a log to its first `length` bytes. Raises StoreError."""


class Counter(Protocol):
    """A few bytes kept apart from the store, such that putting an old store back does not put them back.

    `device_client.adapters.counter_file.CounterFile` on a disk.
    """

    def read(self) -> bytes | None:
        """What was last advanced to, None if nothing ever was.

        Raises:
            LedgerError: it was changed or belongs to another store.
            StoreError: it cannot be read now.
        """

    def advance(self, data: bytes) -> None:
        """Durably replace it, at most 128 bytes; after a power cut it is the old one or the new. Raises StoreError."""


class Count(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the counter holds: how many lines the log has at least, hash and time of the last of those."""

    format: Literal[1]
    lines: Annotated[int, msgspec.Meta(ge=0)]
    digest: str
    at_s: float | None


@dataclass(frozen=True)
class Written:
    """A log and its counter as they were found.

    Args:
        lines: the log's, which hold together.
        length_bytes: how much of the file they take.
        digests: of the empty log and after each line.
        count: what the counter said.
        fault: why the two do not fit, None if they do.
    """

    lines: list[Line]
    length_bytes: int
    digests: list[str]
    count: Count | None
    fault: str | None


class CountedLog:
    """The log, open for appending.

    Args:
        store, counter: where log and count are.
        written: what `read_log` found there.
    """

    def __init__(self, store: LogStore, counter: Counter, written: Written) -> None:
        self._store, self._counter = store, counter
        self.lines = written.lines
        self.head = written.digests[-1]
        self._length_bytes = written.length_bytes
        # Counted again in any case: a killed process may have left the count in the system's memory only.
        self._is_counted = False
        self._ends_as_known = False  # something torn may follow

    def write(self, line: Line) -> None:
        """Durably append a line, which names `head` as the one before; `count` has to follow.

        Raises:
            StoreError: a disk did not take it; whether it is in the log is found out before the next one.
            LedgerError: the log lost lines while it was open.
        """
        self._cut_off_what_was_torn()
        self.settle()  # so that the log is never ahead by more than one line
        self._append(line)

    def write_acceptance(self, line: Acceptance) -> None:
        """Durably append and count a person's acceptance; the counter vouches for nothing before. Raises as `write`."""
        self._cut_off_what_was_torn()
        self._append(line)
        self.count()

    def settle(self) -> None:
        """Durably count what is written, if it is not yet. Raises StoreError."""
        if not self._is_counted:
            self.count()

    def count(self) -> None:
        """Durably count all lines that are written. Raises StoreError; the next `write` then counts them first."""
        at_s = self.lines[-1].at_s if self.lines else None
        self._is_counted = False
        self._counter.advance(msgspec.msgpack.encode(Count(FORMAT, len(self.lines), self.head, at_s)))
        self._is_counted = True

    def _append(self, line: Line) -> None:
        """Durably append."""
        data = encode_line(line)
        self._ends_as_known = False
        self._store.append_log(LOG_NAME, data)
        self._ends_as_known = True
        self.lines.append(line)
        self.head = digest_of(data)
        self._length_bytes += len(data) + 1
        self._is_counted = False

    def _cut_off_what_was_torn(self) -> None:
        """After opening, and after a write that failed, the file may be longer than what holds together."""
        if self._ends_as_known:
            return
        length_bytes = len(self._store.read_log(LOG_NAME))
        if length_bytes < self._length_bytes:
            raise LedgerError("the ledger was cut while it was in use; nothing is trained until a person has looked")
        if length_bytes > self._length_bytes:
            self._store.truncate_log(LOG_NAME, self._length_bytes)
        self._ends_as_known = True


def open_log(store: LogStore, counter: Counter) -> CountedLog:
    """The log whose counter fits it.

    Raises:
        LedgerError: log or counter do not hold together, or do not fit.
    """
    written = read_log(store, counter)
    if written.fault is not None:
        raise LedgerError(f"{written.fault}; {_REMEDY}")
    return CountedLog(store, counter, written)


def read_log(store: LogStore, counter: Counter) -> Written:
    """Log and counter, whether they fit or not. Raises LedgerError where the log itself does not hold together."""
    raw = store.read_log(LOG_NAME)
    try:
        count = _read_count(counter)
    except LedgerError as error:
        lines, digests, length_bytes = _follow(raw, None)
        return Written(lines, length_bytes, digests, None, str(error))
    lines, digests, length_bytes = _follow(raw, count)
    return Written(lines, length_bytes, digests, count, _fault(raw, digests, count))


def _read_count(counter: Counter) -> Count | None:
    """What the counter says. Raises LedgerError when it makes no sense."""
    data = counter.read()
    if data is None:
        return None
    try:
        return msgspec.msgpack.decode(data, type=Count)
    except msgspec.DecodeError as error:
        raise LedgerError(f"the ledger's counter makes no sense ({error})") from error


def _follow(raw: bytes, count: Count | None) -> tuple[list[Line], list[str], int]:
    """Lines, digests and length of the chain up to its end. Raises LedgerError where it breaks."""
    counted = count.lines if count is not None else len(raw)
    whole = raw.split(b"\n")[:-1]  # what follows the last newline was torn before its sync returned
    lines: list[Line] = []
    digests, length_bytes = [GENESIS], 0
    for number, data in enumerate(whole, start=1):
        try:
            line = decode_line(data)
        except (ValueError, OverflowError) as error:
            # A torn write may leave blocks of anything, newlines too. Beyond the counted lines nothing was acted upon.
            if number == counted + 1 and not any(_is_line(later) for later in whole[number:]):
                break
            raise LedgerError(f"the ledger's line {number} cannot be read ({error}); nothing is trained") from error
        if line.previous != digests[-1] or (lines and line.at_s < lines[-1].at_s):
            raise LedgerError(f"the ledger's line {number} does not follow from the one before; nothing is trained")
        lines.append(line)
        digests.append(digest_of(data))
        length_bytes += len(data) + 1
    return lines, digests, length_bytes


def _fault(raw: bytes, digests: list[str], count: Count | None) -> str | None:
    """What it means that log and counter do not fit, None if they do; `digests` start with the empty log's."""
    there = len(digests) - 1
    if count is None:
        return f"the ledger has {there} lines but its counter is missing: that file was lost or moved" if raw else None
    if count.lines > there:
        return (
            f"the ledger was cut or exchanged: it has {there} lines, its counter has counted {count.lines}; an old "
            "copy of the store was put back, or the file was lost"
        )
    if digests[count.lines] != count.digest:
        return f"the ledger was cut or exchanged: its line {count.lines} is not the one that its counter has counted"
    if there > count.lines + 1:
        return (
            f"the ledger has {there} lines, its counter has counted {count.lines}: an old copy of the counter was put "
            "back"
        )
    return None


def _is_line(data: bytes) -> bool:
    """Whether these bytes could have been written as a line."""
    try:
        decode_line(data)
    except (ValueError, OverflowError):
        return False
    return True
