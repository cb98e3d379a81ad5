"""Renewal in the daemon: before a study's last names end, its desk is asked for further ones.

It rides on the study's own connection, under its present name. Where that has been out of reach for a day, or there is
no name left to connect by, the desk is asked where the device once joined, under a name that is drawn for it: so a
device that was off for months comes back, and one that was thrown out learns why. Ledger, outbox and recordings have
nothing to do with it. Without the wearer's consent nobody is asked anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from device_client.delivery import uniform
from device_client.device_ports import DevicePorts
from device_client.events import Tick
from device_client.joining.joiner import Joiner
from device_client.joining.records import RENEWED_PERIODS, JoiningState
from device_client.joining.session import Offline, Online
from device_client.joining.words import refusal_words
from device_client.ports import Clock, Transport
from device_client.pseudonyms import Pseudonym, Pseudonyms, date_text
from device_client.study_runner import StudyRunner
from fl_protocol.enrolment import DAY_S
from fl_protocol.integer_noise import Entropy
from fl_protocol.joining import Claim
from fl_protocol.recency import happened_within
from fl_protocol.transport import Connected, Disconnected, Received

OUT_OF_REACH_S = float(DAY_S)
"""How long the study's broker is tried before the desk is asked another way."""
ASK_AGAIN_S = float(DAY_S)
"""After a refusal: whoever refused may have changed their mind."""
GRACE_S = 7200.0
"""A machine that slept has had no chance to connect: it is given so long."""
SPREAD_S = 7.0 * DAY_S
"""Over how long the devices of a study, whose names all end at once, spread their renewals."""
CALL_LASTS_S = 600.0
CALL_PAUSE_S = 3600.0
"""How long a connection to the desk alone is kept up without an answer, and how long until the next."""
_LOOK_S = 60.0


