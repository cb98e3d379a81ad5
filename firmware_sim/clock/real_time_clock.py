"""`device_client.ports.Clock` as a cheap quartz shows it: it drifts, jumps, stands in a time zone, and is corrected at
times. Pure.

A watch crystal of 20 ppm, a common grade, is wrong by 1.7 s a day; NTP over the internet leaves tens of milliseconds
(RFC 5905, section 1) and polls every 64 to 1,024 s or more (section 7.2).

What the clock shows follows from true time, its corrections, and its key: however often it is read, and whoever else is
simulated.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from firmware_sim.labelled_chance import key_of, uniform
from fl_protocol.errors import LocalMisuseError

_DAY_S = 86_400
_STATE = struct.Struct("<dd")
_JUMPS, _WHEN, _HOW_FAR, _NTP = range(4)


class ClockModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What kind of clock it is.

    Args:
        drift_ppm: how much too fast it runs, in millionths; negative: too slow.
        utc_offset_s: of the wearer's time zone, -43,200 to 50,400.
        jumps_per_day: probability that it jumps in a day, at a moment of that day.
        jump_s: farthest such a jump goes, forwards or backwards.
        ntp: whether it is set when the device is connected.
        ntp_error_s: most it is wrong after that.
        ntp_every_s: it is set again after so long at the earliest.
    """

    drift_ppm: float = 0.0
    utc_offset_s: Annotated[float, Meta(ge=-43_200, le=50_400)] = 0.0
    jumps_per_day: Annotated[float, Meta(ge=0, le=1)] = 0.0
    jump_s: Annotated[float, Meta(ge=0)] = 0.0
    ntp: bool = True
    ntp_error_s: Annotated[float, Meta(ge=0)] = 0.05
    ntp_every_s: Annotated[float, Meta(ge=1)] = 1024.0

    def __post_init__(self) -> None:
        # msgspec checks ranges of what it decodes only.
        if not -43_200 <= self.utc_offset_s <= 50_400:
            raise LocalMisuseError(f"utc_offset_s: expected -43200 to 50400, got {self.utc_offset_s!r}")
        if not 0 <= self.jumps_per_day <= 1:
            raise LocalMisuseError(f"jumps_per_day: expected 0 to 1, got {self.jumps_per_day!r}")
        if not -1e6 < self.drift_ppm < 1e6:
            raise LocalMisuseError(f"drift_ppm: expected within ±1,000,000, got {self.drift_ppm!r}")


class RealTimeClock:
    """One device's clock.

    Args:
        model: of the clock.
        true_s: true virtual Unix seconds.
        began_s: when it was right, but for `error_s`.
        error_s: how much it was ahead then.
        jumps: (when, by how many seconds) it jumps for certain, such as from a fault plan.
        seed: of the run.
        device: its name.
    """

    __slots__ = ("_asked", "_error_s", "_jumps", "_key", "_model", "_set_s", "_true_s", "_whole_days")

    def __init__(
        self,
        model: ClockModel,
        *,
        true_s: Callable[[], float],
        began_s: float,
        error_s: float = 0.0,
        jumps: Sequence[tuple[float, float]] = (),
        seed: int | str,
        device: str,
    ) -> None:
        self._model, self._true_s, self._key = model, true_s, key_of(seed, "clock", device)
        self._jumps = tuple(sorted(jumps))
        self._set_s, self._error_s = began_s, error_s
        self._whole_days: tuple[int, float] | None = None
        self._asked = -math.inf, 0.0

    def now_s(self) -> float:
        """Unix seconds, as this clock has them."""
        true_s = self._true_s()
        return true_s + self.error_at(true_s)

    def local_time_s(self) -> float:
        """Seconds since local midnight, as this clock has them."""
        return (self.now_s() + self._model.utc_offset_s) % _DAY_S

    def error_at(self, true_s: float) -> float:
        """How much it is ahead at a true time, which is not before it was last set."""
        if true_s != self._asked[0]:  # a daemon looks at its clock many times in a turn
            self._asked = true_s, self._error_at(true_s)
        return self._asked[1]

    def _error_at(self, true_s: float) -> float:
        """As `error_at`, computed."""
        drifted_s = (true_s - self._set_s) * self._model.drift_ppm * 1e-6
        planned_s = sum(by_s for at_s, by_s in self._jumps if self._set_s < at_s <= true_s)
        return self._error_s + drifted_s + planned_s + self._jumped_by_chance(true_s)

    def connected(self) -> bool:
        """The device is connected now: the clock is set, if it can be and was not lately; whether it was."""
        true_s, model = self._true_s(), self._model
        if not model.ntp or true_s - self._set_s < model.ntp_every_s:
            return False
        chance = uniform(self._key, _NTP, math.floor(true_s))
        self._set_s, self._error_s, self._whole_days = true_s, model.ntp_error_s * (2 * chance - 1), None
        self._asked = -math.inf, 0.0
        return True

    def state(self) -> bytes:
        """What has to be kept while the device sleeps: 16 bytes."""
        return _STATE.pack(self._set_s, self._error_s)

    def restore(self, state: bytes) -> None:
        """Go on where `state` was taken.

        Raises:
            LocalMisuseError: it is not such a state.
        """
        if len(state) != _STATE.size:
            raise LocalMisuseError(f"state: expected {_STATE.size} bytes, got {len(state)}")
        self._set_s, self._error_s = _STATE.unpack(state)
        self._whole_days, self._asked = None, (-math.inf, 0.0)

    def _jumped_by_chance(self, true_s: float) -> float:
        """Sum of the jumps since it was last set."""
        if not self._model.jumps_per_day:
            return 0.0
        first, today = math.floor(self._set_s / _DAY_S), math.floor(true_s / _DAY_S)
        # Days that are over are added once, in their order, so that the sum does not depend on when it is asked for.
        day, total_s = self._whole_days if self._whole_days is not None else (first, 0.0)
        if day > today:
            day, total_s = first, 0.0
        while day < today:
            total_s += self._jump_of(day, true_s)
            day += 1
        self._whole_days = (day, total_s)
        return total_s + self._jump_of(today, true_s)

    def _jump_of(self, day: int, true_s: float) -> float:
        """One day's jump, if it has one that has happened since the clock was set."""
        if uniform(self._key, _JUMPS, day) >= self._model.jumps_per_day:
            return 0.0
        at_s = (day + uniform(self._key, _WHEN, day)) * _DAY_S
        return self._model.jump_s * (2 * uniform(self._key, _HOW_FAR, day) - 1) if self._set_s < at_s <= true_s else 0.0
