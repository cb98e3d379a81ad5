"""When a wearer records a window, and what they do then: number a day, times, and labels that differ by person. Pure.

- Windows a day: Poisson about the wearer's own mean, which is log-normal over wearers: a few record much more than
  most. Form and spread are our estimate, not taken from a study; `windows_per_day` is the mean over wearers.
- Moments: uniform over the waking hours, 7 to 22 o'clock of virtual time.
- Labels: each wearer's own distribution, drawn from Dirichlet(alpha, ..., alpha); a small alpha gives wearers who do
  one or two things only (T.-M. H. Hsu et al., arXiv 1909.06335, section 3, with the uniform prior p = 1/K and their
  concentration alpha · K in our terms).
- Seasons: label k is favoured at its own time of the period, by exp(strength · cos 2π(t / period − k / K)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from firmware_sim.sensors.draws import Purpose, stream
from firmware_sim.sensors.sensor import Float64, Int64

DAY_S = 86_400.0
WAKES_S, SLEEPS_S = 7 * 3600.0, 22 * 3600.0


@dataclass(frozen=True)
class Entries:
    """What is recorded when.

    Args:
        at_s: virtual seconds, float64 [n], ascending.
        label: int64 [n].
        day, number: int64 [n] each: the window is the so-many-th of its day; its name, together with the person.
    """

    at_s: Float64
    label: Int64
    day: Int64
    number: Int64


@dataclass(frozen=True)
class Diary:
    """The habits of a whole fleet.

    Args:
        seed: of the run.
        labels: K, how many there are.
        windows_per_day: mean over wearers, at least 0.
        spread: standard deviation of the logarithm of a wearer's own mean.
        alpha: of the Dirichlet distribution, above 0; None: all labels equally often.
        season_days: period of the seasons.
        season_strength: 0 for no seasons.
    """

    seed: int
    labels: int
    windows_per_day: float
    spread: float = 0.0
    alpha: float | None = None
    season_days: float = 365.0
    season_strength: float = 0.0

    def entries(self, device: int, from_s: float, to_s: float) -> Entries:
        """What a device's wearer records from `from_s` on and before `to_s`."""
        rate, likes = self.habits(device)
        first, end = max(0, math.floor(from_s / DAY_S)), math.ceil(to_s / DAY_S)
        days = [self._day(device, day, rate) for day in range(first, end)]
        at, chance, day, number = (np.concatenate(column) for column in zip(_NOTHING, *days, strict=True))
        kept = (from_s <= at) & (at < to_s)
        at, chance, day, number = at[kept], chance[kept], day[kept], number[kept]
        return Entries(at, self._labels(likes, at, chance), day.astype(np.int64), number.astype(np.int64))

    def habits(self, device: int) -> tuple[float, Float64]:
        """A wearer's own mean of windows a day, and the distribution of their labels, float64 [K]."""
        random = stream(self.seed, Purpose.HABITS, device)
        rate = self.windows_per_day * math.exp(random.normal(-(self.spread**2) / 2, self.spread))
        if self.alpha is None:
            return rate, np.full(self.labels, 1 / self.labels)
        return rate, random.dirichlet(np.full(self.labels, self.alpha))

    def _day(self, device: int, day: int, rate: float) -> tuple[Float64, Float64, Float64, Float64]:
        """Moments, uniform numbers that decide labels, day and numbers of a day's windows; each float64 [n]."""
        random = stream(self.seed, Purpose.DAY, device, day)
        draws = random.random((random.poisson(rate), 2))
        at = np.sort(day * DAY_S + WAKES_S + (SLEEPS_S - WAKES_S) * draws[:, 0])
        return at, draws[:, 1], np.full(len(at), float(day)), np.arange(float(len(at)))

    def _labels(self, likes: Float64, at_s: Float64, chance: Float64) -> Int64:
        """Labels by inversion of each moment's cumulative distribution."""
        turn = at_s[:, None] / (self.season_days * DAY_S) - np.arange(self.labels) / self.labels
        weight = likes * np.exp(self.season_strength * np.cos(2 * math.pi * turn))
        cumulative = np.cumsum(weight, axis=1)
        chosen = (cumulative <= chance[:, None] * cumulative[:, -1:]).sum(axis=1)
        labels: Int64 = np.minimum(chosen, self.labels - 1).astype(np.int64)
        return labels


_NOTHING = (np.zeros(0),) * 4
"""Joined to the days' columns, so that there is something to join when there are no days."""
