"""A device while it sleeps: its flash, and some numbers. Everything else is made again from these when it wakes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from numpy.typing import NDArray

from firmware_sim.board.board_state import BoardState
from firmware_sim.lasting_flash import LastingFlash
from firmware_sim.virtual_flash import PAGE_BYTES

Image = dict[str, tuple[int, tuple[bytes, ...]]]
"""Files by name: length in bytes, and pages without the zeros that they end in (a preallocated file is mostly that)."""


class Energy(msgspec.Struct, kw_only=True, array_like=True):
    """What a device has used for Covey since the beginning.

    Args:
        compute_mwh, radio_mwh, base_mwh: for training, the radio, being awake.
        battery_percent: of its battery; None on the mains.
    """

    compute_mwh: float = 0.0
    radio_mwh: float = 0.0
    base_mwh: float = 0.0
    battery_percent: float | None = None

    @property
    def parts(self) -> tuple[float, float, float]:
        """All that adds up."""
        return self.compute_mwh, self.radio_mwh, self.base_mwh


class DeviceRecord(msgspec.Struct, kw_only=True, array_like=True):
    """One device between two lives of its daemon.

    Args:
        index: of the device in the fleet; what is drawn for it follows from the seed and this.
        name: on the wire.
        profile: of its hardware.
        flash, counter: the contents of its store, and of the ledger's counter.
        lives: how often its daemon was started.
        sent: messages that it has published.
        page_writes: pages written to its flash.
        next_s: when it wakes next by itself.
        spent_epsilon: of its wearer's budget.
        compute_s: how long it has computed.
        bytes_up, bytes_down: over its radio; of both, `bytes_metered` over a network that is paid by volume.
        updates: that were delivered.
        struck_until_s: Unix seconds up to which what befell it has been accounted for.
        recorded_until_s: up to when its wearer's recordings were stored, seconds of the run.
        board, clock: where they stand; None and empty before its first life.
        energy: that it has used.
        crashes: how often the daemon raised what it should not have.
        slots: the boot loader's partition, where firmware is simulated, and of what it did: `firmware`, the version
            that runs; `booted_s`, when it booted last; `boot_cause`, the ending that it boots after next.
        news: (event, detail) that are to be told when its daemon starts.
        vectors: with ``wire = "off"``, what its flash only names; see `firmware_sim.hand_over`.
        hours: the last ones in which it was counted as awake, eligible, having begun, having delivered; -1 for none.
    """

    index: int
    name: str
    profile: str
    flash: Image = msgspec.field(default_factory=dict)
    counter: Image = msgspec.field(default_factory=dict)
    lives: int = 0
    sent: int = 0
    page_writes: int = 0
    next_s: float = 0.0
    spent_epsilon: float = 0.0
    compute_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_metered: int = 0
    updates: int = 0
    struck_until_s: float = 0.0
    recorded_until_s: float = -math.inf
    board: BoardState | None = None
    clock: bytes = b""
    energy: Energy = msgspec.field(default_factory=Energy)
    crashes: int = 0
    slots: Image = msgspec.field(default_factory=dict)
    firmware: str = ""
    booted_s: float | None = None
    boot_cause: str = ""
    news: list[tuple[str, str]] = msgspec.field(default_factory=list)
    vectors: dict[bytes, NDArray[Any]] = msgspec.field(default_factory=dict)
    hours: list[int] = msgspec.field(default_factory=lambda: [-1, -1, -1, -1])


def packed(files: Mapping[str, bytes]) -> Image:
    """Files as a record keeps them."""
    return {
        name: (
            len(content),
            tuple(bytes(content[at : at + PAGE_BYTES]).rstrip(b"\0") for at in range(0, len(content), PAGE_BYTES)),
        )
        for name, content in files.items()
    }


def unpacked(image: Image) -> LastingFlash:
    """A flash that holds what was packed."""
    files = {}
    for name, (length, pages) in image.items():
        content = b"".join(page.ljust(PAGE_BYTES, b"\0") for page in pages)
        files[name] = content[:length]
    return LastingFlash(files)
