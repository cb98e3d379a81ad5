"""The grid step of a round under the secure engine: as coarse as costs next to nothing. Pure.

A coarser grid takes fewer bits of every update. What it costs is a longer update after rounding, the rounding's own
variance, and that Skellam noise of few grid steps protects less than Gaussian noise does.
"""

from __future__ import annotations

import math

from fl_protocol.errors import LocalMisuseError
from fl_protocol.secagg.fixed_point import FixedPoint

TOLERANCE = 0.01
"""By how much a grid may make things worse: noise 1 % more for the same epsilon, 1 % more of it, Skellam 1 % dearer."""


def choose_step(*, l2_norm_clip: float, length: int, cohort: int, noise_multiplier: float) -> float:
    """The largest power of two for a grid step that costs next to nothing.

    With s = C / γ, and noise of standard deviation σ = z·Δ grid steps in the sum, Δ being the longest update after
    rounding:

    - rounding lengthens an update, Δ <= 1.01·s, and the noise grows with it: d/4s² + 1/s + √d/2s² <= 2 %;
    - n updates are rounded, by a variance of at most 1/4 each: n / 4 <= 2 % of σ², 1 % of the noise;
    - Skellam noise of variance σ² costs at most 1 % more than Gaussian at every order: the excess over α·Δ² / 2σ² is at
      most (1 + 3·√d / (α·Δ)) / σ², largest at α = 2.

    Args:
        l2_norm_clip: C.
        length: d.
        cohort: n, updates that are added up.
        noise_multiplier: z, of the noise that counts, above 0.

    Raises:
        LocalMisuseError: a value is out of range, or there is so little noise that no step is fine enough.
    """
    if not (0 < l2_norm_clip < math.inf and 0 < noise_multiplier < math.inf and length >= 1 and cohort >= 1):
        raise LocalMisuseError(
            "expected l2_norm_clip and noise_multiplier above 0 and length and cohort of at least 1, got "
            f"{l2_norm_clip}, {noise_multiplier}, {length} and {cohort}"
        )
    step = 2.0 ** math.floor(math.log2(l2_norm_clip))
    while not _is_fine(l2_norm_clip / step, length, cohort, noise_multiplier):
        step /= 2
    return step


def _is_fine(clip_steps: float, length: int, cohort: int, noise_multiplier: float) -> bool:
    """Whether a clip of so many grid steps leaves all within `TOLERANCE`."""
    norm = FixedPoint(length, clip_steps, 1.0, 1).norm_bound
    variance = (noise_multiplier * norm) ** 2
    return (
        norm <= (1 + TOLERANCE) * clip_steps
        and cohort / 4 <= ((1 + TOLERANCE) ** 2 - 1) * variance
        and 1 + 1.5 * math.sqrt(length) / norm <= TOLERANCE * variance
    )
