"""Whether the device may train now: the board's readings, the rules over them, and how often they are looked at."""

from __future__ import annotations

import math

from device_client.config import EligibilityConfig
from device_client.eligibility import Blocked, Conditions, Eligibility, EligibilityPolicy, parse_window
from device_client.ports import Board, Clock
from device_client.presence import reason_of
from fl_protocol.messages import PresenceReason
from fl_protocol.recency import happened_within

HOLDING_RULES = frozenset({"network", "battery"})
"""What keeps large updates from being sent, too."""

READ_EVERY_S = 15.0
"""How old a reading may be while a study waits or trains."""


class Readiness:
    """Reads the board when it matters and is long enough ago.

    Args:
        board: the readings.
        clock: for times of day.
        config: the wearer's rules.

    Raises:
        LocalMisuseError: a time window cannot be read.
    """

    def __init__(self, board: Board, clock: Clock, config: EligibilityConfig) -> None:
        self._board, self._clock = board, clock
        self._policy = policy_of(config)
        self._eligibility, self._has_hours = Eligibility(self._policy), bool(config.windows)
        self._read_s = -math.inf
        self.conditions = Conditions()
        self.blocked: tuple[Blocked, ...] = ()

    def look(self) -> tuple[str, ...]:
        """Why the device may not train, in words, from a reading that is at most `READ_EVERY_S` old."""
        now_s = self._clock.now_s()
        if not happened_within(READ_EVERY_S, self._read_s, now_s):  # also when the clock was set back
            self._read_s = now_s
            self.conditions = self._board.read()
            self.blocked = self._eligibility.update(
                self.conditions, now_s=now_s, local_time_s=self._clock.local_time_s()
            )
        return tuple(blocked.reason for blocked in self.blocked)

    def reason(self) -> PresenceReason:
        """Why the device may not train by a reading made now, and as if it were the first: for its presence.

        It neither uses nor changes what `look` remembers. How often that looks depends on whether there is something to
        train, and so on the ledger and the records; nothing of that may show in what is told.
        """
        now_s, local_time_s = self._clock.now_s(), self._clock.local_time_s()
        first = Eligibility(self._policy)
        return reason_of(first.update(self._board.read(), now_s=now_s, local_time_s=local_time_s))

    @property
    def changes_by_itself(self) -> bool:
        """Whether time alone may change the answer: a condition has to last, or only some hours of the day will do."""
        return self._eligibility.is_settling or self._has_hours

    @property
    def holds_uploads(self) -> bool:
        """Whether, as of the last look, large updates are better not sent now."""
        return any(blocked.rule in HOLDING_RULES for blocked in self.blocked)


def policy_of(config: EligibilityConfig) -> EligibilityPolicy:
    """The rules that a configuration asks for. Raises LocalMisuseError."""
    return EligibilityPolicy(
        minimum_battery_percent=config.minimum_battery_percent,
        charging_lifts_battery_floor=config.charging_lifts_battery_floor,
        require_charging=config.require_charging,
        require_idle=config.require_idle,
        require_unmetered=config.require_unmetered,
        maximum_temperature_celsius=config.maximum_temperature_celsius,
        windows=tuple(parse_window(text) for text in config.windows),
    )
