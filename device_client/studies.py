"""Which studies run on a device: those the wearer granted, each under its present pseudonym.

New work is done only under the name whose period it is: when that ends, no other round is decided about, fetched or
trained under it. The name itself changes only when nothing is pending under it, or when it may not be used any longer;
so no update is lost to a change, and no round is taken part in twice. What an active broker can still do: keep receipts
back, so that one device changes late and alone, at the latest when the old name's certificate ends, and is recognised
by that under its next name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from device_client.config import PrivacyConfig, StudyConfig
from device_client.consent import Consents, terms_digest, terms_of
from device_client.errors import DeviceError
from device_client.ports import Clock
from device_client.study_runner import StudyRunner
from fl_protocol.adapters.journal import Journal
from fl_protocol.errors import CoveyError
from fl_protocol.recency import happened_within

LOOK_EVERY_S = 60.0
"""How often it is looked whether a study starts, stops or changes its name."""

LONGEST_ABSENCE_S = 3600.0
"""How long at most a study stays away when its name changes."""


class NoNameError(DeviceError):
    """There is no name on the wire to use now; the text says why and what to do."""


@dataclass(frozen=True)
class WireName:
    """A name on the wire, and until when it may be used.

    Args:
        device: the name.
        changes_s: when another takes over, Unix seconds; from then on this one only finishes and delivers.
        ends_s: when it may not be used any longer.
    """

    device: str
    changes_s: float
    ends_s: float


@dataclass
class _Study:
    """One configured study."""

    config: StudyConfig
    terms: str
    runner: StudyRunner | None = None
    name: WireName | None = None
    stands_still: str = ""
    away_until_s: float = -math.inf


class Studies:
    """All configured studies.

    Args:
        configs: of the studies.
        privacy: the wearer's limits, which are part of the terms.
        consents: what was granted.
        wire_name: the present name of a study, given the time. Raises NoNameError.
        start: makes a runner that goes by this name, and opens its connection. Raises CoveyError.
        connected: told now and then that a study's broker accepted it under its present name.
        change_delay_s: how long to stay away before coming back under another name, so that the two cannot be told to
            belong together by the time alone; drawn anew each time.
    """

    def __init__(
        self,
        configs: tuple[StudyConfig, ...],
        *,
        privacy: PrivacyConfig,
        consents: Consents,
        wire_name: Callable[[StudyConfig, float], WireName],
        start: Callable[[StudyConfig, WireName], StudyRunner],
        connected: Callable[[StudyConfig], None],
        change_delay_s: Callable[[], float],
        clock: Clock,
        journal: Journal,
    ) -> None:
        self._studies = [_Study(config, terms_digest(terms_of(config, privacy))) for config in configs]
        self._consents, self._wire_name, self._start = consents, wire_name, start
        self._connected, self._change_delay_s = connected, change_delay_s
        self._clock, self._journal = clock, journal
        self._looked_s = -math.inf

    @property
    def running(self) -> list[StudyRunner]:
        """Those that run."""
        return [study.runner for study in self._studies if study.runner is not None]

    @property
    def standing_still(self) -> dict[str, str]:
        """Those that do not, and why, in words."""
        return {study.config.study: study.stands_still for study in self._studies if study.runner is None}

    def next_change_s(self) -> float:
        """When a look next finds something new, Unix seconds, if nobody grants or withdraws anything."""
        if any(study.runner is None for study in self._studies):
            return self._looked_s + LOOK_EVERY_S
        names = [study.name for study in self._studies if study.name is not None]
        return min((min(name.changes_s, name.ends_s) for name in names), default=math.inf)

    def check(self) -> None:
        """Start what was granted, stop what was withdrawn, change names; if that is a while ago."""
        if not happened_within(LOOK_EVERY_S, self._looked_s, self._clock.now_s()):  # also when the clock was set back
            self._look()

    def look_again(self) -> None:
        """Something changed: have the next `check` look."""
        self._looked_s = -math.inf

    def stop(self, name: str, reason: str) -> None:
        """Stop one study at once."""
        for study in self._studies:
            if study.config.study == name:
                self._stop(study, reason)

    def _look(self) -> None:
        """Start what was granted, stop what was withdrawn, change names that are due."""
        now_s = self._looked_s = self._clock.now_s()
        for study in self._studies:
            try:
                problem = self._consents.problem(study.config.study, terms=study.terms)
                if problem:
                    self._stop(study, problem)
                elif study.runner is None:
                    if not 0 < study.away_until_s - now_s <= LONGEST_ABSENCE_S:  # a clock set back ends it too
                        self._begin(study, self._wire_name(study.config, now_s))
                elif self._must_change(study, now_s):
                    self._change_name(study, now_s)
                elif study.runner.session.view().connected:
                    self._connected(study.config)
            except CoveyError as error:
                self._stop(study, str(error))

    def stop_all(self) -> None:
        """Put everything aside and say goodbye; `check` would start it again."""
        for study in self._studies:
            if study.runner is not None:
                self._stop(study, "the daemon is stopped")
        self.look_again()

    def _begin(self, study: _Study, name: WireName) -> None:
        """Start a study under a name."""
        study.runner, study.name, study.stands_still = self._start(study.config, name), name, ""
        study.runner.session.take_new_rounds_until(name.changes_s)
        self._journal.write("study_started", at_s=self._clock.now_s(), study=study.config.study, device=name.device)

    def _must_change(self, study: _Study, now_s: float) -> bool:
        """Whether another name on the wire is due, and may be taken."""
        if study.name is None or study.runner is None or study.name.ends_s <= now_s:
            return True
        return study.name.changes_s <= now_s and study.runner.session.is_settled

    def _change_name(self, study: _Study, now_s: float) -> None:
        """Leave under the old name; come back a while later under the next."""
        if study.runner is not None:
            study.runner.retire()
        study.runner = None
        study.away_until_s = now_s + min(LONGEST_ABSENCE_S, self._change_delay_s())
        self._stop(study, "its name on the wire changes; it comes back within the hour")

    def _stop(self, study: _Study, reason: str) -> None:
        """Stop a study, and say why, once."""
        changed, study.stands_still = study.stands_still != reason, reason
        runner, study.runner = study.runner, None
        if runner is not None:
            runner.leave()
        if runner is not None or changed:
            self._journal.write("study_stopped", at_s=self._clock.now_s(), study=study.config.study, reason=reason)
