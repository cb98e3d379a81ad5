"""What a failing flash does to the files on it. Pure over a virtual flash; chance follows from a strike's key."""

from __future__ import annotations

from fnmatch import fnmatchcase

from firmware_sim.faults.kinds import CorruptedFlash
from firmware_sim.labelled_chance import bits, key_of
from firmware_sim.lasting_flash import LastingFlash
from firmware_sim.virtual_flash import VirtualFlash


def damage(flash: LastingFlash | VirtualFlash, fault: CorruptedFlash, *, key: int) -> list[str]:
    """A strike begins; names of the files that are no longer what they were.

    Args:
        flash: of the device; changed, unseen by what runs on it.
        fault: what happens to it.
        key: of the strike.
    """
    if fault.damage == "full":
        flash.capacity_bytes = 0
        return []
    if fault.damage == "read_only":
        flash.read_only = True
        return []
    struck = []
    for name in flash.names():
        content = flash.read(name)
        if content and any(fnmatchcase(name, pattern) for pattern in fault.files):
            flash.decay(name, _damaged(content, fault, key_of(key, name), flash.page_bytes))
            struck.append(name)
    return struck


def _damaged(content: bytes, fault: CorruptedFlash, key: int, page_bytes: int) -> bytes:
    """A file's bytes afterwards."""
    raw = bytearray(content)
    if fault.damage == "torn":
        pages = -(-len(raw) // page_bytes)
        start = bits(key, 0) % pages * page_bytes
        raw[start:] = bytes(len(raw) - start)
        return bytes(raw)
    for bit in _distinct(min(fault.bits, 8 * len(raw)), 8 * len(raw), key):
        raw[bit // 8] ^= 1 << bit % 8
    return bytes(raw)


def _distinct(count: int, below: int, key: int) -> set[int]:
    """So many different numbers."""
    chosen: set[int] = set()
    draw = 0
    while len(chosen) < count:
        chosen.add(bits(key, draw) % below)
        draw += 1
    return chosen
