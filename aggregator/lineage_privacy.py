"""Which rounds are behind each version of a task's model, and what they have cost a wearer at most.

Follows parents, so that what was rolled back is left out, and goes on in the task that the first version was taken
from (``start_from``). What a figure means: `aggregator.record_privacy`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from aggregator.errors import AggregatorError
from aggregator.in_force import config_of
from aggregator.record_privacy import record_epsilon
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.models import ModelOrigin
from fl_protocol.plans import PlanMsg

DELTA = 1e-5


@dataclass(frozen=True)
class Lineage:
    """The versions of one task.

    Args:
        plan: of its rounds; None for a task that has no file yet.
        parents: of each version; None for the first.
        rounds: how many rounds are behind each version.
        earlier: plans and rounds behind the first version.
    """

    plan: PlanMsg | None
    parents: dict[int, int | None]
    rounds: dict[int, int]
    earlier: tuple[tuple[PlanMsg | None, int], ...] = ()

    def line(self, version: int) -> list[int]:
        """A version, the one it came from, and so on to the first."""
        line, at = [], version if version in self.parents else None
        while at is not None:
            line.append(at)
            at = self.parents[at]
        return line

    def spent(self, version: int) -> tuple[float | None, str]:
        """What the rounds behind a version have cost at most: epsilon at `DELTA` if it can be told, and words."""
        behind = [(self.plan, self.rounds[version]), *self.earlier]
        count = sum(rounds for _, rounds in behind)
        return spent_on(behind, who=f"one record of a device that took part in all {count} rounds behind it")


def spent_on(rounds: Sequence[tuple[PlanMsg | None, int]], *, who: str) -> tuple[float | None, str]:
    """What rounds have cost at most: epsilon at `DELTA` if it can be told, and words.

    Args:
        rounds: plans, and how many rounds of each.
        who: whom they have cost it, for the words.
    """
    spent = [(plan, count) for plan, count in rounds if count]
    known = [(plan, count) for plan, count in spent if plan is not None]
    if len(known) < len(spent):
        return None, "cannot be told: a task behind it is from before tasks had files (covey-aggregator task create)"
    try:
        epsilon = _epsilon(*known[0], earlier=tuple(known[1:])) if known else 0.0
    except AggregatorError as error:  # dp-accounting is missing: no reason to hide all the rest
        return None, str(error)
    if math.isinf(epsilon):
        return None, f"no noise, so no bound for {who}"
    return epsilon, f"epsilon at most {epsilon:.3g} at delta {DELTA:g} for {who}"


@functools.lru_cache(maxsize=10_000)
def _epsilon(plan: PlanMsg, rounds: int, *, earlier: tuple[tuple[PlanMsg, int], ...]) -> float:
    """Epsilon at `DELTA`, computed once: a list of versions asks it of each, every time it is looked at."""
    return record_epsilon(plan, rounds, delta=DELTA, earlier=earlier)


def lineage_of(store: AggregatorStore, task: str) -> Lineage:
    """A task's versions. Raises DatabaseError, also when there is no such task."""
    spec, records = store.tasks.get(task).spec, store.models.origins(task)
    config = config_of(spec, task) if spec else None
    rounds: dict[int, int] = {}
    for record in records:
        before = rounds[record.parent] if record.parent is not None else 0
        rounds[record.version] = before + (record.origin == "round")
    parents = {one.version: one.parent for one in records}
    if config is None:
        return Lineage(None, parents, rounds)
    start, _, _ = (config.start_from or "").partition("/")
    earlier = _behind(store, start, first=records[0]) if start else ()
    return Lineage(config.plan_message(), parents, rounds, earlier)


def _behind(store: AggregatorStore, task: str, *, first: ModelOrigin) -> tuple[tuple[PlanMsg | None, int], ...]:
    """What is behind the version of another task that a task began with, told by its digest.

    Of several versions with the same parameters the one with most rounds: the figure is never too small.
    """
    other = lineage_of(store, task)
    same = [one.version for one in store.models.origins(task) if one.digest == first.digest]
    return ((other.plan, max((other.rounds[version] for version in same), default=0)), *other.earlier)
