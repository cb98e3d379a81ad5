"""When broker and aggregator of a fleet are away: planned faults, laid onto the windows of virtual time. Pure.

A fault begins with the first window that begins when it has struck, and takes at least one window.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from firmware_sim.faults.kinds import AggregatorKill, BrokerRestart
from firmware_sim.faults.plan import FaultSchedule, Strike
from firmware_sim.labelled_chance import bits

_MOST_STEPS = 4
_ROUNDING = 1e-6


class Services(NamedTuple):
    """What is away in a window.

    Args:
        broker_away, aggregator_away: whether it is.
        keeps_retained, keeps_sessions: whether a broker that is away will remember them.
        steps: that an aggregator takes on what has arrived before it is killed.
    """

    broker_away: bool = False
    aggregator_away: bool = False
    keeps_retained: bool = True
    keeps_sessions: bool = True
    steps: int = 0

    def lets_through(self, device: str) -> bool:
        """Whether a message that left the hub is still to come; of a broker that died only what it retains.

        Args:
            device: whom it is for; empty for one that is retained.
        """
        return not self.broker_away or (self.keeps_retained and not device)


RUNNING = Services()
"""Both are there."""


class _Span(NamedTuple):
    """A strike in windows, from `first` to before `end`."""

    first: int
    end: int
    strike: Strike


class ServicePlan:
    """See the module docstring.

    Args:
        schedule: what strikes the services.
        began_s, ends_s: the run's beginning and end, Unix seconds.
        every_s: length of a window.
    """

    def __init__(self, schedule: FaultSchedule, *, began_s: float, ends_s: float, every_s: float) -> None:
        self._spans = [_span(strike, began_s, every_s) for strike in schedule.strikes(began_s, ends_s)]

    def at(self, number: int) -> Services:
        """What is away in a window, which is counted from 0."""
        here = [span for span in self._spans if span.first <= number < span.end]
        broker = [span.strike.fault for span in here if isinstance(span.strike.fault, BrokerRestart)]
        kills = [span.strike.key for span in here if isinstance(span.strike.fault, AggregatorKill)]
        return Services(
            broker_away=bool(broker),
            aggregator_away=bool(kills),
            keeps_retained=all(fault.keep_retained for fault in broker),
            keeps_sessions=all(fault.keep_sessions for fault in broker),
            steps=bits(kills[0], 0) % _MOST_STEPS if kills else 0,
        )

    def next_change(self, number: int) -> float:
        """The first window after `number` in which something goes or comes back; infinity for none."""
        edges = [edge for span in self._spans for edge in (span.first, span.end) if edge > number]
        return min(edges, default=math.inf)


def _span(strike: Strike, began_s: float, every_s: float) -> _Span:
    """A strike in windows."""
    first = math.ceil((strike.starts_s - began_s) / every_s - _ROUNDING)
    end = math.ceil((strike.ends_s - began_s) / every_s - _ROUNDING)
    return _Span(first, max(end, first + 1), strike)
