"""Why a secure round does not come to its sum."""

from __future__ import annotations

import enum

from fl_protocol.errors import ProtocolError


class UnmaskRefusal(str, enum.Enum):
    """Why a helper does not add up masks."""

    TOO_FEW = "too_few"
    TOO_MANY = "too_many"
    UNSIGNED = "unsigned"
    DUPLICATE = "duplicate"
    OTHER_ROUND = "other_round"
    WRONG_SEED = "wrong_seed"
    SECOND_LIST = "second_list"
    UNKNOWN_KEY = "unknown_key"
    BAD_MANIFEST = "bad_manifest"
    REVOKED_DEVICE = "revoked_device"


class UnmaskRefusedError(ProtocolError):
    """A helper does not answer; nothing of any update was revealed.

    Args:
        reason: for programs.
        detail: for people.
    """

    def __init__(self, reason: UnmaskRefusal, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason, self.detail = reason, detail


class MaskSumError(ProtocolError):
    """A helper's answer does not lead to a sum of updates."""