class StudyRenewal:
    """One study's renewals; see the module docstring.

    Args:
        joiner: of the study.
        connect: a transport to the broker of a claim under a client id, opened by the caller. Raises CoveyError.
        may_ask: whether the wearer's consent holds.
        changed: told when the device was thrown out, or was taken back.
        jitter: spreads renewals, and draws client ids.
    """

    def __init__(
        self,
        joiner: Joiner,
        *,
        connect: Callable[[Claim, str], Transport],
        may_ask: Callable[[], bool],
        changed: Callable[[], None],
        clock: Clock,
        jitter: Entropy,
    ) -> None:
        self.joiner = joiner
        self._connect, self._may_ask, self._changed = connect, may_ask, changed
        self._clock, self._jitter = clock, jitter
        self._was_out = self.is_out
        self._call: Transport | None = None
        self._called_s: float | None = None
        self._pause_s = 0.0
        self._reached_s: float | None = None
        self._stepped_s = -math.inf
        self._client = ""
        self._spread: float | None = None

    @property
    def is_out(self) -> bool:
        """Whether the study's operator has thrown this device out."""
        state = self.joiner.state
        return state is not None and state.is_out

    @property
    def why_out(self) -> str:
        """Why, and what to do; empty where it was not thrown out."""
        state = self.joiner.state
        return refusal_words(state.study, state.refusal) if state is not None and state.is_out and state.refusal else ""

    def step(self, runner: StudyRunner | None) -> bool:
        """Do what is due; whether anything came.

        Args:
            runner: of the study; None while it does not run.
        """
        if not self.joiner.is_enrolled:
            return False
        now_s, is_up = self._clock.now_s(), runner is not None and runner.session.view().connected
        self._note_reach(now_s, is_up=is_up)
        busy = self._listen(now_s)
        if runner is not None and is_up:
            self._hang_up()
            self._ride(runner, now_s)
        else:
            self._left_alone(runner, now_s)
        if self.is_out != self._was_out:
            self._was_out = self.is_out
            self._changed()
            busy = True
        return busy

    def _note_reach(self, now_s: float, *, is_up: bool) -> None:
        """Since when the study's own connection is not there."""
        if is_up or self._reached_s is None or self._reached_s > now_s:  # a clock that was set back
            self._reached_s = now_s
        elif now_s - self._stepped_s > GRACE_S:
            self._reached_s = max(self._reached_s, now_s - OUT_OF_REACH_S + GRACE_S)
        self._stepped_s = now_s

    def close(self) -> None:
        """Hang up."""
        self._hang_up()

    def next_wake_s(self) -> float:
        """When there is something to do that no message brings, Unix seconds; infinity where there is nothing."""
        session, now_s = self.joiner.session, self._clock.now_s()
        if session is None or not self.joiner.is_enrolled:
            return math.inf
        if self._call is not None:
            return now_s + 1.0
        if session.is_asking:
            return now_s + (max(1.0, session.waits_s(now_s)) if session.client else _LOOK_S)
        wakes_s = [self._due_s(session.state, now_s)]
        if self._reached_s is not None and self._reached_s < now_s:
            wakes_s.append(self._reached_s + OUT_OF_REACH_S)
        return max(now_s + _LOOK_S, min(wakes_s))

    def describe(self) -> str:
        """What there is to say of the enrolment, in a line; empty for a study that was not joined by one."""
        state, lasts_s = self.joiner.state, self.joiner.names.lasts_until_s()
        if state is None or state.membership is None:
            return ""
        enrolled = f"enrolled as {state.membership.enrolment[:9]}..."
        until = "no names are left" if lasts_s is None else f"names until {date_text(lasts_s)}"
        if state.refusal is not None:
            return f"{enrolled}, {until}; renewal refused: {refusal_words(state.study, state.refusal)}"
        if self.joiner.is_asking:
            return f"{enrolled}, {until}; further names are being asked for"
        return f"{enrolled}, {until}, renewed from {date_text(renewed_from_s(self.joiner))} on"

    def _due_s(self, state: JoiningState, now_s: float) -> float:
        """When the desk is asked next, Unix seconds."""
        if state.refusal is not None:
            waits = happened_within(ASK_AGAIN_S, state.refusal.at_s, now_s)
            return state.refusal.at_s + ASK_AGAIN_S if waits else now_s
        if state.request is not None:
            return now_s
        if self.joiner.names.waiting:  # asked for by file, which its answer ends
            return math.inf
        from_s = renewed_from_s(self.joiner)
        if now_s < from_s:
            return from_s
        if self._spread is None:
            self._spread = uniform(self._jitter) * min(SPREAD_S, _period_s(self.joiner) / 4)
        return from_s + self._spread

    def _is_asking(self, now_s: float, *, anyway: bool) -> bool:
        """Whether a request is open, or is opened now because one is due, or `anyway`."""
        state = self.joiner.state
        if state is None:
            return False
        is_due = self._due_s(state, now_s) <= now_s or (anyway and state.refusal is None)
        if is_due and not self.joiner.is_asking:
            if state.request is not None and state.request.token is None:
                self.joiner.ask_again()
            elif not self.joiner.names.waiting or state.request is not None:
                self.joiner.open_renewal()
        return self.joiner.is_asking

    def _ride(self, runner: StudyRunner, now_s: float) -> None:
        """Ask on the study's own connection."""
        if not self._is_asking(now_s, anyway=False):
            return
        if self.joiner.client != runner.participant.device:
            self.joiner.tell(Online(runner.participant.device), runner.transport)
        self.joiner.tell(Tick(), runner.transport)

    def _left_alone(self, runner: StudyRunner | None, now_s: float) -> None:
        """The study's own connection is not there."""
        if self._call is not None:
            return
        self.joiner.tell(Offline(), None)
        is_lost = not happened_within(OUT_OF_REACH_S, self._reached_s, now_s)
        has_no_name = runner is None and not self._has_name(now_s)
        if not (is_lost or has_no_name) or happened_within(self._pause_s or 1.0, self._called_s, now_s):
            return
        if not self._may_ask() or not self._is_asking(now_s, anyway=is_lost):
            return
        if self.joiner.session is not None and self.joiner.session.is_told_to_wait(now_s):
            return
        self._dial(now_s)

    def _has_name(self, now_s: float) -> bool:
        """Whether there is a name to connect by, and it may be used."""
        return not self.is_out and isinstance(self.joiner.names.current(now_s), Pseudonym)

    def _dial(self, now_s: float) -> None:
        """Connect to the desk alone; under the same client id as before, so that the same bytes are sent."""
        state = self.joiner.state
        if state is None or state.request is None:
            return
        self._called_s, self._pause_s = now_s, CALL_LASTS_S + CALL_PAUSE_S * (0.5 + uniform(self._jitter))
        self._client = state.request.client if state.request.client.startswith("c") else new_client(self._jitter)
        self._call = self._connect(state.claim, self._client)
        self._call.open()

    def _listen(self, now_s: float) -> bool:
        """What the desk says on a connection of its own; whether it said anything."""
        call, busy = self._call, False
        if call is None:
            return False
        while (event := call.poll(0.0)) is not None:
            busy = True
            match event:
                case Connected():
                    self.joiner.tell(Online(self._client), call)
                case Disconnected():
                    self.joiner.tell(Offline(), call)
                case Received():
                    self.joiner.tell(event, call)
        self.joiner.tell(Tick(), call)
        session = self.joiner.session
        is_over = session is None or not session.is_asking or session.is_told_to_wait(now_s)
        if is_over or not happened_within(CALL_LASTS_S, self._called_s, now_s):
            self._hang_up()
        return busy

    def _hang_up(self) -> None:
        """End the connection to the desk alone."""
        if self._call is not None:
            self._call.close()
            self._call = None
            self.joiner.tell(Offline(), None)


def study_renewal(
    ports: DevicePorts, names: Pseudonyms, *, study: str, may_ask: Callable[[], bool], changed: Callable[[], None]
) -> StudyRenewal:
    """What keeps the names of a study (``tenant/task``) from ending; arguments as `StudyRenewal`. Raises StoreError."""
    joiner = Joiner(
        ports.store,
        names,
        study=study,
        entropy=ports.entropy,
        jitter=ports.jitter,
        clock=ports.clock,
        journal=ports.journal,
    )
    return StudyRenewal(
        joiner, connect=ports.desk, may_ask=may_ask, changed=changed, clock=ports.clock, jitter=ports.jitter
    )


def new_client(entropy: Entropy) -> str:
    """A client id for asking where devices join: ``c`` and 128 random bits."""
    return "c" + entropy(16).hex()


def renewed_from_s(joiner: Joiner) -> float:
    """From when on the desk grants further names, Unix seconds; minus infinity where none are left."""
    lasts_s = joiner.names.lasts_until_s()
    return -math.inf if lasts_s is None else lasts_s - RENEWED_PERIODS * _period_s(joiner)


def _period_s(joiner: Joiner) -> float:
    """How long the last name's period is, seconds; a day where there is none."""
    installed = joiner.names.installed()
    return installed[-1].period.ends_s - installed[-1].period.begins_s if installed else float(DAY_S)
