"""Units of channels: which are the same, and which are converted into each other. No I/O.

Only equal quantities are converted, by a constant factor; whatever is not in the tables is refused rather than guessed.
"""

from __future__ import annotations

import math

from device_client.recordings.recording_msg import RecordingError, shown

_SPELLINGS = {"m/s²": "m/s^2", "m/s2": "m/s^2", "µV": "uV", "μV": "uV", "µT": "uT", "μT": "uT", "°/s": "deg/s"}
"""Other spellings of the units below; both characters for micro are in use."""

_QUANTITIES: tuple[dict[str, float], ...] = (
    {"m/s^2": 1.0, "g": 9.80665, "mg": 9.80665e-3},  # standard gravity, exact by definition (3rd CGPM, 1901)
    {"rad/s": 1.0, "deg/s": math.pi / 180},
    {"V": 1.0, "mV": 1e-3, "uV": 1e-6},
    {"T": 1.0, "mT": 1e-3, "uT": 1e-6},
)
"""Units that are converted into each other: of each quantity, what one of the unit is in the first one."""


def conversion_factor(channel: str, given: str, expected: str) -> float:
    """By what to multiply to get from one unit to another of the same quantity; 1 for the same unit.

    Args:
        channel: whose unit it is, for the sentence.
        given: the unit of the recording.
        expected: the unit of the model.

    Raises:
        RecordingError: the two are not in the tables as units of one quantity.
    """
    one, other = spelt(given), spelt(expected)
    if one == other:
        return 1.0
    for units in _QUANTITIES:
        if one in units and other in units:
            return units[one] / units[other]
    raise RecordingError(
        f"units: expected {expected} for channel {channel}, got {shown(given)}; convert it before sending"
    )


def spelt(unit: str) -> str:
    """The unit's one spelling."""
    return _SPELLINGS.get(unit, unit)
