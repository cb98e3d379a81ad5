"""When a device that hangs goes on, whatever made it hang: a firmware's defect or a fault from without. Pure.

A hang ends by itself, or the hardware's watchdog resets the device, whichever comes first.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class HangEnd(NamedTuple):
    """The end of a hang.

    Args:
        at_s: when; infinity if never.
        is_reset: whether the watchdog reset the device then.
    """

    at_s: float
    is_reset: bool


def hang_end(hangs_s: float, *, watchdog_timeout_s: float, lasts_s: float = math.inf) -> HangEnd:
    """When and how a hang ends.

    Args:
        hangs_s: when it begins, seconds.
        watchdog_timeout_s: of the hardware, from the last sign of life on.
        lasts_s: how long it takes if nothing resets the device.
    """
    return HangEnd(hangs_s + min(watchdog_timeout_s, lasts_s), watchdog_timeout_s <= lasts_s)
