"""What all virtual hardware of a fleet has in common, and when a device's system starts its daemon."""

from __future__ import annotations

from dataclasses import dataclass

from device_client.config import EligibilityConfig
from firmware_sim.faults.plan import FaultPlan
from firmware_sim.fleet.device_firmware import FirmwarePlan
from firmware_sim.fleet.job_starts import JobStarts
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.profiles.hardware_profile import HardwareProfile, Job
from firmware_sim.wearer.situation import Wearing


@dataclass(frozen=True)
class HardwareTerms:
    """What all devices of a fleet have in common.

    Args:
        seed: of the fleet.
        began_s: Unix seconds of the beginning; `ends_s` of the end.
        eligibility: the wearers' rules, whose thresholds matter.
        tenant: name on the wire.
        faults: of the run.
        job_period_s: instead of the profiles'.
        firmware: of the devices; None: it never fails and never changes.
    """

    seed: str
    began_s: float
    ends_s: float
    eligibility: EligibilityConfig
    tenant: str
    faults: FaultPlan
    job_period_s: float | None = None
    firmware: FirmwarePlan | None = None


def job_starts(
    record: DeviceRecord, profile: HardwareProfile, wearer: Wearing, terms: HardwareTerms
) -> JobStarts | None:
    """When a device's system starts its daemon; None for a resident one."""
    job = profile.residency
    if not isinstance(job, Job):
        return None
    return JobStarts(job, profile, wearer, seed=terms.seed, device=record.name, ends_s=terms.ends_s)
