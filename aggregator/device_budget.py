"""What a task's rounds have cost a device, and whether its budget has room for the next one.

What happened is read from the database: a round counts from when its helpers were asked for their masks, whatever came
of it then, with as many updates as had arrived. Before a round opens it is taken to get the fewest that it would be
committed with. Costs, filter and adversaries: `aggregator.privacy`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from aggregator.errors import AggregatorError, DatabaseError
from aggregator.privacy.accounting import device_epsilon
from aggregator.privacy.adversaries import Adversary
from aggregator.privacy.composition import Limits
from aggregator.privacy.events import HelperNoise, SecureSum, SkellamShares
from aggregator.privacy.filter import DeviceBudget
from aggregator.secure_sections import DevicePrivacy
from aggregator.secure_terms import NEXT_CLIP, noise_sigma, terms_of
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.rounds import AskedRound
from aggregator.task_file import TaskConfig
from fl_protocol.errors import CoveyError, LocalMisuseError
from fl_protocol.messages import RoundManifestMsg, decode
from fl_protocol.secagg.messages import SecureTermsMsg
from fl_protocol.secagg.terms import fixed_point_of, helper_keys

DELTA = 1e-6
"""Of the figures that are shown for a task without a budget."""


class TaskBudget:
    """The device-level account of one secure task.

    Args:
        store: the database.
        config: of the task; without the engine secure there is no account.
        update_length: numbers in an update.
    """

    def __init__(self, store: AggregatorStore, config: TaskConfig, *, update_length: int) -> None:
        self._store, self._config, self._update_length = store, config, update_length
        self._budget = None if config.device_privacy is None else budget_of(config, config.device_privacy)

    @property
    def limits(self) -> Limits:
        """What an honest device keeps to."""
        return limits_of(self._config)

    def events(self) -> list[SecureSum]:
        """Every sum that the aggregator asked for, in the order of the rounds. Raises DatabaseError."""
        if self._config.secure is None:
            return []
        return in_order([self._event(asked) for asked in self._store.rounds.asked(self._config.name)])

    def why_not_another(self, number: int, *, opens_s: float) -> str:
        """Why the budget has no room for a round; empty if it has, or if there is none.

        Args:
            number: of the round that would open.
            opens_s: when, Unix seconds.

        Raises:
            DatabaseError: what happened so far cannot be read.
        """
        return self._why_not(lambda: self._next(number, opens_s))

    def why_not_ask(self, number: int, *, asked_s: float, arrived: int) -> str:
        """Why the budget has no room for the sum of a round as it went; empty if it has, or if there is none.

        Args:
            number: of the round, which takes no more updates.
            asked_s: when its helpers would be asked, Unix seconds.
            arrived: updates in the sum.

        Raises:
            DatabaseError: what happened so far cannot be read.
        """
        rounds = self._store.rounds.live() if self._budget is not None else []
        for one in rounds:
            if (one.task, one.number) == (self._config.name, number) and one.manifest is not None:
                opened_s = decode(one.manifest, RoundManifestMsg).opened_s
                asked = AskedRound(number, one.manifest, opened_s, asked_s, arrived, self._update_length)
                return self._why_not(partial(self._event, asked))
        return ""

    def _why_not(self, following: Callable[[], SecureSum]) -> str:
        """Why a sum cannot follow those so far within the budget. Raises DatabaseError."""
        if self._budget is None:
            return ""
        try:
            *before, last = in_order([*self.events(), following()])
            why = self._budget.admits(before, last)
        except DatabaseError:
            raise
        except CoveyError as error:
            return f"the device-level budget cannot be accounted: {error}"
        if not why:
            return ""
        return f"the task's device-level budget is spent: {why}. No further round opens; the model stays as it is"

    def epsilon(self, name: str, *, delta: float = DELTA) -> float:
        """What all rounds so far have cost a device against `aggregator` or `model_release`; infinite without noise."""
        adversary = adversary_of(self._config.device_privacy, name)
        return device_epsilon(self.events(), delta=delta, adversary=adversary, limits=self.limits)

    def course(self, name: str, *, delta: float = DELTA, most: int = 100) -> list[tuple[int, float]]:
        """What it had cost after each round, as `epsilon`; after every few rounds where there are more than `most`."""
        events, adversary = self.events(), adversary_of(self._config.device_privacy, name)
        step = max(1, -(-len(events) // most))
        ends = [*range(step, len(events), step), len(events)] if events else []
        return [
            (events[end - 1].round, device_epsilon(events[:end], delta=delta, adversary=adversary, limits=self.limits))
            for end in ends
        ]

    def _event(self, asked: AskedRound) -> SecureSum:
        """What happened in a round; of one that was lost, the most that can have."""
        if asked.manifest is None:
            during = (asked.opened_s, asked.asked_s)
            return self._fewest(asked.number, during, length=asked.update_length)
        manifest = decode(asked.manifest, RoundManifestMsg)
        if manifest.secure is None:
            raise AggregatorError(f"round {asked.number} of {self._config.name} has no secure terms in the database")
        names = tuple(helper_keys(manifest.secure))
        return self._sum(
            manifest.secure,
            names,
            number=asked.number,
            arrived=asked.arrived,
            during=(min(manifest.opened_s, asked.opened_s), asked.asked_s),
            length=asked.update_length,
        )

    def _next(self, number: int, opens_s: float) -> SecureSum:
        """A round as it would be with the fewest updates. Raises LocalMisuseError."""
        return self._fewest(number, (opens_s, opens_s + self._config.round_duration_s), length=self._update_length)

    def _fewest(self, number: int, during: tuple[float, float], *, length: int) -> SecureSum:
        """A round with the fewest updates that it would be asked for, which hide each other least."""
        config, secure = self._config, self._config.secure
        if secure is None:
            raise LocalMisuseError("a device-level budget needs the engine secure")
        clip = None if secure.adaptive_clipping is None else self._store.rounds.last_metric(config.name, NEXT_CLIP)
        terms = terms_of(config, secure, length, helpers=[b""], clip=clip)
        return self._sum(terms, ("helper",), number=number, arrived=config.minimum_cohort, during=during, length=length)

    def _sum(
        self,
        terms: SecureTermsMsg,
        helpers: tuple[str, ...],
        *,
        number: int,
        arrived: int,
        during: tuple[float, float],
        length: int,
    ) -> SecureSum:
        """The event of a round with these terms."""
        variance, secure, sigma = terms.device_noise_variance, self._config.secure, 0.0
        if secure is not None and secure.noise_from == "aggregator":
            sigma = noise_sigma(self._config, secure, length, clip=terms.l2_norm_clip)
        point = fixed_point_of(terms, length)
        return SecureSum(
            round=number,
            opened_s=min(during),
            closed_s=max(during),
            l2_sensitivity=point.norm_bound,
            dimension=point.vector_length,
            shares=SkellamShares(variance, arrived) if variance else None,
            helpers=tuple(HelperNoise(name, terms.helper_noise_sigma) for name in helpers),
            central_sigma=sigma,
        )


def in_order(events: Sequence[SecureSum]) -> list[SecureSum]:
    """Events with times that ascend, whatever was done to the clock meanwhile.

    A round is taken to have opened no later than any after it, and to have closed no sooner than any before it: that
    only allows a device more rounds than it can have been in.
    """
    opened = list(itertools.accumulate(reversed([one.opened_s for one in events]), min))[::-1]
    closed = itertools.accumulate((one.closed_s for one in events), max)
    return [
        replace(one, opened_s=opened_s, closed_s=closed_s)
        for one, opened_s, closed_s in zip(events, opened, closed, strict=True)
    ]


def limits_of(config: TaskConfig) -> Limits:
    """What an honest device keeps to in a task."""
    wanted = config.participation
    return Limits(wanted.most_participations, wanted.minimum_separation_s)


def budget_of(config: TaskConfig, section: DevicePrivacy) -> DeviceBudget:
    """A task's budget."""
    return DeviceBudget(section.epsilon, section.delta, adversary_of(section, section.adversary), limits_of(config))


def adversary_of(section: DevicePrivacy | None, name: str) -> Adversary:
    """Who looks, with those that a task assumes to be on their side."""
    if name not in ("aggregator", "model_release"):
        raise LocalMisuseError(f"adversary: expected aggregator or model_release, got {name!r}")
    share = 0.0 if section is None else section.colluding_share
    return Adversary(name=name, colluding_share=share)  # type: ignore[arg-type]
