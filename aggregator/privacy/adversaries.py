"""Against whom a device-level claim is made, and so which of the noise counts: what they do not know themselves. Pure.

`aggregator` sees the unmasked sum, so what it adds itself hides nothing from it. It may have helpers on its side, and
devices: their noise is known to it. `model_release` sees released models and nothing else, so all noise counts that
went in before; devices that see models know their own shares all the same, and may be assumed to collude.

A device's own share never counts for its own claim. Nobody else knows that share, so it could; but then the claim of
one device would rest on one sampler, and it is at most one share of the cohort's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from aggregator.privacy.events import HelperNoise, OpenSum, ReleasedSum, SkellamShares
from fl_protocol.errors import LocalMisuseError

AdversaryName = Literal["aggregator", "model_release"]


@dataclass(frozen=True)
class CountedNoise:
    """What is left of a round's noise, each kind by itself: independent, the same in every coordinate.

    Args:
        skellam_variance: of the honest devices' shares together, in grid steps squared.
        discrete_sigma: of the widest single discrete Gaussian, in grid steps.
        gaussian_sigma: of the continuous Gaussian, in the update's unit.
    """

    skellam_variance: float = 0.0
    discrete_sigma: float = 0.0
    gaussian_sigma: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """Who looks.

    Args:
        name: `aggregator`, or `model_release`.
        colluding_devices: how many of a round's updates may be from devices that tell their noise.
        colluding_share: the same as a share of the round's updates, [0, 1); the larger of both holds. It is of the
            updates: devices that collude and come to every round are more of a cohort than of the population.
        honest_helpers: how many helpers keep their noise to themselves, whichever they are; or their names.
        amplified: count secret coins as Poisson sampling; against `model_release` only.
    """

    name: AdversaryName
    colluding_devices: int = 0
    colluding_share: float = 0.0
    honest_helpers: int | frozenset[str] = 1
    amplified: bool = False

    def __post_init__(self) -> None:
        if self.name not in ("aggregator", "model_release"):
            raise LocalMisuseError(f"adversary: expected aggregator or model_release, got {self.name!r}")
        if self.colluding_devices < 0 or not 0 <= self.colluding_share < 1:
            raise LocalMisuseError(
                "expected colluding_devices of at least 0 and 0 <= colluding_share < 1, got "
                f"{self.colluding_devices} and {self.colluding_share}"
            )
        if isinstance(self.honest_helpers, int) and self.honest_helpers < 0:
            raise LocalMisuseError(f"honest_helpers: expected at least 0, got {self.honest_helpers}")
        if self.amplified and self.name != "model_release":
            raise LocalMisuseError(
                "no amplification by sampling against the aggregator: it sees who sent an update, so no coin is secret"
            )

    def counted(self, event: ReleasedSum) -> CountedNoise:
        """The noise of a round that this adversary does not know."""
        sees_models_only = self.name == "model_release"
        central_sigma = event.central_sigma if sees_models_only else 0.0
        if isinstance(event, OpenSum):
            return CountedNoise(gaussian_sigma=central_sigma)
        shares = event.shares or SkellamShares(0.0, 0)
        return CountedNoise(
            skellam_variance=self.honest_shares(shares.arrived) * shares.variance,
            discrete_sigma=max(central_sigma, self._helpers_sigma(event.helpers)),
        )

    def honest_shares(self, arrived: int) -> int:
        """How many of the shares that arrived are of other, honest devices: neither colluders' nor the device's own."""
        colluding = max(self.colluding_devices, math.ceil(self.colluding_share * arrived))
        return max(0, arrived - 1 - colluding)

    def _helpers_sigma(self, helpers: tuple[HelperNoise, ...]) -> float:
        """Of the widest noise among honest helpers, who are those with the least noise unless they are named."""
        if self.name == "model_release":
            honest = [helper.sigma for helper in helpers]
        elif isinstance(self.honest_helpers, frozenset):
            honest = [helper.sigma for helper in helpers if helper.helper in self.honest_helpers]
        else:
            honest = sorted(helper.sigma for helper in helpers)[: self.honest_helpers]
        return max(honest, default=0.0)
