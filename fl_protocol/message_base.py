"""What every message is made of: its base class, the types of its fields, and checks that types cannot express.

`RecipientKeyMsg` stands here because manifests and helpers' keys both hold one.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fl_protocol.limits import MAX_PARAMETERS
from fl_protocol.topics import NAME_PATTERN

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
UpdateId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
RoundNumber = Annotated[int, Meta(ge=1, le=2**31 - 1)]
ParameterCount = Annotated[int, Meta(ge=1, le=MAX_PARAMETERS)]
Positive = Annotated[float, Meta(gt=0)]
Seconds = Annotated[float, Meta(ge=0, le=1e11)]
Version = Literal[1]


class Msg(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every message has: the protocol version."""

    v: Version = 1


KemName = Literal["mlkem768-x25519", "x25519"]


class RecipientKeyMsg(Msg, frozen=True):
    """The HPKE public key of one round, or of a helper: raw bytes in the KEM's own encoding (RFC 9180, section 4)."""

    kem: KemName
    public_key: Annotated[bytes, Meta(min_length=32, max_length=1216)]


def require_finite(**values: float) -> None:
    """Refuse infinities (a NaN already fails the range in the type). Raises ValueError."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
