"""A clip that follows a quantile of the updates' norms, from bits that ride in the summed vector. Pure.

G. Andrew, O. Thakkar, B. McMahan, S. Ramaswamy, "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021,
arXiv 1905.03871: each device tells with one bit whether its update was no longer than the clip, and the clip grows or
shrinks geometrically until the share of such updates is the wanted quantile.

Under the secure engine the bit is one more coordinate of the integer vector (`FixedPoint.clip_bit`): +m grid steps for
a shorter update, -m for a longer one. Zeros in place of a device's update and bit move the sum by at
most √(Δ² + m²), Δ being the longest update after rounding: one vector, one sensitivity, the same noise of standard
deviation σ in every coordinate, one event. With z = σ / √(Δ² + m²) for all of it, z_Δ = σ / Δ for the update, and noise
of σ_b = σ / 2m on the number of bits set (each is (1 ± 1) / 2), this is the paper's theorem 1: z⁻² = z_Δ⁻² +
(2·σ_b)⁻².
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fl_protocol.errors import LocalMisuseError


@dataclass(frozen=True)
class AdaptiveClip:
    """How the clip follows.

    Args:
        quantile: of the updates' norms that it goes to, (0, 1); the paper finds 0.5 to do well everywhere.
        learning_rate: of the logarithm of the clip, above 0; the paper's is 0.2.
        least, most: what it never leaves.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    least: float = 1e-6
    most: float = 1e6

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise LocalMisuseError(f"quantile: expected 0 < quantile < 1, got {self.quantile}")
        if not 0 < self.learning_rate < math.inf:
            raise LocalMisuseError(f"learning_rate: expected a number above 0, got {self.learning_rate}")
        if not 0 < self.least <= self.most < math.inf:
            raise LocalMisuseError(f"expected 0 < least <= most < inf, got {self.least} and {self.most}")

    def next_clip(self, clip: float, noisy_share: float) -> float:
        """The clip of the next round: C·exp(-η·(b - quantile)), algorithm 1.

        Args:
            clip: C, of the round.
            noisy_share: b, the share of updates no longer than it, with its noise; it may lie outside of [0, 1].
        """
        if not math.isfinite(noisy_share):
            raise LocalMisuseError(f"noisy_share: expected a finite number, got {noisy_share}")
        # More than all, or fewer than none, is noise alone; without a bound on it one round could undo all others.
        share = min(1.0, max(0.0, noisy_share))
        return min(self.most, max(self.least, clip * math.exp(-self.learning_rate * (share - self.quantile))))


def update_noise_multiplier(*, noise_multiplier: float, bit_noise: float) -> float:
    """z_Δ: what is left for the update of a noise multiplier, once the bits have their noise (theorem 1).

    Args:
        noise_multiplier: z, of update and bit together: what is accounted.
        bit_noise: σ_b, standard deviation of the noise on the number of bits set; the paper takes a 20th of the cohort.

    Raises:
        LocalMisuseError: the bits alone would cost more.
    """
    if not (noise_multiplier > 0 and 2 * bit_noise > noise_multiplier):
        raise LocalMisuseError(
            f"bit_noise: expected more than half of the noise multiplier {noise_multiplier}, got {bit_noise}; bits "
            "with less noise cost more than all may"
        )
    # The same as (z^-2 - (2 σ_b)^-2)^(-1/2), and exact where the bits' part is tiny.
    return noise_multiplier / math.sqrt(1 - (noise_multiplier / (2 * bit_noise)) ** 2)


def bit_magnitude(*, norm_bound: float, noise_multiplier: float, bit_noise: float) -> int:
    """m: grid steps of the bit's coordinate, so that the bits' noise is `bit_noise` or, for a whole number, just above.

    Args:
        norm_bound: Δ, largest L2 norm of an update in grid steps (`FixedPoint.update_norm_bound`).
        noise_multiplier: z, of update and bit together.
        bit_noise: σ_b.

    Raises:
        LocalMisuseError: the grid is too coarse for a bit with so much noise.
    """
    sigma = norm_bound * update_noise_multiplier(noise_multiplier=noise_multiplier, bit_noise=bit_noise)
    magnitude = math.floor(sigma / (2 * bit_noise))
    if magnitude < 1:
        raise LocalMisuseError(
            f"bit_noise: expected at most {sigma / 2:g}, half of the noise in grid steps, got {bit_noise}; take "
            "a finer grid step or less noise on the bits"
        )
    return magnitude


def share_within_clip(within: float, *, count: int) -> float:
    """The noisy share of updates that were no longer than the clip.

    Args:
        within: how many were, less how many were longer: the last number of a sum with a clip bit.
        count: of updates in the sum, at least 1.
    """
    if count < 1:
        raise LocalMisuseError(f"count: expected at least 1 update, got {count}")
    return 0.5 + within / (2 * count)
