"""The noise in what a whole secure round releases: its variance, its law and its tails, whoever adds it.

All updates are zeros, so the sum is noise and nothing else, on the grid. Each check fails by chance with a probability
of at most `FALSE_ALARM_RATE`; random numbers follow from seeds, so what passes once passes always.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from aggregator import combination
from aggregator.helper import answering
from device_client.ports import Float32
from fl_protocol.messages import RoundManifestMsg
from fl_protocol.secagg.terms import fixed_point_of
from tests.enrolments import broken_copy
from tests.system.masked_rounds import MaskedRound, masked_round
from tests.virtual_fleet import load_bundle

FALSE_ALARM_RATE = 1e-6
NOISE_MULTIPLIER = 1.0
DEVICES = 10
BUNDLE = load_bundle("watch_cnn")
COARSE = {"step": 0.5, "noise_multiplier": NOISE_MULTIPLIER}
"""A standard deviation of some 50 grid steps: so few that the law is not a normal one's to within the test's power."""


def zeros(manifest: RoundManifestMsg) -> Float32:
    return np.zeros(manifest.update_length, np.float32)


def round_of_zeros(folder: Path, *, arrived: int = DEVICES, **changes: Any) -> MaskedRound:
    """A round that wants ten updates."""
    updates = {f"watch-{index}": zeros for index in range(arrived)}
    settings = {"seed": "noise", "goal": DEVICES, "bundle": BUNDLE, **COARSE, **changes}
    return masked_round(folder, updates, **settings)


def wanted_variance(found: MaskedRound) -> float:
    """Of the noise in the sum of ten updates, in grid steps squared, as the task names it."""
    assert found.manifest.secure is not None
    point = fixed_point_of(found.manifest.secure, found.manifest.update_length)
    return (NOISE_MULTIPLIER * point.norm_bound) ** 2


@dataclass(frozen=True)
class Law:
    """A symmetric law on the integers -m to m: its probabilities, float64 [2m + 1]."""

    chances: NDArray[np.float64]

    @property
    def most(self) -> int:
        return len(self.chances) // 2

    @property
    def variance(self) -> float:
        return float(np.sum(self.chances * np.arange(-self.most, self.most + 1.0) ** 2))

    def cdf(self, at: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.cumsum(self.chances)[at + self.most]

    def quantiles(self, count: int) -> NDArray[np.int64]:
        """Integers that cut it into about so many parts of the same probability."""
        return np.unique(np.searchsorted(np.cumsum(self.chances), np.arange(1, count) / count) - self.most)

    def beyond(self, bound: float) -> float:
        """Of a magnitude above this."""
        return float(self.chances[np.abs(np.arange(-self.most, self.most + 1)) > bound].sum())


def skellam_of(variance: float) -> Law:
    """Exact: modified Bessel functions of the first kind (arXiv 2110.04995, definition 2.3)."""
    reach = np.arange(-round(12 * math.sqrt(variance)), round(12 * math.sqrt(variance)) + 1)
    return Law(special.ive(np.abs(reach), variance))


def gaussians_of(variance: float, times: int) -> Law:
    """The sum of so many discrete Gaussians, each with this parameter squared."""
    reach = np.arange(-round(12 * math.sqrt(variance)), round(12 * math.sqrt(variance)) + 1.0)
    one = np.exp(-(reach**2) / (2 * variance))
    one /= one.sum()
    return Law(functools.reduce(np.convolve, [one] * times))


def faults(noise: NDArray[np.int64], law: Law) -> list[str]:
    """What about a sample is less likely than `FALSE_ALARM_RATE` under a law, independent from number to number."""
    each, found, count, variance = FALSE_ALARM_RATE / 5, list[str](), len(noise), law.variance
    most = stats.norm.isf(each / 2)  # sums of 8,711 are as good as normal
    if abs(float(np.mean(noise.astype(np.float64) ** 2)) / variance - 1) > most * math.sqrt(2.1 / count):
        found.append("variance")
    if abs(float(noise.mean())) > most * math.sqrt(variance / count):
        found.append("mean")
    edges = law.quantiles(30)
    counts = np.bincount(np.searchsorted(edges, noise), minlength=len(edges) + 1)
    chances = np.diff(np.concatenate([[0.0], law.cdf(edges), [1.0]]))
    if stats.chisquare(counts, chances * count).pvalue < each:
        found.append("distribution")
    bound = 3 * math.sqrt(variance)
    far, chance = int((np.abs(noise) > bound).sum()), law.beyond(bound)
    if min(stats.binom.cdf(far, count, chance), stats.binom.sf(far - 1, count, chance)) < each / 2:
        found.append("tails")
    if abs(float(np.mean(noise[1:] * noise[:-1]))) > most * variance / math.sqrt(count):
        found.append("neighbours")
    return found


@pytest.mark.parametrize("arrived", [DEVICES, 7])
def test_devices_shares_add_up_and_those_of_absent_devices_are_missing(tmp_path: Path, arrived: int) -> None:
    found = round_of_zeros(tmp_path, arrived=arrived)
    assert faults(found.total, skellam_of(wanted_variance(found) * arrived / DEVICES)) == []


def test_shares_that_are_not_there_are_noticed(tmp_path: Path) -> None:
    found = round_of_zeros(tmp_path, arrived=7)
    assert "variance" in faults(found.total, skellam_of(wanted_variance(found)))


@pytest.mark.parametrize(("noise_from", "times"), [("helpers", 2), ("aggregator", 1)])
def test_each_helper_adds_all_of_the_noise_and_so_does_an_aggregator_that_does(
    tmp_path: Path, noise_from: str, times: int
) -> None:
    found = round_of_zeros(tmp_path, arrived=3, noise_from=noise_from)
    assert faults(found.total, gaussians_of(wanted_variance(found), times)) == []


# Copies that save on it.


def half_the_variance(_patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"protect": device_with("skellam(variance / 2, length, entropy)")}


def uniform_instead(_patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of the same variance, and bounded."""
    return {
        "protect": device_with(
            "np.random.default_rng(list(entropy(8))).integers(-round((3 * variance) ** .5), "
            "round((3 * variance) ** .5) + 1, length)"
        )
    }


