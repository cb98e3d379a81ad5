"""The table ``[sensors]`` of a scenario file: every key, its default and its range. Pure."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from firmware_sim.sensors.wearer import Variation, require_within

MOST_DAYS = 36_500.0


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """A table of the file."""


class DriftConfig(Section, frozen=True, kw_only=True):
    """An item of ``[[sensors.drift]]``: one change of how wearers move or how their watches sit.

    Args:
        form: ``linear``: from `begins_day` to `ends_day`; ``jump``: at `begins_day`.
        begins_day, ends_day: virtual days since the beginning.
        turn_degrees: by which each watch has turned in the end, about an axis of its own, 0 to 180.
        amplitude: factor on the size of motions in the end, 0.1 to 10.
    """

    form: Literal["linear", "jump"]
    begins_day: float
    ends_day: float | None = None
    turn_degrees: float = 0.0
    amplitude: float = 1.0

    def __post_init__(self) -> None:
        require_within("begins_day", self.begins_day, 0.0, MOST_DAYS)
        require_within("turn_degrees", self.turn_degrees, 0.0, 180.0)
        require_within("amplitude", self.amplitude, 0.1, 10.0)
        if self.form == "jump" and self.ends_day is not None:
            raise ValueError(f'ends_day: expected none with form = "jump", got {self.ends_day:g}')
        if self.form == "linear" and not (self.ends_day is not None and self.begins_day < self.ends_day <= MOST_DAYS):
            raise ValueError(
                f"ends_day: expected a day after begins_day ({self.begins_day:g}) and at most {MOST_DAYS:g} with "
                f'form = "linear", got {self.ends_day}'
            )


class SeasonConfig(Section, frozen=True, kw_only=True):
    """``[sensors.season]``: labels that are favoured at times of a period.

    Args:
        period_days: 1 to 36,500.
        strength: 0 to 10; a label is exp(2 · strength) times as frequent at its best time as at its worst.
    """

    period_days: float = 365.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        require_within("period_days", self.period_days, 1.0, MOST_DAYS)
        require_within("strength", self.strength, 0.0, 10.0)


class SensorsConfig(Section, frozen=True, kw_only=True):
    """``[sensors]``: where recordings come from.

    Args:
        kind: ``replay``: real recordings; ``synthetic``: persons who never were; ``none``: nobody records.
        windows_per_day: mean over wearers, 0 to 10,000.
        windows_spread: standard deviation of the logarithm of a wearer's own mean, 0 to 3 (estimated).
        dirichlet_alpha: how alike the wearers' labels are, 0.001 to 10,000; without it all labels are equally frequent.
        label_noise: share of windows that get another label, 0 to 1.
        confusion: instead of that: row k has the probabilities of what a window of label k is called.
        held_out: people on no device, only with ``replay``.
        variation: how far wearers differ.
        drift: changes, one after the other.
        season: of labels.
    """

    kind: Literal["replay", "synthetic", "none"]
    windows_per_day: float = 40.0
    windows_spread: float = 0.5
    dirichlet_alpha: float | None = None
    label_noise: float = 0.0
    confusion: tuple[tuple[float, ...], ...] | None = None
    held_out: tuple[int, ...] | None = None
    variation: Variation = Variation()
    drift: tuple[DriftConfig, ...] = ()
    season: SeasonConfig | None = None

    def __post_init__(self) -> None:
        require_within("windows_per_day", self.windows_per_day, 0.0, 10_000.0)
        require_within("windows_spread", self.windows_spread, 0.0, 3.0)
        require_within("label_noise", self.label_noise, 0.0, 1.0)
        if self.dirichlet_alpha is not None:
            require_within("dirichlet_alpha", self.dirichlet_alpha, 0.001, 10_000.0)
        if self.held_out is not None and self.kind != "replay":
            raise ValueError(
                f'held_out: expected only with kind = "replay", got {list(self.held_out)} with "{self.kind}"'
            )
        if self.confusion is not None:
            self._check_confusion(self.confusion)

    def _check_confusion(self, rows: tuple[tuple[float, ...], ...]) -> None:
        """Raises ValueError."""
        if self.label_noise:
            raise ValueError(f"label_noise: expected 0 beside confusion, got {self.label_noise:g}")
        for number, row in enumerate(rows):
            if len(row) != len(rows) or not all(0 <= one <= 1 for one in row) or not math.isclose(math.fsum(row), 1):
                raise ValueError(
                    f"confusion: expected {len(rows)} numbers from 0 to 1 that sum to 1 in row {number}, "
                    f"got {list(row)}"
                )
