"""When a system starts the daemon of a device whose profile has it run as a job. Pure: of profile, wearer and seed
only.

Systems bundle what they start in the background, so a job starts a while after its conditions hold (Android's
JobScheduler promises no moment).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from firmware_sim.labelled_chance import key_of, uniform
from firmware_sim.profiles.hardware_profile import HardwareProfile, Job
from firmware_sim.wearer.situation import Wearing

STARTS_WITHIN_S = 300.0
"""How long at most a system takes to start a job whose conditions hold."""


class JobStarts(NamedTuple):
    """Of one device. Times are true Unix seconds.

    Args:
        job: what the profile says of it.
        profile: of the device.
        wearer: who carries it.
        seed: of the fleet.
        device: its name.
        ends_s: of the run.
    """

    job: Job
    profile: HardwareProfile
    wearer: Wearing
    seed: str
    device: str
    ends_s: float

    def may_run(self, time_s: float) -> bool:
        """Whether its conditions hold."""
        situation, job = self.wearer.situation(time_s), self.job
        return (
            (situation.on_charger or not job.charging)
            and (situation.idle or not job.idle)
            and (not job.unmetered or not self.profile.link(situation.place).metered)
        )

    def next_s(self, earliest_s: float) -> float:
        """When the system starts it, not before a time; infinity if its conditions do not hold in this run."""
        time_s = earliest_s
        while time_s < self.ends_s:
            change_s = self.wearer.next_change_s(time_s)
            if self.may_run(time_s):
                chance = uniform(key_of(self.seed, "job", self.device), math.floor(time_s))
                start_s = time_s + STARTS_WITHIN_S * chance
                if start_s < change_s:
                    return start_s
            time_s = change_s
        return math.inf
