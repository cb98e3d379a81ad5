"""Whether an audit log is what was signed: entry by entry, in constant memory, and the first thing that is not. Pure.

Entries come in their order, each checkpoint after the last entry that it covers. What can be wrong has a name:

    edited          an entry is not what the one after it, or its own row, says it is
    dropped         an entry is missing
    reordered       an entry comes before one that belongs before it
    added           an entry stands where another one of its number has stood
    truncated       a checkpoint covers more entries than there are
    forked          the entries fit together, and a signed checkpoint is of others: history was written anew
    bad_checkpoint  a checkpoint is not signed by the aggregator, or of another log, or a signature under it is wrong

An entry after the newest checkpoint is held by the chain alone: whoever can write into the database could have changed
the last ones. How many those are is part of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aggregator.audit.checkpoints import CheckpointError, Note, cosigned_s, verify_note
from aggregator.audit.entries import BEGINNING, AuditEntry, AuditError, decode_entry
from aggregator.audit.merkle import CompactRange, leaf_hash

Outcome = Literal["edited", "dropped", "reordered", "added", "truncated", "forked", "bad_checkpoint"]


class Fault(msgspec.Struct, frozen=True):
    """The first thing that does not hold.

    Args:
        outcome: its name.
        number: of the entry, or entries of the checkpoint.
        detail: for people.
    """

    outcome: Outcome
    number: int
    detail: str


class Verified(msgspec.Struct, frozen=True):
    """What was found.

    Args:
        entries: how many were looked at.
        checkpoints: how many fit.
        covered: entries under the newest checkpoint that fits.
        cosigned: entries under the newest checkpoint that each helper has co-signed, by helper; 0 for none.
        root: of all entries that were looked at, 64 hex digits.
        fault: None if everything holds.
    """

    entries: int
    checkpoints: int
    covered: int
    cosigned: dict[str, int]
    root: str
    fault: Fault | None


class LogKeys(NamedTuple):
    """Whom a log is verified against.

    Args:
        origin: name of the log.
        aggregator: who signs it.
        helpers: who co-sign it, by a name for people.
    """

    origin: str
    aggregator: Ed25519PublicKey
    helpers: Mapping[str, Ed25519PublicKey]


class LogVerifier:
    """Takes a log from its beginning; see the module docstring.

    Args:
        keys: whom it is verified against.
    """

    def __init__(self, keys: LogKeys) -> None:
        self._keys, self._tree = keys, CompactRange()
        self._previous = BEGINNING.hex()
        self._checkpoints = self._covered = 0
        self._cosigned = dict.fromkeys(keys.helpers, 0)
        self._fault: Fault | None = None
        self._missing: tuple[int, int] | None = None  # expected number, and the one that stood there
        self._forked: Fault | None = None  # unless the next entry tells otherwise
        self._unlinked = False  # the newest entry names another one before it than there is

    @property
    def size(self) -> int:
        """Entries that were looked at."""
        return self._tree.size

    @property
    def is_done(self) -> bool:
        """Whether the first fault is known, and nothing that comes changes it."""
        return self._fault is not None

    def entry(self, data: bytes, *, leaf: bytes | None = None, listed: tuple[object, ...] | None = None) -> None:
        """Take the next entry.

        Args:
            data: its bytes, untrusted.
            leaf: what its row says that its leaf hash is; None where there is no row.
            listed: number, at_s, actor, action and subject that its row is found by; None where there is none.
        """
        if self._fault is not None:
            return
        number = self._tree.size
        try:
            entry = decode_entry(data)
        except AuditError as error:
            self._fail("edited", number, f"entry {number} cannot be read: {error}")
            return
        if self._missing is not None:
            self._find_missing(entry.number)
            return
        if self._forked is not None:
            # One entry alone that is another one, right before a checkpoint, is no other history.
            alone = Fault("edited", number - 1, f"entry {number - 1} was edited: entry {number} does not follow it")
            self._fault = self._forked if entry.previous == self._previous else alone
            return
        found = leaf_hash(data)
        self._check(number, entry, found, leaf, listed)
        self._previous = found.hex()
        self._tree.append(found)

    def _check(
        self, number: int, entry: AuditEntry, found: bytes, leaf: bytes | None, listed: tuple[object, ...] | None
    ) -> None:
        """An entry against its place, its row, and the one before."""
        if self._unlinked:
            self._name_unlinked(entry, number)
        elif entry.number > number:
            self._missing = (number, entry.number)
        elif entry.number < number:
            self._fail("added", number, f"where entry {number} belongs, a second entry {entry.number} stands")
        elif leaf is not None and leaf != found:
            self._fail("edited", number, f"entry {number} was edited: its hash is another one")
        elif listed is not None and listed != (number, entry.at_s, entry.actor, entry.action, entry.subject):
            self._fail("edited", number, f"entry {number} is listed as something else than it says")
        elif entry.previous != self._previous:
            self._unlinked = True

    def note(self, note: Note) -> None:
        """Take a checkpoint, after the last entry that it covers."""
        if self._fault is not None:
            return
        tree, size = note.checkpoint, self._tree.size
        if self._unlinked or self._missing is not None or self._forked is not None:
            return  # what comes tells what it is
        if tree.size > size:
            what = f"the log has {size} entries, and a checkpoint {self._signed_by(note)} {tree.size}"
            self._fail("truncated", size, what)
        elif tree.size < size:
            self._fail("bad_checkpoint", tree.size, f"a checkpoint of {tree.size} entries stands after {size}")
        else:
            self._check_note(note)

    def bad_note(self, detail: str) -> None:
        """Take what should be a checkpoint, and cannot be read."""
        if self._fault is None:
            self._fail("bad_checkpoint", self._tree.size, f"after {self._tree.size} entries: {detail}")

    def finish(self, *, told_entries: int | None = None) -> Verified:
        """What was found, after the last entry and the last checkpoint.

        Args:
            told_entries: how many there should be, where that is known otherwise.
        """
        size = self._tree.size
        if self._fault is None and self._unlinked:
            self._name_unlinked(None, size)
        elif self._fault is None and self._missing is not None:
            expected, stood = self._missing
            which = f"entry {expected} is" if stood == expected + 1 else f"entries {expected} to {stood - 1} are"
            self._fail("dropped", expected, f"{which} missing: entry {stood} stands there")
        elif self._fault is None and told_entries is not None and told_entries != size:
            self._fail("truncated", size, f"{told_entries} entries were announced, and {size} are there")
        self._fault = self._fault or self._forked
        root = self._tree.root().hex()
        return Verified(size, self._checkpoints, self._covered, self._cosigned, root, self._fault)

    def _check_note(self, note: Note) -> None:
        """A checkpoint of the entries so far."""
        tree = note.checkpoint
        try:
            if tree.origin != self._keys.origin:
                raise CheckpointError(f"expected a checkpoint of {self._keys.origin}, got one of {tree.origin}")
            verify_note(note, self._keys.aggregator)
            cosigners = [name for name, key in self._keys.helpers.items() if cosigned_s(note, key) is not None]
        except CheckpointError as error:
            self._fail("bad_checkpoint", tree.size, str(error))
            return
        if tree.root != self._tree.root():
            what = f"the first {tree.size} entries are not those of the checkpoint {self._signed_by(note)} them"
            self._forked = Fault("forked", tree.size, what)
            return
        self._checkpoints, self._covered = self._checkpoints + 1, tree.size
        self._cosigned.update(dict.fromkeys(cosigners, tree.size))

    def _signed_by(self, note: Note) -> str:
        """Whose signature a checkpoint has, as far as it is one of theirs."""
        names = []
        for name, key in self._keys.helpers.items():
            try:
                names += [name] if cosigned_s(note, key) is not None else []
            except CheckpointError:
                continue
        return f"that {' and '.join(names)} co-signed covers" if names else "covers"

    def _find_missing(self, number: int) -> None:
        """An entry that was missed comes after all: nothing is gone, the order is another one."""
        expected, stood = self._missing or (0, 0)
        if number == expected:
            self._fail("reordered", expected, f"entry {stood} comes before entry {expected}")

    def _name_unlinked(self, after: AuditEntry | None, number: int) -> None:
        """Which of two entries that do not fit together was edited: the one after them names the second, or not."""
        second = number - 1
        is_second = after is not None and after.previous != self._previous
        one = second if is_second else second - 1
        self._fail("edited", one, f"entry {one} was edited: entries {second - 1} and {second} do not fit together")

    def _fail(self, outcome: Outcome, number: int, detail: str) -> None:
        """Note the first fault."""
        self._fault = Fault(outcome, number, detail)
