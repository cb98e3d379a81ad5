"""The world of a fleet on virtual hardware: which device is what, and when each is first switched on."""

from __future__ import annotations

from collections.abc import Callable

import simpy

from firmware_sim.fleet.hardware import HardwareSurroundings
from firmware_sim.fleet.hardware_terms import HardwareTerms, job_starts
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.profiles.hardware_profile import HardwareProfile
from firmware_sim.wearer.situation import Wearing


class HardwareWorld:
    """`firmware_sim.fleet.surroundings.World` of virtual hardware.

    Args:
        terms: of the fleet.
        profile_of: a device's hardware, given its record.
        wearer_of: who carries it.
    """

    def __init__(
        self,
        terms: HardwareTerms,
        *,
        profile_of: Callable[[DeviceRecord], HardwareProfile],
        wearer_of: Callable[[DeviceRecord], Wearing],
    ) -> None:
        self._terms, self._profile_of, self._wearer_of = terms, profile_of, wearer_of

    def first_start_s(self, record: DeviceRecord) -> float:
        """When it appears, and its system then starts the daemon."""
        terms = self._terms
        appears_s = terms.faults.appears_s(record.name)
        at_s = terms.began_s if appears_s is None else appears_s
        starts = job_starts(record, self._profile_of(record), self._wearer_of(record), terms)
        return (at_s if starts is None else starts.next_s(at_s)) - terms.began_s

    def surroundings(self, record: DeviceRecord, environment: simpy.Environment) -> HardwareSurroundings:
        """Of a device whose daemon starts now."""
        return HardwareSurroundings(record, environment, self._profile_of(record), self._wearer_of(record), self._terms)
