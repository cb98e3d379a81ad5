"""The sections of a task's file about masked updates, and what every section is. Part of `aggregator.task_file`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fl_protocol.messages import Name
from fl_protocol.secagg.masks import PrgName
from fl_protocol.secagg.messages import MOST_HELPERS

LONGEST_S = 1e9
"""Thirty years; a deadline without end could not be sent."""
AtLeastOne = Annotated[int, Meta(ge=1)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """A table of the file."""


class AdaptiveClipping(Section, frozen=True, kw_only=True):
    """``adaptive_clipping`` of ``[secure]``: the clip follows a quantile of the updates' norms; `l2_norm_clip` is the
    first.

    Args:
        quantile: share of updates that the clip leaves as they are; default 0.5.
        learning_rate: of the clip's logarithm; default 0.2.
        bit_noise: standard deviation of the noise on the number of such updates; default a twentieth of the goal.
    """

    quantile: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    learning_rate: Annotated[float, Meta(gt=0, le=10)] = 0.2
    bit_noise: Annotated[float, Meta(gt=0)] | None = None


class Secure(Section, frozen=True, kw_only=True):
    """``[secure]``: how updates are masked and added up; see docs/privacy.md.

    Args:
        l2_norm_clip: of a whole update; a longer one is scaled down to it on the device. Of an evaluation or
            statistics: of a device's sums with their noise; 10,000 records count 10,000.
        helpers: names of those in the aggregator's configuration that the task's rounds use; default all.
        noise_multiplier: standard deviation of the noise in the sum of `goal` updates, over what one update can change
            in it; default 0, and then no device-level privacy is claimed.
        noise_from: ``devices`` each add a share; ``helpers`` each add all of it, since one of them is assumed to be
            honest; ``aggregator`` adds it to the sum, which protects against those who see models only. Default
            ``devices``.
        adaptive_clipping: ``{ quantile = 0.5 }`` and the like: the clip follows the updates' norms; default off.
        step: of the grid, in the clip's unit; default: so fine that rounding changes a sum by far less than a clip.
        most_updates: that a round takes; default twice the goal.
        rotates: whether updates are rotated before they are rounded; default false.
        prg: keystream of the masks; ``chacha20`` where devices have no AES instructions. Default ``aes128-gcm-zeros``.
        unmasking_s: seconds that helpers have to answer when a round has closed; default 120.
    """

    l2_norm_clip: Annotated[float, Meta(gt=0, le=1e9)]
    helpers: Annotated[tuple[Name, ...], Meta(max_length=MOST_HELPERS)] = ()
    noise_multiplier: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    noise_from: Literal["devices", "helpers", "aggregator"] = "devices"
    adaptive_clipping: AdaptiveClipping | None = None
    step: Annotated[float, Meta(gt=0)] | None = None
    most_updates: AtLeastOne | None = None
    rotates: bool = False
    prg: PrgName = "aes128-gcm-zeros"
    unmasking_s: Annotated[float, Meta(gt=0, le=LONGEST_S)] = 120.0


class DevicePrivacy(Section, frozen=True, kw_only=True):
    """``[device_privacy]``: what the task may cost any one device at device level; it halts before it costs more.

    Args:
        epsilon, delta: of the budget, over all rounds.
        adversary: ``aggregator``, who sees the sums; or ``model_release``: those who see released models only. Default
            ``aggregator``.
        colluding_share: of each round's updates that may be from devices that tell their noise; default 0.
    """

    epsilon: Annotated[float, Meta(gt=0)]
    delta: Annotated[float, Meta(gt=0, lt=1)]
    adversary: Literal["aggregator", "model_release"] = "aggregator"
    colluding_share: Annotated[float, Meta(ge=0, lt=1)] = 0.0
