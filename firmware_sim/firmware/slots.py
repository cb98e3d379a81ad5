"""Two firmware slots: which one boots, what counts as a failed boot, when to fall back. A pure state machine.

Rules, in the order in which they are held:

1. An update goes into the slot that does not run, and never while the running image is on trial: the other slot is then
what there is to fall back to. 2. An image on trial is counted before it is booted. Power that went away is not counted
against it; crashes, watchdog and resets are (U-Boot, doc/api/bootcount.rst: a power-on starts the count anew, a reboot
adds to it). 3. Beyond `boot_limit` boots on trial the other slot boots, for good, and the version is not taken again
(MCUboot, "design": an image that is not confirmed is reverted). 4. An image that has been up for `confirm_after_s` is
confirmed, and is on trial no more.

The record is saved before anything that rests on it is done: actions are to be executed in their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec
from msgspec.structs import replace

BootCause = Literal["power_on", "brown_out", "reset", "crash", "watchdog"]
_POWER: frozenset[BootCause] = frozenset({"power_on", "brown_out"})


class SlotRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the flash holds about the slots.

    Args:
        active: the slot that boots, 0 or 1.
        versions: of the images in the slots.
        confirmed: whether the active one has proved itself.
        boots: of the active one while it is on trial.
        rejected: the version that was rolled back last; it is not taken again.
    """

    active: int
    versions: tuple[str, str]
    confirmed: bool = True
    boots: int = 0
    rejected: str | None = None


@dataclass(frozen=True)
class Booting:
    """The boot loader runs, because of `cause`."""

    cause: BootCause


@dataclass(frozen=True)
class Downloaded:
    """An update's image is here, whole and verified."""

    version: str


@dataclass(frozen=True)
class Healthy:
    """The running image says that it works."""


@dataclass(frozen=True)
class Save:
    """Make the record durable."""

    record: SlotRecord


@dataclass(frozen=True)
class Run:
    """Boot this version."""

    version: str


@dataclass(frozen=True)
class Reboot:
    """Reset, so that the update boots."""


@dataclass(frozen=True)
class RolledBack:
    """A version was given up; for the report."""

    version: str
    to: str


SlotEvent = Booting | Downloaded | Healthy
SlotAction = Save | Run | Reboot | RolledBack


class FirmwareSlots:
    """The state machine.

    Args:
        record: as the flash has it.
        boot_limit: boots that an image on trial gets, at least 1.
        confirm_after_s: an image that was up for so long may be confirmed.
    """

    def __init__(self, record: SlotRecord, *, boot_limit: int = 3, confirm_after_s: float = 300.0) -> None:
        self.record, self._boot_limit, self._confirm_after_s = record, boot_limit, confirm_after_s
        self._booted_s: float | None = None

    @property
    def version(self) -> str:
        """Of the active slot: what runs, once it is booted."""
        return self.record.versions[self.record.active]

    @property
    def confirms_s(self) -> float | None:
        """When the running image may be confirmed; None if it is, or nothing runs."""
        if self.record.confirmed or self._booted_s is None:
            return None
        return self._booted_s + self._confirm_after_s

    def handle(self, event: SlotEvent, now_s: float) -> tuple[SlotAction, ...]:
        """What follows from an event.

        Args:
            event: what happened.
            now_s: true virtual Unix seconds.
        """
        if isinstance(event, Booting):
            return self._boot(event.cause, now_s)
        if isinstance(event, Downloaded):
            return self._take(event.version)
        return self._confirm(now_s)

    def _boot(self, cause: BootCause, now_s: float) -> tuple[SlotAction, ...]:
        """Choose what boots (rules 2 and 3)."""
        self._booted_s = now_s
        if self.record.confirmed:
            return (Run(self.version),)
        boots = self.record.boots if cause in _POWER else self.record.boots + 1
        if boots > self._boot_limit:
            given_up = self.version
            self.record = replace(
                self.record, active=1 - self.record.active, confirmed=True, boots=0, rejected=given_up
            )
            return Save(self.record), RolledBack(given_up, self.version), Run(self.version)
        if boots == self.record.boots:
            return (Run(self.version),)
        self.record = replace(self.record, boots=boots)
        return Save(self.record), Run(self.version)

    def _take(self, version: str) -> tuple[SlotAction, ...]:
        """Stage an update (rule 1)."""
        if not self.record.confirmed or version in {self.version, self.record.rejected}:
            return ()
        spare = 1 - self.record.active
        versions = (version, self.version) if spare == 0 else (self.version, version)
        self.record = replace(self.record, active=spare, versions=versions, confirmed=False, boots=0)
        return Save(self.record), Reboot()

    def _confirm(self, now_s: float) -> tuple[SlotAction, ...]:
        """Trust the running image (rule 4)."""
        confirms_s = self.confirms_s
        if confirms_s is None or now_s < confirms_s:
            return ()
        self.record = replace(self.record, confirmed=True, boots=0)
        return (Save(self.record),)
