"""What a device says of itself where its study's broker and operator can read it: that it is there, and why it rests.

Security: the reason is one of six words about the board, as of set times. It must not show what the device has
recorded, what its ledger has left, whether a coin said yes, or what other studies do; so it is read whether or not
there is anything to train, by a reading of its own, and the times follow from the name on the wire alone. Two names of
one device have different times. Between them nothing is said: what came and went is not told.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from device_client.eligibility import Blocked
from device_client.events import Publish
from device_client.session_config import SessionConfig
from fl_protocol.messages import PresenceMsg, PresenceReason, encode
from fl_protocol.topics import state_topic

_REASONS: dict[str, PresenceReason] = {
    "battery": "battery",
    "charging": "charger",
    "idle": "idle",
    "network": "network",
    "temperature": "temperature",
    "time_window": "hours",
}


class Presence:
    """One name's presence. Pure.

    Args:
        config: who it is.
    """

    def __init__(self, config: SessionConfig) -> None:
        self._config = config
        self._every_s = config.tells_why_every_s
        phase = int.from_bytes(hashlib.sha256(f"presence {config.device}".encode()).digest()[:8], "big") / 2**64
        self._phase_s = phase * self._every_s
        self._reason: PresenceReason = ""
        self.due_s = -math.inf if self._every_s else math.inf
        """When the reason is to be looked at again, Unix seconds."""

    def online(self) -> Publish:
        """What is said at each connection: that it is there, and what was last found."""
        return self._publish(PresenceMsg(state="online", software=self._config.software, reason=self._reason))

    def offline(self) -> Publish:
        """The last will, and the goodbye."""
        return self._publish(PresenceMsg(state="offline", software=self._config.software))

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to look; also when the clock was set back."""
        return now_s >= self.due_s or self.due_s - now_s > self._every_s > 0

    def take(self, reason: PresenceReason, now_s: float) -> list[Publish]:
        """What was found; it is said if it is something else than before.

        Args:
            reason: as of now.
            now_s: Unix seconds.
        """
        before, self._reason = self._reason, reason
        passed = math.floor((now_s - self._phase_s) / self._every_s)
        self.due_s = (passed + 1) * self._every_s + self._phase_s
        return [self.online()] if reason != before else []

    def _publish(self, message: PresenceMsg) -> Publish:
        return Publish(state_topic(self._config.tenant, self._config.device), encode(message), retain=True)


def reason_of(blocked: Sequence[Blocked]) -> PresenceReason:
    """The first rule that blocks, as it is told; empty if none does."""
    return _REASONS[blocked[0].rule] if blocked else ""
