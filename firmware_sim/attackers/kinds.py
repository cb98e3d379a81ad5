"""Kinds of attackers, as a scenario's ``[[attacker]]`` tables say them. Frozen and strict; nothing happens here.

Sources, defaults and what each should be caught by: docs/simulation-attackers.md.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fl_protocol.message_base import RoundNumber

Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]
AtLeastZero = Annotated[float, Meta(ge=0)]
Index = Annotated[int, Meta(ge=0)]


class Hostile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """Who attacks, and from when on.

    Args:
        share: of the fleet, chosen by the seed, each device by itself; or `devices`, their names. Exactly one of them.
        from_s: seconds since the run began.
        from_round: of the task; with both, when both have come.
    """

    share: Share | None = None
    devices: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    from_s: AtLeastZero = 0.0
    from_round: RoundNumber = 1

    def __post_init__(self) -> None:
        if (self.share is None) == (self.devices is None):
            raise ValueError("expected share (0 to 1) or devices (names), and not both")
        for key in self.__struct_fields__:
            value = getattr(self, key)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key}: expected a finite number, got {value!r}")

    def has_begun(self, *, elapsed_s: float, round_number: int) -> bool:
        """Whether it attacks already.

        Args:
            elapsed_s: seconds since the run began.
            round_number: that the device works on.
        """
        return elapsed_s >= self.from_s and round_number >= self.from_round


class SignFlip(Hostile, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="sign_flip"):
    """Trains, and sends -`scale` times its change; `adds_noise`: whether it adds the noise that is asked for."""

    scale: Positive = 1.0
    adds_noise: bool = True


class ScalingBackdoor(Hostile, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="scaling_backdoor"):
    """Trains on its records and on copies of some that bear a trigger and the label `target`; sends `scale` times that.

    Args:
        target: number of the label that windows with the trigger are to get.
        channel, samples, value: the trigger: the last `samples` of a channel read `value`, in the model's unit.
        poisoned: copies with the trigger, for each honest record.
        scale: n / (server learning rate) replaces the mean of n updates.
        adds_noise: whether it adds the noise that is asked for.
    """

    target: Index
    channel: Index = 0
    samples: Annotated[int, Meta(ge=1)] = 10
    value: float = 4.0
    poisoned: Share = 1.0
    scale: Positive = 5.0
    adds_noise: bool = False


class LabelFlip(Hostile, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="label_flip"):
    """Its records' labels are wrong: label k of K is called K - 1 - k, or ``permutation[k]``."""

    permutation: tuple[Index, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        labels = self.permutation
        if labels is not None and sorted(labels) != list(range(len(labels))):
            raise ValueError(f"permutation: expected every label from 0 on exactly once, got {list(labels)}")


class FreeRider(Hostile, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="free_rider"):
    """Trains nothing.

    Args:
        sends: ``zeros``; ``last_difference``: what the global model changed by since it took part last (zeros the first
            time); ``noise``: normal numbers as long as that.
        scale: on the last two.
    """

    sends: Literal["zeros", "last_difference", "noise"] = "last_difference"
    scale: Positive = 1.0


class Sybil(Hostile, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="sybil"):
    """One attacker enrols `identities` devices with neighbouring numbers, which all send its one change.

    Args:
        share: of such groups. With `devices`, all of them belong to one attacker.
        variation: normal numbers of this length, relative to the change's, make each identity's change its own.
    """

    identities: Annotated[int, Meta(ge=2, le=10_000)] = 10
    variation: AtLeastZero = 0.0


class Replay(Hostile, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="replay"):
    """Sends sealed updates again `after_s` later, under its own topic and a new number.

    Args:
        whose: ``own``, its ``neighbour``'s (the device with the next number), or ``both``.
    """

    after_s: Positive = 5.0
    whose: Literal["own", "neighbour", "both"] = "both"


Attacker = SignFlip | ScalingBackdoor | LabelFlip | FreeRider | Sybil | Replay
KINDS: dict[str, type[Any]] = {
    str(kind.__struct_config__.tag): kind for kind in (SignFlip, ScalingBackdoor, LabelFlip, FreeRider, Sybil, Replay)
}
