"""Which device of a fleet is of which kind: by weight, and by the seed and the device's number alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from math import inf

from firmware_sim.chance import key_of, uniforms
from firmware_sim.errors import ProfileError
from firmware_sim.profiles.hardware_profile import HardwareProfile


class Population:
    """A distribution over profiles.

    Args:
        weights: (profile, weight) by any name; the weights need not add up to 1, and their order is of no matter.
        seed: of the fleet.

    Raises:
        ProfileError: there are none, or a weight is not a finite number above 0.
    """

    def __init__(self, weights: Mapping[str, tuple[HardwareProfile, float]], *, seed: int | str) -> None:
        wrong = [f"{name} = {weight}" for name, (_, weight) in weights.items() if not 0 < weight < inf]
        if wrong or not weights:
            raise ProfileError(
                f"weights of profiles: expected finite numbers above 0, got {', '.join(wrong) or 'none'}"
            )
        names = sorted(weights)
        self._profiles = [weights[name][0] for name in names]
        self._edges = list(accumulate(weights[name][1] for name in names))
        self._key = key_of("population", seed)

    def profile(self, index: int) -> HardwareProfile:
        """Of device `index`."""
        at = uniforms(self._key, index)[0] * self._edges[-1]
        return self._profiles[min(bisect_right(self._edges, at), len(self._profiles) - 1)]