def the_same_for_all(_patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A source of randomness that begins with the same on every device."""
    return {"protect": device_with("skellam(variance, length, __import__('hashlib').shake_128(b'stuck').digest)")}


def the_same_number_all_over(_patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"protect": device_with("np.repeat(skellam(variance, length // 8 + 1, entropy), 8)[:length]")}


def one_helper_adds_none(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    really, asked = answering._noise, iter([True, False])
    patch.setattr(answering, "_noise", lambda *given: really(*given) if next(asked) else None)
    return {"noise_from": "helpers"}


def the_aggregator_adds_half(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    copy = broken_copy("aggregator.combination", ("discrete_gaussian(sigma,", "discrete_gaussian(sigma / 2,"))
    patch.setattr(combination, "_unmasked", copy._unmasked)
    return {"noise_from": "aggregator"}


def device_with(noise: str) -> Callable[..., Any]:
    """A device that draws something else."""
    right = "skellam(variance, length, entropy) if"
    made: Callable[..., Any] = broken_copy("device_client.secure_update", (right, f"{noise} if")).protected_update
    return made


CARELESS = [
    (half_the_variance, "variance"),
    (uniform_instead, "tails"),
    (the_same_for_all, "variance"),
    (the_same_number_all_over, "neighbours"),
    (one_helper_adds_none, "variance"),
    (the_aggregator_adds_half, "variance"),
]


@pytest.mark.parametrize(("careless", "fault"), CARELESS)
def test_who_saves_on_it_is_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    careless: Callable[[pytest.MonkeyPatch], dict[str, Any]],
    fault: str,
) -> None:
    changes = careless(monkeypatch)
    # The sum of ten uniform shares is nearly normal; of two it is not.
    arrived = 2 if careless is uniform_instead else 4
    found = round_of_zeros(tmp_path, arrived=arrived, **changes)
    times = {"helpers": 2, "aggregator": 1}.get(changes.get("noise_from", ""), 0)
    variance = wanted_variance(found)
    law = gaussians_of(variance, times) if times else skellam_of(variance * arrived / DEVICES)
    assert fault in faults(found.total, law)
