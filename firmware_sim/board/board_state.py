"""All that a virtual board remembers: 100,000 sleeping devices keep one each."""

from __future__ import annotations

import msgspec


class BoardState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The state of a board; as MessagePack under 100 bytes.

    Args:
        time_s: true Unix seconds up to which it has been integrated.
        charge_mwh: of the battery; 0 on the mains.
        celsius: true temperature.
        on: whether the device runs.
        charged_mwh: into the battery, so far.
        background_mwh, self_discharged_mwh: out of it, so far.
        compute_mwh, radio_mwh, base_mwh: what Covey used so far: training, radio, being awake.
        brown_outs: how often it stopped for want of charge.
    """

    time_s: float
    charge_mwh: float
    celsius: float
    on: bool = True
    charged_mwh: float = 0.0
    background_mwh: float = 0.0
    self_discharged_mwh: float = 0.0
    compute_mwh: float = 0.0
    radio_mwh: float = 0.0
    base_mwh: float = 0.0
    brown_outs: int = 0
