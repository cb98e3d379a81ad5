"""Entries of the audit log as bytes: canonical JSON, each with the hash of the one before. Pure.

Canonical means: UTF-8, keys in ascending order, no blanks, numbers and strings as msgspec writes them. What is read
back must encode to the very same bytes, so that two texts never stand for one entry.

The hash is that of the Merkle tree's leaf (RFC 9162, section 2.1.1), so an entry names its predecessor by what the tree
knows it by. It says nothing that the tree does not; it lets a reader of a few rows see whether one of them was changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from aggregator.audit.merkle import leaf_hash
from aggregator.errors import AggregatorError

BEGINNING = bytes(32)
"""What the first entry names as the hash of the one before."""
LONGEST_TEXT = 1000
"""Characters of a string in an entry; the rest is cut off, with a mark that it was."""
LONGEST_NAME = 200
"""Characters of actor, action and subject; PostgreSQL's indices take no long ones."""
LONGEST_ENTRY_BYTES = 64 * 1024
Detail = str | int | float | bool


class AuditError(AggregatorError):
    """The audit log, or what was taken from it, is not what it should be."""


@dataclass(frozen=True)
class AuditEvent:
    """Something that somebody did.

    Args:
        at_s: when, Unix seconds.
        actor: who: `local:USER` for a command on the machine, an account's name, `aggregator`, `desk`, `helper:NAME`.
        action: what, for programs, such as `task.created`.
        subject: what it was done to: a task, `TASK/ROUND`, a device's name; empty for the study as a whole.
        detail: more of it. Security: never a token, a key, a list of names, or a result below a cohort.
    """

    at_s: float
    actor: str
    action: str
    subject: str
    detail: Mapping[str, Detail]


class AuditEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An event in its place in the log.

    Args:
        number: from 0, without a gap.
        previous: leaf hash of the entry before, 64 hex digits; zeros for the first.
    """

    number: int
    previous: str
    at_s: float
    actor: str
    action: str
    subject: str
    detail: dict[str, Detail]


def entry_of(event: AuditEvent, *, number: int, previous: bytes) -> AuditEntry:
    """An event as an entry.

    Args:
        event: what was done; strings are cut to what an entry holds, and what cannot be printed is replaced.
        number: of the entry.
        previous: leaf hash of the one before.

    Raises:
        AuditError: a number in it is no number that JSON has.
    """
    detail = {_printable(name): _value(name, value) for name, value in event.detail.items()}
    actor, action, subject = (_printable(text, LONGEST_NAME) for text in (event.actor, event.action, event.subject))
    return AuditEntry(number, previous.hex(), float(_value("at_s", event.at_s)), actor, action, subject, detail)


def encode_entry(entry: AuditEntry) -> bytes:
    """Canonical bytes.

    Raises:
        AuditError: they are longer than an entry may be.
    """
    data = _ENCODER.encode(entry)
    if len(data) > LONGEST_ENTRY_BYTES:
        raise AuditError(f"an audit entry has {len(data)} bytes, and {LONGEST_ENTRY_BYTES} are allowed; say less")
    return data


def decode_entry(data: bytes) -> AuditEntry:
    """Read an entry, untrusted.

    Raises:
        AuditError: it is none, or not in its canonical form.
    """
    try:
        entry = _DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AuditError(f"expected an audit entry in JSON; {error}") from error
    if _ENCODER.encode(entry) != data:
        raise AuditError("expected an audit entry in canonical form: keys in order, no blanks, nothing besides")
    return entry


def next_previous(data: bytes) -> bytes:
    """What the entry after these bytes names as `previous`: their leaf hash."""
    return leaf_hash(data)


_ENCODER = msgspec.json.Encoder(order="sorted")
_DECODER = msgspec.json.Decoder(AuditEntry)


def _value(name: str, value: Detail) -> Detail:
    """A value that JSON has, and reads back as the same."""
    if isinstance(value, str):
        return _printable(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise AuditError(f"audit detail {name}: expected a finite number, got {value}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise AuditError(f"audit detail {name}: expected a number below 2^63, got {value}")
    return value


def _printable(text: str, longest: int = LONGEST_TEXT) -> str:
    """A string without control characters and broken pairs, not too long."""
    clean = "".join(one if one.isprintable() else "\ufffd" for one in text[: longest + 1])
    return clean if len(clean) <= longest else clean[: longest - 1] + "…"
