"""A fleet device's firmware through the lives of its daemon: boots, an update when it is offered, rollback.

The boot loader keeps its record in a partition of its own, which is part of the device's record; no fault strikes it. A
device's firmware runs while its daemon sleeps, too: what happened meanwhile is made up for when the daemon starts, and
told then. Times are seconds since the run began.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from firmware_sim.firmware.images import FirmwareImage, Rollout
from firmware_sim.firmware.life import FirmwareLife, FirmwareTerms
from firmware_sim.firmware.slots import BootCause
from firmware_sim.fleet.record import DeviceRecord, packed, unpacked

BOOT_CAUSES: dict[str, BootCause] = {
    "brown_out": "brown_out",
    "corrupted_flash": "reset",
    "hang": "watchdog",
    "reboot_loop": "reset",
}
"""What the boot loader sees of an ending that resets the whole device; after any other one it does not run."""


@dataclass(frozen=True)
class FirmwarePlan:
    """A fleet's firmware.

    Args:
        terms: of the boot loaders.
        rollout: of an update.
        seed: of the fleet.
        ends_s: of the run.
    """

    terms: FirmwareTerms
    rollout: Rollout
    seed: str
    ends_s: float

    @property
    def images(self) -> dict[str, FirmwareImage]:
        """All versions that there are."""
        return {
            self.terms.factory: FirmwareImage(version=self.terms.factory),
            self.rollout.image.version: self.rollout.image,
        }


class DeviceFirmware:
    """See the module docstring.

    Args:
        plan: of the fleet.
        record: the device's.
        now_s: when its daemon starts.
        watchdog_timeout_s: of its hardware.

    Attributes:
        starts_s: when the daemon starts after a reset by the firmware; infinity if it never does.
    """

    def __init__(self, plan: FirmwarePlan, record: DeviceRecord, *, now_s: float, watchdog_timeout_s: float) -> None:
        self._plan, self._record = plan, record
        self._disk = unpacked(record.slots)
        self._life = FirmwareLife(plan.images, terms=plan.terms, disk=self._disk, watchdog_timeout_s=watchdog_timeout_s)
        self._offered_s = plan.rollout.offered_s(seed=plan.seed, device=record.name)
        self.starts_s = now_s
        cause, record.boot_cause = BOOT_CAUSES.get(record.boot_cause), ""
        if cause is not None or record.booted_s is None:
            self._boot(cause or "power_on", now_s - plan.terms.boot_s)
        else:
            # What boots again because power came is not counted: this is the boot that was.
            self._boot("power_on", record.booted_s)
        self._make_up(now_s)

    @property
    def energy_factor(self) -> float:
        """What all that the device takes is multiplied by."""
        return self._life.image.energy_factor

    @property
    def is_on_trial(self) -> bool:
        """Whether its image has yet to prove itself."""
        return self._life.is_on_trial

    def reset(self, now_s: float, *, may_update: bool) -> tuple[str, str] | None:
        """Why the device resets now, if it does: the event, and what there is to say of it.

        Args:
            now_s: after all that was asked before.
            may_update: whether its system would install an update now.
        """
        image = self._life.image
        if now_s >= self._life.hangs_s:
            self._reboot("watchdog", self._life.next_event_s())
            return "firmware_reset", f"{image.version}: watchdog"
        cause = self._life.advance(now_s)
        if cause is not None:
            self._reboot(cause, now_s)
            return "firmware_reset", f"{image.version}: {cause}"
        update = self._plan.rollout.image
        if may_update and now_s >= self._offered_s and self._life.update(update, now_s):
            self._reboot("reset", now_s)
            return "firmware_updated", update.version
        return None

    def next_change_s(self, now_s: float) -> float:
        """When `reset` has to be asked next, after now."""
        times = (self._life.next_event_s(), self._life.hangs_s, self._offered_s)
        return min((time_s for time_s in times if time_s > now_s), default=math.inf)

    def leave(self) -> None:
        """Put into the record what lasts."""
        self._record.slots = packed(self._disk.image())

    def _make_up(self, now_s: float) -> None:
        """Let happen what happened until now while no daemon ran."""
        count, image = 0, self._life.image
        while self._life.next_event_s() <= now_s:
            at_s = self._life.next_event_s()
            cause = self._life.advance(at_s)
            if cause is not None:
                count += 1
                self._boot(cause, at_s)
        if count:
            self._record.news.append(("firmware_reset", f"{image.version}: {count} times while no daemon ran"))

    def _reboot(self, cause: BootCause, at_s: float) -> None:
        """Boot until an image comes up."""
        self._boot(cause, at_s)
        while self._life.up_s == math.inf and self._life.next_event_s() < self._plan.ends_s:
            image, at_s = self._life.image, self._life.next_event_s()
            self._record.news.append(("firmware_reset", f"{image.version}: crash at boot"))
            self._boot(self._life.advance(at_s) or "crash", at_s)
        self.starts_s = self._life.up_s

    def _boot(self, cause: BootCause, at_s: float) -> None:
        """One boot."""
        known = len(self._life.rolled_back)
        self._record.firmware = self._life.boot(cause, at_s).version
        self._record.booted_s = at_s
        self._record.news += [("firmware_rolled_back", version) for version in self._life.rolled_back[known:]]
