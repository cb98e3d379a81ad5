"""Wear of a device's flash: pages written, against what they endure.

`VirtualFlash` counts page writes as if nothing were cached, an upper bound. With wear levelling they are spread over
all pages, so the flash is worn out after pages × endurance of them; then it can only be read, as cards do at their end.
"""

from __future__ import annotations

from typing import Protocol

from firmware_sim.profiles.hardware_profile import Flash


class Medium(Protocol):
    """What of a `firmware_sim.virtual_flash.VirtualFlash` wear has to do with."""

    page_writes: int
    read_only: bool


class FlashWear:
    """Wear of one device.

    Args:
        flash: of its profile.
        page_writes_before: of its life before the simulation.
    """

    def __init__(self, flash: Flash, *, page_writes_before: int = 0) -> None:
        self._endured = flash.capacity_bytes / flash.page_bytes * flash.endurance_writes
        self._before = page_writes_before

    def share(self, page_writes: int) -> float:
        """Part of the flash's life that is over, 1 when it is worn out.

        Args:
            page_writes: of `VirtualFlash.page_writes`.
        """
        return (self._before + page_writes) / self._endured

    def take(self, flash: Medium) -> bool:
        """Make a worn-out flash read-only; whether it is.

        Args:
            flash: whose counter says how much was written; the counter goes on over restarts.
        """
        if self.share(flash.page_writes) >= 1:
            flash.read_only = True
        return flash.read_only
