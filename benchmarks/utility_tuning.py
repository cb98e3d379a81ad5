"""Settings for each fold, chosen on its training people alone: nested cross-validation over pairs of people. Pure.

For the fold in which people p are measured, a candidate is trained without p and without another fold's q, and measured
on q. A training without both says something about the candidate for fold p (measured on q) and for fold q (measured on
p), so ten trainings serve five folds. What was measured on p never has a say in the settings for p.

`secure` has no candidates of its own: it takes what was chosen for `central`, so a difference between the two is one
of mechanisms, and what tuning overfits it overfits for `central`.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

from benchmarks.utility_mechanisms import Arm
from benchmarks.utility_training import Job, LevelName, Outcome, Settings

FOLDS = ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10))
Fold = tuple[int, ...]
Candidates = Callable[[LevelName, float, Arm], list[Settings]]


def candidates(level: LevelName, epsilon: float, arm: Arm) -> list[Settings]:
    """What is tried: the same for every epsilon and arm."""
    if level == "record":
        # What a step can move a model by is the learning rate times the clip.
        tried = itertools.product((20, 40, 80), (0.25, 0.5), (0.375, 0.75, 1.5))
        return [Settings(rounds, clip, reach / clip) for rounds, clip, reach in tried]
    if level == "device_ten":
        few = itertools.product((1, 3, 8, 20), (0.5, 1.0, 2.0))
        return [Settings(rounds, clip, 1.0, local_steps=5, momentum=0.0) for rounds, clip in few]
    return [Settings(rounds, clip, 1.0) for rounds, clip in ((20, 1.0), (20, 2.0))]


def tuned_arm(arm: Arm) -> Arm:
    """Whose candidates an arm's settings are chosen among."""
    return "central" if arm == "secure" else arm


def partners(level: LevelName, fold: Fold) -> list[Fold]:
    """The other folds that a fold's candidates are measured on: all four; of the large fleet, its two neighbours."""
    at = FOLDS.index(fold)
    distances = (1, 4) if level == "device_thousand" else (1, 2, 3, 4)
    return [FOLDS[(at + distance) % len(FOLDS)] for distance in distances]


def tuning_jobs(level: LevelName, epsilon: float, tried: Candidates) -> list[Job]:
    """All trainings by which settings are chosen; none where there is no choice."""
    pairs = {_both(fold, other): None for fold in FOLDS for other in partners(level, fold)}
    return [
        Job(level, arm, epsilon, settings, pair, "tuning")
        for arm in ("local", "central")
        if len(tried(level, epsilon, arm)) > 1
        for settings in tried(level, epsilon, arm)
        for pair in pairs
    ]


def chosen(outcomes: dict[Job, Outcome], row: tuple[LevelName, float, Arm], fold: Fold, tried: Candidates) -> Settings:
    """The candidate with the best mean accuracy on people of other folds; the first of equals.

    Args:
        outcomes: of the jobs of `tuning_jobs`, among others.
        row: level, epsilon and arm.
        fold: for which.
        tried: the candidates.
    """
    level, epsilon, arm = row
    of = tuned_arm(arm)

    def score(settings: Settings) -> float:
        jobs = {
            other: Job(level, of, epsilon, settings, _both(fold, other), "tuning") for other in partners(level, fold)
        }
        return statistics.mean(outcomes[job].accuracy(other) for other, job in jobs.items())

    settings = tried(level, epsilon, of)
    return settings[0] if len(settings) == 1 else max(settings, key=score)


def _both(fold: Fold, other: Fold) -> Fold:
    return tuple(sorted(fold + other))
