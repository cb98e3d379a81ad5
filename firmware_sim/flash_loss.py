"""Unsynced changes of files and names on a virtual flash, and what a power cut leaves of them. Pure.

The rules are in `firmware_sim.virtual_flash`; chance is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple


class Change(NamedTuple):
    """One unsynced change of a file: bytes [start, end) were touched; `old` was there, the file had `old_length`."""

    start: int
    end: int
    old: bytes
    old_length: int


@dataclass(eq=False)
class FileState:
    """Content as the process sees it, and how to get back to what was synced."""

    content: bytearray
    changes: list[Change] = field(default_factory=list)

    def put(self, start: int, data: bytes) -> None:
        """Write in place or at the end; a gap is filled with zeros."""
        length, end = len(self.content), start + len(data)
        self.changes.append(Change(min(start, length), end, bytes(self.content[start:end]), length))
        if start > length:
            self.content.extend(bytes(start - length))
        self.content[start:end] = data

    def cut(self, length: int) -> None:
        """Set the length."""
        if length > len(self.content):
            self.put(length, b"")
        else:
            before = len(self.content)
            self.changes.append(Change(length, before, bytes(self.content[length:]), before))
            del self.content[length:]

    def synced(self) -> bytearray:
        """What the last sync made durable."""
        content = bytearray(self.content)
        for change in reversed(self.changes):
            content[change.start : change.start + len(change.old)] = change.old
            del content[change.old_length :]
        return content


class NameChange(NamedTuple):
    """One unsynced change of names: each name's file afterwards, None where there is none."""

    after: dict[str, FileState | None]


def apply_names(change: NameChange, names: dict[str, FileState]) -> None:
    """Change names."""
    for name, file in change.after.items():
        if file is None:
            names.pop(name, None)
        else:
            names[name] = file


def chains_of(changes: Sequence[NameChange]) -> list[list[NameChange]]:
    """Changes in groups that share no name, each in order: only within a group does the order hold."""
    chains: list[tuple[set[str], list[NameChange]]] = []
    for change in changes:
        touched, together = set(change.after), [change]
        apart = []
        for names, chain in chains:
            if names & touched:
                touched |= names
                together = chain + together
            else:
                apart.append((names, chain))
        chains = [*apart, (touched, together)]
    return [chain for _, chain in chains]


def surviving_content(file: FileState, random: Random, page_bytes: int) -> bytearray:
    """A file's content after a power cut: as synced, as last seen, or a mixture page by page.

    Args:
        file: it stays as it is.
        random: decides.
        page_bytes: unit of tearing.
    """
    if not file.changes:
        return bytearray(file.content)
    old, new = file.synced(), bytearray(file.content)
    fate = random.random()
    if fate < 0.35:
        return old
    if fate < 0.6:
        return new
    lengths = (len(old), len(new), random.randint(min(len(old), len(new)), max(len(old), len(new))))
    length = random.choice(lengths)
    mixed = old[:length] + bytes(max(0, length - len(old)))
    for start, end in sorted(_touched_pages(file.changes, page_bytes)):
        _mix(mixed, new, start, min(end, length), random)
    return mixed


def _touched_pages(changes: Sequence[Change], page_bytes: int) -> set[tuple[int, int]]:
    """Unsynced bytes, cut at page borders."""
    pieces = set()
    for change in changes:
        start = change.start
        while start < change.end:
            end = min(change.end, (start // page_bytes + 1) * page_bytes)
            pieces.add((start, end))
            start = end
    return pieces


def _mix(mixed: bytearray, new: bytearray, start: int, end: int, random: Random) -> None:
    """Decide the fate of one piece: old, new, its beginning new, or garbage."""
    if end <= start:
        return
    fate = random.choice(("old", "new", "beginning", "garbage"))
    if fate == "garbage":
        mixed[start:end] = random.randbytes(end - start)
    elif fate != "old":
        stop = end if fate == "new" else random.randint(start, end)
        arrived = new[start:stop]
        mixed[start : start + len(arrived)] = arrived
