"""From a task's section ``[secure]`` and helpers' keys to what a round's manifest says about masking. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace as with_fields

from msgspec.structs import replace

from aggregator.adaptive_clipping import AdaptiveClip, bit_magnitude, share_within_clip, update_noise_multiplier
from aggregator.privacy.grid_step import choose_step
from aggregator.secure_sections import AdaptiveClipping, Secure
from aggregator.task_file import TaskConfig
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.record_sums import SUM_DIVISOR
from fl_protocol.secagg.fixed_point import MOST_BITS, FixedPoint
from fl_protocol.secagg.messages import SecureTermsMsg
from fl_protocol.secagg.terms import fixed_point_of, noise_bound

NEXT_CLIP = "next_l2_norm_clip"
"""Under which a round's metrics have the clip of the next one."""


def default_step(l2_norm_clip: float, length: int) -> float:
    """The grid's step where a task names none: a power of two of at most C / (4 sqrt(d)).

    Rounding then lengthens what one update can change in a sum, and by it all noise, by at most 1 % beyond one grid
    step (`FixedPoint.norm_bound`). Short vectors get a finer grid, since their bits cost next to nothing.
    """
    fineness = max(4 * math.sqrt(length), min(2.0**12, 2.0**22 / length))
    return float(2.0 ** math.floor(math.log2(l2_norm_clip / fineness)))


def most_updates(config: TaskConfig) -> int:
    """How many updates a round of a secure task takes."""
    named = config.secure.most_updates if config.secure is not None else None
    return named or 2 * config.goal


def first_clip(config: TaskConfig, secure: Secure) -> float:
    """The clip of the first round, in the unit that updates are sent in."""
    return _sent(config, secure.l2_norm_clip)


def noise_sigma(config: TaskConfig, secure: Secure, length: int, *, clip: float | None = None) -> float:
    """Standard deviation of the noise in the sum of `goal` updates, in grid steps."""
    return secure.noise_multiplier * _grid(config, secure, length, clip or first_clip(config, secure)).norm_bound


def terms_of(
    config: TaskConfig, secure: Secure, length: int, *, helpers: Sequence[bytes], clip: float | None = None
) -> SecureTermsMsg:
    """A round's terms, with the least modulus that holds every sum.

    Args:
        config: of the task.
        secure: its section.
        length: numbers in an update.
        helpers: each one's signed key.
        clip: of the round; None for the first one's.

    Raises:
        LocalMisuseError: no modulus of at most 32 bits holds every sum, or the noise cannot be drawn.
    """
    clip = clip or first_clip(config, secure)
    grid = _grid(config, secure, length, clip)
    sigma = secure.noise_multiplier * grid.norm_bound
    if secure.noise_from != "devices" and 0 < sigma < 1:
        raise LocalMisuseError(
            f"the {secure.noise_from}' noise is {sigma:.3g} grid steps, at least 1 can be drawn; lower secure.step"
        )
    terms = SecureTermsMsg(
        l2_norm_clip=clip,
        step=grid.step,
        bits=MOST_BITS,
        most_updates=most_updates(config),
        device_noise_variance=sigma**2 / config.goal if secure.noise_from == "devices" else 0.0,
        helper_noise_sigma=sigma if secure.noise_from == "helpers" else 0.0,
        clip_bit=grid.clip_bit,
        rotates=secure.rotates,
        prg=secure.prg,
        helpers=tuple(helpers),
    )
    try:
        fixed_point_of(terms, length)
    except ProtocolError as error:
        raise LocalMisuseError(f"secure: {error}") from error
    return replace(terms, bits=with_fields(grid, noise_bound=noise_bound(terms), bits=0).bits)


def next_clip(secure: Secure, clip: float, within: float, *, count: int) -> tuple[float, float]:
    """The noisy share of updates that a round's clip left as they were, and the clip of the next round.

    Args:
        secure: the task's section, with `adaptive_clipping`.
        clip: of the round.
        within: how many updates were no longer than it less how many were, from the sum.
        count: of updates in the sum.
    """
    wanted = secure.adaptive_clipping or AdaptiveClipping()
    share = share_within_clip(within, count=count)
    rule = AdaptiveClip(quantile=wanted.quantile, learning_rate=wanted.learning_rate)
    return share, rule.next_clip(clip, share)


def _grid(config: TaskConfig, secure: Secure, length: int, clip: float) -> FixedPoint:
    """A round's grid, without noise; fine enough for the clip bit, if there is one."""
    grid = FixedPoint(
        length,
        l2_norm_clip=clip,
        step=_step(config, secure, length, clip),
        most_updates=most_updates(config),
        rotates=secure.rotates,
    )
    wanted, noise = secure.adaptive_clipping, secure.noise_multiplier
    if wanted is None or not noise:
        return with_fields(grid, clip_bit=0 if wanted is None else 1, bits=0)
    bit_noise = wanted.bit_noise if wanted.bit_noise is not None else config.goal / 20
    split = update_noise_multiplier(noise_multiplier=noise, bit_noise=bit_noise)
    while grid.update_norm_bound * split < 2 * bit_noise:  # less than one step
        grid = with_fields(grid, step=grid.step / 2, bits=0)
    magnitude = bit_magnitude(norm_bound=grid.update_norm_bound, noise_multiplier=noise, bit_noise=bit_noise)
    return with_fields(grid, clip_bit=magnitude, bits=0)


def _sent(config: TaskConfig, value: float) -> float:
    """A number of the file in the unit that updates are sent in: the sums of measurements are divided on the device."""
    return value if config.kind == "train" else value / SUM_DIVISOR


def _step(config: TaskConfig, secure: Secure, length: int, clip: float) -> float:
    """Of the grid."""
    if secure.step is not None:
        return _sent(config, secure.step)
    fine = default_step(clip, length)
    if not secure.noise_multiplier:
        return fine
    for_noise = choose_step(
        l2_norm_clip=clip,
        length=length,
        cohort=config.goal,
        noise_multiplier=secure.noise_multiplier,
    )
    return min(fine, for_noise)
