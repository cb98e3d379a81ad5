"""The clip goes to the wanted quantile with real encoding and real noise, and its bit is paid for."""

from __future__ import annotations

import hashlib
import math
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import adaptive_clipping
from aggregator.adaptive_clipping import (
    AdaptiveClip,
    bit_magnitude,
    share_within_clip,
    update_noise_multiplier,
)
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import Entropy, skellam
from fl_protocol.secagg.fixed_point import FixedPoint
from tests.enrolments import broken_copy

DEVICES, LENGTH, ROUNDS = 60, 16, 60
LOG_SPREAD = 0.8


def entropy_of(seed: str) -> Entropy:
    state = hashlib.shake_256(seed.encode())
    drawn = 0

    def draw(count: int) -> bytes:
        nonlocal drawn, state
        drawn += 1
        return hashlib.shake_256(state.digest(16) + drawn.to_bytes(8, "little")).digest(count)

    return draw


def simulate(
    module: ModuleType, *, quantile: float, begin: float, seed: int, kind: type[FixedPoint] = FixedPoint
) -> list[float]:
    """Clips over rounds: updates of log-normal norms (median 1), rounded, with a bit, and Skellam shares of all."""
    random, entropy = np.random.default_rng(seed), entropy_of(f"{quantile} {begin} {seed}")
    rule, clips = module.AdaptiveClip(quantile, 0.3), [begin]
    for _ in range(ROUNDS):
        clip = clips[-1]
        bit_noise, z = DEVICES / 20, 2.0
        plain = kind(LENGTH, clip, clip / 256, DEVICES)
        m = module.bit_magnitude(norm_bound=plain.update_norm_bound, noise_multiplier=z, bit_noise=bit_noise)
        point = kind(LENGTH, clip, clip / 256, DEVICES, clip_bit=m, bits=32)
        variance = (z * point.norm_bound) ** 2 / DEVICES
        norms = np.exp(LOG_SPREAD * random.normal(size=DEVICES))
        total = np.zeros(LENGTH + 1, np.int64)
        for norm in norms:
            update = random.normal(size=LENGTH)
            update *= norm / np.linalg.norm(update)
            vector = point.encode(update.astype(np.float32), rotation_seed=b"", entropy=entropy)
            assert np.linalg.norm(vector.astype(np.float64)) <= point.norm_bound
            total += vector
        total += skellam(variance * DEVICES, LENGTH + 1, entropy)
        noisy = kind(LENGTH, clip, clip / 256, DEVICES, clip_bit=m, bits=32, noise_bound=2**20)
        within = float(noisy.decode(total.astype(np.uint32), count=DEVICES, rotation_seed=b"")[-1])
        clips.append(rule.next_clip(clip, module.share_within_clip(within, count=DEVICES)))
    return clips


def check_it_goes_to_the_quantile(module: ModuleType, kind: type[FixedPoint] = FixedPoint) -> None:
    """The mean of the last 30 clips is the quantile's.

    The logarithm of the clip is a process that returns: in one round it moves by η·(b - quantile), b having a standard
    deviation of at most √(0.25 / 60 + 1 / 400) = 0.082, and near its aim it returns by a factor of at most 1 - 0.3·0.28
    a round (0.28 being the least density of the log norms at the quantiles tried). So the mean of 30 rounds has a
    standard deviation below 0.3·0.082 / (0.3·0.28) / √30 = 0.053; 0.3 is more than five of these: a false alarm in
    fewer than a million runs. The seeds are fixed all the same.
    """
    for quantile, begin, normal in ((0.5, 0.1, 0.0), (0.8, 5.0, 0.8416)):
        clips = simulate(module, quantile=quantile, begin=begin, seed=1, kind=kind)
        assert abs(np.mean(np.log(clips[-30:])) - LOG_SPREAD * normal) < 0.3


def test_the_clip_goes_to_the_wanted_quantile() -> None:
    check_it_goes_to_the_quantile(adaptive_clipping)


