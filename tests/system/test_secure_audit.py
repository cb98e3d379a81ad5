"""What a secure round is found to leak, against what its account claims: an audit with one run.

T. Steinke, M. Nasr, M. Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, arXiv 2305.08846. Each of
m devices is a canary: a coin says whether it brings an update along a direction of its own, as long as the clip allows,
or zeros, which is the neighbouring relation of the account (`aggregator.privacy.accounting`). Whoever has the unmasked
sum guesses the coins, and leaves out those that are not clear. Under (epsilon, delta) so many right guesses have a
probability that their theorem 5.2 bounds; the largest epsilon under which what was found has a probability of at most
`FALSE_ALARM_RATE` is a lower bound.

The whole round is real: aggregator, helpers, database, wire; devices run `protected_update`. An account that is right
fails here with a probability of at most `FALSE_ALARM_RATE`. That a copy with a tenth of the noise, or none, is caught
says that the audit can fail: it takes 110 right guesses of 120, an honest round has 71 on average, and one with a tenth
of the noise 119 (never fewer than 110 in 4,000 rounds of a simulation with Gaussian noise). It is no close bound: a
fifth of the noise would go unnoticed three times in four.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from aggregator.device_budget import TaskBudget
from device_client.ports import Float32
from device_client.secure_update import protected_update
from fl_protocol.messages import RoundManifestMsg
from tests.enrolments import broken_copy
from tests.system.masked_rounds import MaskedRound, Protect, masked_round

FALSE_ALARM_RATE = 1e-4
DELTA = 1e-7
NOISE_MULTIPLIER = 4.0
CANARIES, GUESSES = 378, 120
"""A direction for each: the model has as many numbers."""


# From guesses to epsilon.


def probability_of(right: int, *, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Largest probability of so many right guesses or more under (epsilon, delta): arXiv 2305.08846, theorem 5.2.

    Args:
        right: right guesses, v.
        guesses: r, the other canaries were left out.
        canaries: m, each there by a fair coin.
        epsilon: of the claim.
        delta: of the claim.
    """
    chance = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(right - 1, guesses, chance))
    fewer = np.arange(1, right + 1)
    # P[v - i <= W < v] for all i, over i.
    alpha = float(np.max(np.cumsum(binom.pmf(right - fewer, guesses, chance)) / fewer, initial=0.0))
    return min(1.0, beta + 2 * canaries * delta * alpha)


def least_epsilon(
    right: int, *, guesses: int, canaries: int, delta: float, false_alarm_rate: float = FALSE_ALARM_RATE
) -> float:
    """The lower bound: every smaller epsilon would make these guesses rarer than `false_alarm_rate`."""
    is_refuted = partial(probability_of, right, guesses=guesses, canaries=canaries, delta=delta)
    if is_refuted(epsilon=0.0) > false_alarm_rate:
        return 0.0
    low, high = 0.0, 1.0
    while is_refuted(epsilon=high) <= false_alarm_rate:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if is_refuted(epsilon=middle) <= false_alarm_rate else (low, middle)
    return low


# A round of canaries.


def coins(seed: str) -> NDArray[np.bool_]:
    """Which canaries are there, bool [CANARIES]."""
    return np.random.default_rng(list(seed.encode())).random(CANARIES) < 0.5


def canary(direction: int, *, is_there: bool) -> Callable[[RoundManifestMsg], Float32]:
    """Three times as long as the clip, which the device has to see to."""

    def make(manifest: RoundManifestMsg) -> Float32:
        assert manifest.secure is not None
        update = np.zeros(manifest.update_length, np.float32)
        update[direction] = 3 * manifest.secure.l2_norm_clip * is_there
        return update

    return make


def audited(
    folder: Path, seed: str, protect: Protect, *, noise_multiplier: float = NOISE_MULTIPLIER
) -> tuple[float, float]:
    """The lower bound on a round's epsilon, and what its account claims against the aggregator."""
    there = coins(seed)
    updates = {f"canary-{index}": canary(index, is_there=bool(one)) for index, one in enumerate(there)}
    found = masked_round(folder, updates, seed=seed, protect=protect, noise_multiplier=noise_multiplier)
    right = right_guesses(found, there)
    bound = least_epsilon(right, guesses=GUESSES, canaries=CANARIES, delta=DELTA)
    account = TaskBudget(found.fleet.store, found.fleet.task, update_length=CANARIES)
    return bound, account.epsilon("aggregator", delta=DELTA)


def right_guesses(found: MaskedRound, there: NDArray[np.bool_]) -> int:
    """Of the guesses that the largest and the smallest numbers of the sum were those with and without a canary."""
    order = np.argsort(found.total, kind="stable")
    absent, present = order[: GUESSES // 2], order[-GUESSES // 2 :]
    return int((~there[absent]).sum() + there[present].sum())


def test_a_round_leaks_no_more_than_its_account_says(tmp_path: Path) -> None:
    bound, claim = audited(tmp_path, "one", protected_update)
    assert bound <= claim < 1.3


def test_a_round_with_an_eighth_of_the_noise_says_so_in_its_account_and_is_found_to_leak(tmp_path: Path) -> None:
    bound, claim = audited(tmp_path, "two", protected_update, noise_multiplier=NOISE_MULTIPLIER / 8)
    assert 1.3 < bound <= claim


@pytest.mark.parametrize("noise", ["skellam(variance / 100, length, entropy)", "np.zeros(length, np.int64)"])
def test_devices_that_save_on_noise_leak_more_and_are_caught(tmp_path: Path, noise: str) -> None:
    copy = broken_copy("device_client.secure_update", ("skellam(variance, length, entropy) if", f"{noise} if"))
    bound, claim = audited(tmp_path, "one", copy.protected_update)
    assert bound > claim


# The bound itself.


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
def test_the_bound_is_wrong_no_more_often_than_it_says(epsilon: float) -> None:
    """Randomized response is as private as that, and guesses about it are as good as they can be."""
    right = np.arange(GUESSES + 1)
    bounds = [least_epsilon(int(one), guesses=GUESSES, canaries=CANARIES, delta=0.0) for one in right]
    chances = binom.pmf(right, GUESSES, 1 / (1 + math.exp(-epsilon)))
    assert sum(chances[np.array(bounds) > epsilon]) <= FALSE_ALARM_RATE
    assert max(bounds) > 2.4
    # Without the margin for chance it would be wrong about half of the time.
    careless = [
        least_epsilon(int(one), guesses=GUESSES, canaries=CANARIES, delta=0.0, false_alarm_rate=0.5) for one in right
    ]
    assert sum(chances[np.array(careless) > epsilon]) > 0.3


def test_delta_lowers_the_bound() -> None:
    bounds = [least_epsilon(118, guesses=GUESSES, canaries=CANARIES, delta=delta) for delta in (0.0, 1e-7, 1e-5)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[2]
