"""Firmware images, good and bad, and the waves in which an update reaches a fleet. Pure."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from firmware_sim.labelled_chance import key_of, uniform
from fl_protocol.errors import LocalMisuseError

Defect = Literal["none", "crash_at_boot", "reboot_loop", "hang", "hungry"]
"""``crash_at_boot``: never comes up; ``reboot_loop``: comes up, and crashes `after_s` later; ``hang``: stops `after_s`
after it came up, until the watchdog bites; ``hungry``: works, and takes `energy_factor` times the energy."""


class FirmwareImage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One version of the firmware.

    Args:
        version: its name.
        defect: what is wrong with it.
        after_s: from coming up until it crashes or hangs.
        energy_factor: of what the device takes when it runs this image.
    """

    version: Annotated[str, Meta(min_length=1, max_length=64)]
    defect: Defect = "none"
    after_s: Annotated[float, Meta(ge=0)] = 0.0
    energy_factor: Annotated[float, Meta(gt=0)] = 1.0

    def __post_init__(self) -> None:
        if self.defect == "hungry" and self.energy_factor <= 1:
            raise LocalMisuseError(f"energy_factor: expected above 1 for a hungry image, got {self.energy_factor:g}")

    @property
    def is_dead_on_arrival(self) -> bool:
        """Whether it crashes or hangs by itself."""
        return self.defect in {"crash_at_boot", "reboot_loop", "hang"}

    def fails_s(self, up_s: float) -> float:
        """When it crashes or hangs, having come up at `up_s`; infinity if it does not."""
        if not self.is_dead_on_arrival:
            return math.inf
        return up_s if self.defect == "crash_at_boot" else up_s + self.after_s


class Wave(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From `at_s` on (seconds since the run began) the update is offered to this share of the fleet in all."""

    at_s: Annotated[float, Meta(ge=0)]
    share: Annotated[float, Meta(gt=0, le=1)]


class Rollout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An update and its waves.

    Args:
        image: that it installs.
        waves: ascending in time and share.
        spread_s: within a wave devices are offered it over so long a time.
    """

    image: FirmwareImage
    waves: Annotated[tuple[Wave, ...], Meta(min_length=1)]
    spread_s: Annotated[float, Meta(ge=0)] = 0.0

    def __post_init__(self) -> None:
        for earlier, later in pairwise(self.waves):
            if later.at_s <= earlier.at_s or later.share <= earlier.share:
                raise LocalMisuseError(
                    f"waves: expected times and shares to ascend, got {earlier.share:g} at {earlier.at_s:g} s and then "
                    f"{later.share:g} at {later.at_s:g} s"
                )

    def offered_s(self, *, seed: int | str, device: str) -> float:
        """When a device is offered the update, in seconds since the run began; infinity if never.

        It follows from the seed and the device's name alone; a later wave with a larger share moves nobody.
        """
        key = key_of(seed, "rollout", self.image.version, device)
        place = uniform(key, 0)
        for wave in self.waves:
            if place < wave.share:
                return wave.at_s + self.spread_s * uniform(key, 1)
        return math.inf