@pytest.mark.parametrize(
    "change",
    [
        ("math.exp(-self.learning_rate", "math.exp(self.learning_rate"),
        ("(share - self.quantile)", "(share - 0.5)"),
        ("return 0.5 + within", "return within"),
        ("/ (2 * count)", "/ count"),
    ],
)
def test_a_clip_that_goes_elsewhere_is_caught(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_it_goes_to_the_quantile(broken_copy(adaptive_clipping.__name__, change))


@pytest.mark.parametrize(
    "change",
    [
        ("self.clip_bit if shrunk == 1 else -self.clip_bit", "-self.clip_bit if shrunk == 1 else self.clip_bit"),
        ("return math.hypot(self.update_norm_bound, self.clip_bit)", "return self.update_norm_bound"),
        ("signed[-1] / self.clip_bit", "signed[-1] * self.step"),
    ],
    ids=["the bit is the other way round", "the bit is not paid for", "the bit is read as a number of the update"],
)
def test_a_bit_that_is_wrong_or_not_paid_for_is_caught(change: tuple[str, str]) -> None:
    copy = broken_copy("fl_protocol.secagg.fixed_point", change)
    with pytest.raises(AssertionError):
        check_it_goes_to_the_quantile(adaptive_clipping, kind=copy.FixedPoint)


@given(st.floats(0.1, 50.0), st.floats(0.51, 500.0))
def test_the_split_of_the_noise_is_theorem_1(z: float, ratio: float) -> None:
    bit_noise = z * ratio
    assert update_noise_multiplier(noise_multiplier=z, bit_noise=bit_noise) == pytest.approx(
        (z**-2 - (2 * bit_noise) ** -2) ** -0.5, rel=1e-6
    )


@given(st.floats(50.0, 5000.0), st.floats(0.5, 40.0), st.integers(20, 2000))
def test_update_and_bit_together_cost_no_more_than_is_accounted(norm_bound: float, z: float, cohort: int) -> None:
    bit_noise = max(cohort / 20, z)
    if norm_bound * z < 4 * bit_noise:
        return
    m = bit_magnitude(norm_bound=norm_bound, noise_multiplier=z, bit_noise=bit_noise)
    planned = norm_bound * update_noise_multiplier(noise_multiplier=z, bit_noise=bit_noise)
    assert z * math.hypot(norm_bound, m) <= planned * (1 + 1e-12)  # the noise for z is enough, and no more
    assert planned / (2 * m) >= bit_noise * (1 - 1e-12)
    assert planned / (2 * (m + 1)) < bit_noise


def test_the_share_is_read_from_the_sum_of_bits() -> None:
    point = FixedPoint(3, 1.0, 2.0**-8, 5, clip_bit=7)
    updates = [np.array([norm, 0, 0], np.float32) for norm in (0.2, 1.0, 1.001, 3.0, 0.0)]
    vectors = [point.encode(one, rotation_seed=b"", entropy=entropy_of("bits")) for one in updates]
    assert [int(one[-1]) for one in vectors] == [7, 7, -7, -7, 7]
    total = (sum(vectors) % (1 << point.bits)).astype(np.uint32)
    decoded = point.decode(total, count=5, rotation_seed=b"")
    assert share_within_clip(float(decoded[-1]), count=5) == pytest.approx(0.6)
    assert decoded[:3] == pytest.approx([3.2, 0, 0], abs=5 * 2.0**-8)


def test_noise_alone_moves_the_clip_by_no_more_than_a_round_can() -> None:
    rule = AdaptiveClip(0.5, 0.2, least=0.9, most=1.05)
    assert AdaptiveClip().next_clip(1.0, 1e9) == AdaptiveClip().next_clip(1.0, 1.0) == pytest.approx(math.exp(-0.1))
    assert AdaptiveClip().next_clip(1.0, -1e9) == pytest.approx(math.exp(0.1))
    assert rule.next_clip(1.0, 0.0) == 1.05
    assert rule.next_clip(0.95, 1.0) == 0.9


def test_what_makes_no_sense_is_refused() -> None:
    for about, word in (((0.0,), "quantile"), ((0.5, 0.0), "learning_rate"), ((0.5, 0.2, 2.0, 1.0), "least")):
        with pytest.raises(LocalMisuseError, match=word):
            AdaptiveClip(*about)
    with pytest.raises(LocalMisuseError, match="cost more than all may"):
        update_noise_multiplier(noise_multiplier=2.0, bit_noise=1.0)
    with pytest.raises(LocalMisuseError, match="finer grid step"):
        bit_magnitude(norm_bound=10.0, noise_multiplier=1.0, bit_noise=50.0)
    with pytest.raises(LocalMisuseError, match="at least 1 update"):
        share_within_clip(0.0, count=0)
    with pytest.raises(LocalMisuseError, match="noisy_share"):
        AdaptiveClip().next_clip(1.0, math.nan)
