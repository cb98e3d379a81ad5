"""A device's firmware through its boots: slots, their record on the flash, the image that runs, the watchdog. Pure over
its disk: time is an argument.

Whoever simulates the device calls `boot` when power comes or a reset ends, `advance` at `next_event_s`, and boots again
when it is told to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from firmware_sim.firmware.images import FirmwareImage
from firmware_sim.firmware.slot_file import SlotFile
from firmware_sim.firmware.slots import (
    BootCause,
    Booting,
    Downloaded,
    FirmwareSlots,
    Healthy,
    Reboot,
    RolledBack,
    Save,
    SlotAction,
    SlotRecord,
)
from firmware_sim.firmware.watchdog import hang_end
from fl_protocol.durable import Disk
from fl_protocol.errors import LocalMisuseError


@dataclass(frozen=True, kw_only=True)
class FirmwareTerms:
    """How a fleet's boot loaders work.

    Args:
        factory: version that both slots hold when the device is new.
        boot_s: from reset until the image is up.
        boot_limit: boots that an image on trial gets.
        confirm_after_s: up for so long, it is confirmed.
    """

    factory: str
    boot_s: float = 20.0
    boot_limit: int = 3
    confirm_after_s: float = 300.0


class FirmwareLife:
    """One device's firmware.

    Args:
        images: all versions that may come to it.
        terms: of its boot loader.
        disk: its flash.
        watchdog_timeout_s: from a hang until the watchdog bites.

    Raises:
        LocalMisuseError: the factory's version is not among the images.

    Attributes:
        rolled_back: versions that were given up, in their order.
    """

    def __init__(
        self, images: Mapping[str, FirmwareImage], *, terms: FirmwareTerms, disk: Disk, watchdog_timeout_s: float
    ) -> None:
        if terms.factory not in images:
            raise LocalMisuseError(f"factory: expected one of {sorted(images)}, got {terms.factory!r}")
        self._images, self._terms, self._watchdog_timeout_s = images, terms, watchdog_timeout_s
        self._file = SlotFile(disk)
        record = self._file.load() or SlotRecord(active=0, versions=(terms.factory, terms.factory))
        self._slots = FirmwareSlots(record, boot_limit=terms.boot_limit, confirm_after_s=terms.confirm_after_s)
        self._fails_s, self._up_s = math.inf, math.inf
        self.rolled_back: list[str] = []

    @property
    def image(self) -> FirmwareImage:
        """What runs, once it is up."""
        return self._images[self._slots.version]

    @property
    def up_s(self) -> float:
        """When the image that was booted last is up; infinity if it never is."""
        return math.inf if self.image.defect == "crash_at_boot" else self._up_s

    def boot(self, cause: BootCause, now_s: float) -> FirmwareImage:
        """Power came, or a reset ended; what boots.

        Raises:
            OSError: the flash does not take the record.
        """
        # An image counts as booted when it is up: only then does it begin to prove itself.
        self._up_s = now_s + self._terms.boot_s
        self._execute(self._slots.handle(Booting(cause), self._up_s))
        self._fails_s = self.image.fails_s(self._up_s)
        return self.image

    def update(self, image: FirmwareImage, now_s: float) -> bool:
        """An update's image is here; whether the device has to reset for it now.

        Raises:
            LocalMisuseError: nobody knows this version.
            OSError: the flash does not take the record.
        """
        if image.version not in self._images:
            raise LocalMisuseError(f"image: expected one of {sorted(self._images)}, got {image.version!r}")
        return self._execute(self._slots.handle(Downloaded(image.version), now_s))

    @property
    def is_on_trial(self) -> bool:
        """Whether the image that runs is not confirmed yet."""
        return self._slots.confirms_s is not None

    def next_event_s(self) -> float:
        """When to call `advance`; infinity if never."""
        return min(self._resets_s, self._confirms_s)

    def advance(self, now_s: float) -> BootCause | None:
        """Let time pass; why the device resets now, if it does.

        Raises:
            OSError: the flash does not take the record.
        """
        confirms_s = self._confirms_s
        if confirms_s <= now_s:
            self._execute(self._slots.handle(Healthy(), confirms_s))
        if now_s < self._resets_s:
            return None
        return "watchdog" if self.image.defect == "hang" else "crash"

    @property
    def hangs_s(self) -> float:
        """From when on the device does nothing until the watchdog bites; infinity if it does not hang."""
        return self._fails_s if self.image.defect == "hang" else math.inf

    @property
    def _confirms_s(self) -> float:
        """When the image is confirmed; infinity if it fails before, or is not on trial."""
        confirms_s = self._slots.confirms_s
        return confirms_s if confirms_s is not None and confirms_s < self._fails_s else math.inf

    @property
    def _resets_s(self) -> float:
        """When the device resets because of its image."""
        if self.image.defect != "hang":
            return self._fails_s
        return hang_end(self._fails_s, watchdog_timeout_s=self._watchdog_timeout_s).at_s

    def _execute(self, actions: tuple[SlotAction, ...]) -> bool:
        """Do what the slots ask for; whether it is a reset."""
        for action in actions:
            if isinstance(action, Save):
                self._file.save(action.record)
            elif isinstance(action, RolledBack):
                self.rolled_back.append(action.version)
        return any(isinstance(action, Reboot) for action in actions)
