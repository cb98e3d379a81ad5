"""What runs on a wearer's device: it trains on recordings that never leave it, and charges for every release first.

`from device_client import Device` is what a program needs that embeds it. Inside: `session` is the pure state machine
of one study, `device` binds studies, records, ledger and outbox over `ports`, `daemon` is its loop; `adapters` hold
one outside library each, and `assembly` puts the real ones together. Nothing here imports the aggregator, the models
room or TensorFlow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from device_client.device import Device

__all__ = ["Device"]


def __getattr__(name: str) -> Any:
    """`Device`, loaded when it is first asked for: the other rooms use parts of this package that need none of it."""
    if name != "Device":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from device_client.device import Device  # noqa: PLC0415

    return Device
