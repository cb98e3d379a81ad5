"""The slots' record on a flash that may tear any write: two files that take turns, each with a number and a checksum.

The one that is being written is never the newest whole one, so that a power cut leaves the record of before or after
(U-Boot calls that a redundant environment). Where neither can be read, the caller starts from
the factory's record.
"""

from __future__ import annotations

import zlib

import msgspec

from firmware_sim.firmware.slots import SlotRecord
from fl_protocol.durable import Disk

_CHECKSUM_BYTES = 4


class _Numbered(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A record and how many were saved before it."""

    number: int
    record: SlotRecord


class SlotFile:
    """The record's two files.

    Args:
        disk: that holds them.
        folder: they are in.
    """

    def __init__(self, disk: Disk, folder: str = "firmware") -> None:
        self._disk, self._folder = disk, folder
        disk.make_folder(folder)
        disk.sync_folder()
        self._number = max((one.number for one in self._readable()), default=-1)

    def load(self) -> SlotRecord | None:
        """The newest record that can be read; None if there is none."""
        newest = max(self._readable(), key=lambda one: one.number, default=None)
        return None if newest is None else newest.record

    def save(self, record: SlotRecord) -> None:
        """Make a record durable.

        Raises:
            OSError: the disk does not take it; the one of before stands.
        """
        number = self._number + 1
        name = self._name(number % 2)
        raw = msgspec.msgpack.encode(_Numbered(number, record))
        self._disk.write(name, zlib.crc32(raw).to_bytes(_CHECKSUM_BYTES, "little") + raw)
        self._disk.sync(name)
        self._disk.sync_folder(self._folder)
        self._number = number

    def _name(self, turn: int) -> str:
        return f"{self._folder}/slots.{turn}"

    def _readable(self) -> list[_Numbered]:
        """What can be read of the two."""
        read = [self._disk.read(self._name(turn)) for turn in (0, 1)]
        decoded = [None if raw is None else _decode(raw) for raw in read]
        return [one for one in decoded if one is not None]


def _decode(raw: bytes) -> _Numbered | None:
    """A record, if its checksum is right."""
    checksum, body = raw[:_CHECKSUM_BYTES], raw[_CHECKSUM_BYTES:]
    if zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little") != checksum:
        return None
    try:
        return msgspec.msgpack.decode(body, type=_Numbered)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
