"""What rounds cost a device at device level: (epsilon, delta) against a named adversary. Pure.

Neighbours: one device's whole update in every round it was in, or zeros in its place; so the sensitivity of a sum is
the largest norm of one update (`FixedPoint.norm_bound` under the secure engine, where it is in grid steps).

Where noise of several kinds was added, the cost is the least of those of each kind alone: what is added on top,
independently, is post-processing. Skellam shares add up to Skellam noise exactly, so their variances are added; sums of
discrete Gaussians are no discrete Gaussian, so of those the widest counts alone (P. Kairouz, Z. Liu, T. Steinke, arXiv
2102.06387, bound how far such sums are off; that is not used here).

Samplers are taken to be what they are named after; docs/device-level-privacy.md says how far they are off.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from aggregator.privacy.adversaries import Adversary, CountedNoise
from aggregator.privacy.composition import Limits, worst_case
from aggregator.privacy.events import ReleasedSum, SecureSum
from aggregator.privacy.mechanisms import DiscreteGaussian, Gaussian, Mechanism, PoissonSampled, Skellam
from fl_protocol.errors import LocalMisuseError
from fl_protocol.renyi import INTEGER_ORDERS, Vector, conversion_terms, rdp_to_epsilon


def device_epsilon(
    events: Sequence[ReleasedSum], *, delta: float, adversary: Adversary, limits: Limits | None = None
) -> float:
    """Epsilon at `delta` of any one device; infinite if what the adversary does not know is no noise.

    Args:
        events: in the order of the rounds.
        delta: in (0, 1).
        adversary: who looks.
        limits: what an honest device keeps to; by default it was in all rounds.

    Raises:
        LocalMisuseError: an argument is out of range, or amplification is asked for where none is proven.
    """
    conversion_terms(delta)
    return rdp_to_epsilon(device_rdp(events, adversary, limits), delta, INTEGER_ORDERS)


def device_rdp(events: Sequence[ReleasedSum], adversary: Adversary, limits: Limits | None = None) -> Vector:
    """RDP of any one device at each of `INTEGER_ORDERS`. Raises LocalMisuseError as `device_epsilon` does."""
    kept = limits or Limits()
    require_provable(adversary, kept)
    costs = np.array([round_rdp(event, adversary) for event in events]).reshape(len(events), len(INTEGER_ORDERS))
    return worst_case(costs, events, kept)


def require_provable(adversary: Adversary, limits: Limits) -> None:
    """Raise LocalMisuseError if amplification is asked for together with limits."""
    if adversary.amplified and not limits.are_none:
        raise LocalMisuseError(
            "amplification by sampling needs coins that do not depend on earlier rounds: a cap on participations or a "
            "least time between them makes them depend; account with one or the other"
        )


def round_rdp(event: ReleasedSum, adversary: Adversary) -> Vector:
    """RDP of one round, for a device that was in it. Raises LocalMisuseError as `device_epsilon` does."""
    probability = _amplifying_probability(event) if adversary.amplified else 1.0
    l1 = event.l1_sensitivity if isinstance(event, SecureSum) else 0.0
    return _cost(adversary.counted(event), event.l2_sensitivity, l1, probability)


@functools.lru_cache(maxsize=1024)
def _cost(noise: CountedNoise, l2_sensitivity: float, l1_sensitivity: float, probability: float) -> Vector:
    """The least cost among the kinds of noise that count, at each of `INTEGER_ORDERS`."""
    kinds = counted_mechanisms(noise, l2_sensitivity, l1_sensitivity)
    if probability < 1:
        kinds = [PoissonSampled(kind, probability) for kind in kinds if isinstance(kind, Gaussian)]
    least: Vector = np.min([np.full(len(INTEGER_ORDERS), np.inf), *(kind.rdp() for kind in kinds)], axis=0)
    least.setflags(write=False)
    return least


def counted_mechanisms(noise: CountedNoise, l2_sensitivity: float, l1_sensitivity: float) -> list[Mechanism]:
    """Each kind of noise that there is, alone: the sum costs no more than with any one of them.

    Args:
        noise: that counts.
        l2_sensitivity: of the sum, in the noise's unit.
        l1_sensitivity: of a sum of integer vectors.
    """
    kinds: list[Mechanism] = []
    if noise.gaussian_sigma > 0:
        kinds.append(Gaussian(l2_sensitivity, noise.gaussian_sigma))
    if noise.discrete_sigma > 0:
        kinds.append(DiscreteGaussian(l2_sensitivity, noise.discrete_sigma))
    if noise.skellam_variance > 0:
        kinds.append(Skellam(l2_sensitivity, l1_sensitivity, noise.skellam_variance))
    return kinds


def _amplifying_probability(event: ReleasedSum) -> float:
    """With which a device is in a round, where that can be taken for Poisson sampling.

    Raises:
        LocalMisuseError: it cannot.
    """
    if not event.participation.secret_coin:
        raise LocalMisuseError(
            f"round {event.round}: no amplification by sampling, since devices' coins were not secret; account without"
        )
    if isinstance(event, SecureSum) and event.shares is not None:
        raise LocalMisuseError(
            f"round {event.round}: no amplification by sampling is proven where devices bring noise of their own, "
            "which tells how many there are; account without, or let helpers or the aggregator add the noise"
        )
    return event.participation.probability
