"""What becomes of a device's flash: worn out, damaged, full, read-only, or well again."""

from __future__ import annotations

import math
from collections.abc import Iterable

from firmware_sim.board.flash_wear import FlashWear
from firmware_sim.faults.flash_damage import damage
from firmware_sim.faults.kinds import CorruptedFlash, Timed
from firmware_sim.faults.plan import FaultSchedule, Strike
from firmware_sim.lasting_flash import LastingFlash
from firmware_sim.profiles.hardware_profile import Flash

_SHORTEST_S = 1e-3


class FlashFate:
    """Of one device, for one life of its daemon. Times are true Unix seconds.

    Args:
        profile: of the flash.
        schedule: what befalls the device.
        flash: as it was found.
        page_writes: of its lives before.
    """

    def __init__(self, profile: Flash, schedule: FaultSchedule, flash: LastingFlash, *, page_writes: int) -> None:
        self._profile, self._schedule, self._flash = profile, schedule, flash
        self._wear = FlashWear(profile, page_writes_before=page_writes)

    def tend(self, true_s: float) -> None:
        """Full, read-only, worn out, or well again."""
        flash = self._flash
        flash.capacity_bytes, flash.read_only = self._profile.capacity_bytes, False
        self._wear.take(flash)
        for fault, strike in self._failing(true_s):
            if not is_for_good(fault):
                damage(flash, fault, key=strike.key)

    def damage(self, strikes: Iterable[Strike]) -> None:
        """Flip bits and tear files."""
        for strike in strikes:
            if isinstance(strike.fault, CorruptedFlash) and is_for_good(strike.fault):
                damage(self._flash, strike.fault, key=strike.key)

    def well_again_s(self, began_s: float, true_s: float) -> float | None:
        """When a flash that takes nothing is well again; never, if it is damaged for good or worn out.

        Args:
            began_s: of the run.
            true_s: now; what strikes now counts.

        Returns:
            Infinity for never; None for a flash that is well.
        """
        ends_s = [strike.ends_s for fault, strike in self._failing(true_s) if not is_for_good(fault)]
        struck = self._schedule.strikes(began_s, true_s + _SHORTEST_S)
        if any(is_for_good(strike.fault) for strike in struck) or self._wear.share(self._flash.page_writes) >= 1:
            return math.inf
        return max(ends_s) if ends_s else None

    def _failing(self, true_s: float) -> list[tuple[CorruptedFlash, Strike]]:
        """What is wrong with the flash now."""
        return self._schedule.active_strikes(CorruptedFlash, true_s)


def is_for_good(fault: Timed) -> bool:
    """Whether a fault leaves a flash with other bytes than were written."""
    return isinstance(fault, CorruptedFlash) and fault.damage in {"bit_flips", "torn"}
