"""What happened in a round as far as privacy goes, whatever it may cost and for whomever. Pure.

One event is one sum that somebody outside of the devices came to see: under the secure engine the unmasked sum over a
cohort, under the open engine the combined update with its central noise. It is an event from the moment that it is
asked for, whatever becomes of it: a model that is then rejected was seen by the aggregator all the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fl_protocol.errors import LocalMisuseError


def _require(name: str, value: float, *, above: float | None = None, at_least: float | None = None) -> None:
    """Raise unless a number is finite and in its range."""
    if above is not None and not above < value < math.inf:
        raise LocalMisuseError(f"{name}: expected a finite number above {above:g}, got {value}")
    if at_least is not None and not at_least <= value < math.inf:
        raise LocalMisuseError(f"{name}: expected a finite number of at least {at_least:g}, got {value}")


@dataclass(frozen=True)
class Participation:
    """How devices came to take part.

    Args:
        probability: p, (0, 1], with which each takes part.
        secret_coin: each device tossed its own coin, independently of everything before; whoever wanted to take part
            was taken (the round did not close at its goal); and neither who took part nor how many is ever told to
            those who see the models. An aggregator knows both.
    """

    probability: float = 1.0
    secret_coin: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise LocalMisuseError(f"probability: expected 0 < p <= 1, got {self.probability}")


@dataclass(frozen=True)
class SkellamShares:
    """The noise that devices added to their own updates: each a share, Skellam, independent in every coordinate.

    Args:
        variance: of one share, in grid steps squared.
        arrived: how many updates with a share are in the sum; whoever stayed away brought no noise.
    """

    variance: float
    arrived: int

    def __post_init__(self) -> None:
        _require("variance of a share", self.variance, at_least=0)
        _require("arrived", self.arrived, at_least=0)


@dataclass(frozen=True)
class HelperNoise:
    """The discrete Gaussian that one helper added to its sum of masks.

    Args:
        helper: its name.
        sigma: standard deviation parameter in grid steps; 0 if it added none.
    """

    helper: str
    sigma: float = 0.0

    def __post_init__(self) -> None:
        _require(f"sigma of helper {self.helper}", self.sigma, at_least=0)


@dataclass(frozen=True, kw_only=True)
class Release:
    """What every kind of released sum has.

    Args:
        round: its number.
        opened_s, closed_s: when the round opened, and when it stopped to take updates, Unix seconds.
        l2_sensitivity: largest L2 norm of one device's part.
        participation: how devices came to take part.
    """

    round: int
    opened_s: float
    closed_s: float
    l2_sensitivity: float
    participation: Participation = Participation()

    def __post_init__(self) -> None:
        _require("l2_sensitivity", self.l2_sensitivity, above=0)
        if not (math.isfinite(self.opened_s) and self.opened_s <= self.closed_s < math.inf):
            raise LocalMisuseError(
                f"round {self.round}: expected opened_s <= closed_s, got {self.opened_s} and {self.closed_s}"
            )


@dataclass(frozen=True, kw_only=True)
class SecureSum(Release):
    """The sum that helpers and aggregator unmasked: of integer vectors, so its norms are in grid steps.

    Args:
        dimension: d, numbers in an update.
        shares: the devices' noise, if they add any.
        helpers: every helper of the round, those that add no noise too, since the honest one could be one of them.
        central_sigma: of the discrete Gaussian that the aggregator added after unmasking; 0 for none.
    """

    dimension: int
    shares: SkellamShares | None = None
    helpers: tuple[HelperNoise, ...] = ()
    central_sigma: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("dimension", self.dimension, at_least=1)
        _require("central_sigma", self.central_sigma, at_least=0)
        names = [helper.helper for helper in self.helpers]
        if len(set(names)) < len(names):
            raise LocalMisuseError(f"helpers: expected each name once, got {names}")

    @property
    def l1_sensitivity(self) -> float:
        """Largest L1 norm of one device's part: at most √d times the L2 norm, and its square, for integers."""
        return min(math.sqrt(self.dimension) * self.l2_sensitivity, self.l2_sensitivity**2)


@dataclass(frozen=True, kw_only=True)
class OpenSum(Release):
    """A combined update to which the aggregator added continuous Gaussian noise; norms are in the update's own unit.

    Args:
        central_sigma: its standard deviation; 0 for none.
    """

    central_sigma: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("central_sigma", self.central_sigma, at_least=0)


ReleasedSum = SecureSum | OpenSum
