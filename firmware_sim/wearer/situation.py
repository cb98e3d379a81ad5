"""What a wearer does with a device at a moment, and what every kind of wearer can be asked."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

Place = Literal["home", "away"]
Season = Literal["mild", "winter"]

ON_CHARGER, IDLE, AWAY = 1, 2, 4
"""The bits of a situation's number."""


class Situation(NamedTuple):
    """One moment.

    Args:
        on_charger: whether the charger is connected.
        idle: whether nobody uses the device.
        place: which of the profile's radio links it has.
    """

    on_charger: bool
    idle: bool
    place: Place


SITUATIONS = tuple(
    Situation(bool(bits & ON_CHARGER), bool(bits & IDLE), "away" if bits & AWAY else "home") for bits in range(8)
)
"""By number."""


class Wearing(Protocol):
    """A wearer, generated or traced. Times are true Unix seconds."""

    @property
    def season(self) -> Season:
        """In winter a battery that is out of doors gives less."""

    @property
    def utc_offset_s(self) -> float:
        """Local time less UTC."""

    def situation(self, time_s: float) -> Situation:
        """What holds at a moment, a change at that very moment included."""

    def next_change_s(self, time_s: float) -> float:
        """The first later moment at which anything changes; infinity if nothing ever does."""

    def next_move_s(self, time_s: float) -> float:
        """A later moment up to which charger and place stay as they are; not after their next change."""
