"""Updates as integers: never longer than promised, exact in the sum, and no sum overflows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.secagg.fixed_point import FixedPoint
from tests.enrolments import broken_copy
from tests.fl_protocol.secagg.rounds import ROTATION_SEED, fixed_point, residues, seeded

FALSE_ALARM_RATE = 1e-6


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(1, 200),
    clip=st.floats(1e-3, 1e3),
    steps=st.floats(1.0, 5000.0),
    norm=st.floats(0.0, 3.0),
    rotates=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_encoded_update_is_longer_than_what_is_accounted_for(
    *, length: int, clip: float, steps: float, norm: float, rotates: bool, seed: int
) -> None:
    point = FixedPoint(length, l2_norm_clip=clip, step=clip / steps, most_updates=10, rotates=rotates)
    values = np.random.default_rng(seed).standard_t(2, size=length)
    update = (values * (norm * clip / max(float(np.linalg.norm(values)), 1e-9))).astype(np.float32)
    encoded = point.encode(update, rotation_seed=ROTATION_SEED, entropy=seeded(str(seed)))
    assert float(np.linalg.norm(encoded)) <= point.norm_bound
    assert int(np.abs(encoded).max()) <= point.coordinate_bound


def check_rounding_stays_within_its_bound(kind: type[FixedPoint]) -> None:
    """A grid so coarse that a careless rounding is often too long: most coordinates are half-way."""
    point = kind(length=64, l2_norm_clip=4.0, step=1.0, most_updates=10)
    update = np.full(64, 0.5, np.float32)
    for trial in range(60):
        encoded = point.encode(update, rotation_seed=ROTATION_SEED, entropy=seeded(f"half {trial}"))
        assert float(np.linalg.norm(encoded)) <= point.norm_bound


def test_rounding_stays_within_its_bound() -> None:
    check_rounding_stays_within_its_bound(FixedPoint)


def test_a_rounding_that_is_not_repeated_is_caught() -> None:
    copy = broken_copy("fl_protocol.secagg.fixed_point", ("if squared <= limit and", "if"))
    with pytest.raises(AssertionError):
        check_rounding_stays_within_its_bound(copy.FixedPoint)


def check_a_long_update_is_clipped(kind: type[FixedPoint]) -> None:
    point = kind(length=30, l2_norm_clip=1.0, step=2.0**-12, most_updates=10)
    encoded = point.encode(np.full(30, 100.0, np.float32), rotation_seed=ROTATION_SEED, entropy=seeded("long"))
    assert np.linalg.norm(encoded) * point.step == pytest.approx(1.0, abs=1e-2)


def test_a_long_update_is_clipped() -> None:
    check_a_long_update_is_clipped(FixedPoint)


def test_an_encoder_that_does_not_clip_is_caught() -> None:
    copy = broken_copy(
        "fl_protocol.secagg.fixed_point",
        ("return 1.0 if norm <= self.l2_norm_clip else self.l2_norm_clip / norm", "return 1.0"),
    )
    with pytest.raises((AssertionError, LocalMisuseError)):
        check_a_long_update_is_clipped(copy.FixedPoint)


def test_rounding_keeps_the_mean() -> None:
    """False-alarm rate: FALSE_ALARM_RATE."""
    point = fixed_point(1, step=1.0, l2_norm_clip=10.0)
    draws = 4000
    ups = sum(
        int(point.encode(np.float32([2.3]), rotation_seed=ROTATION_SEED, entropy=seeded(f"mean {trial}"))[0]) - 2
        for trial in range(draws)
    )
    assert stats.binomtest(ups, draws, 0.3).pvalue > FALSE_ALARM_RATE


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("length", [1, 7, 4096, 5000])
def test_the_decoded_sum_is_the_sum_but_for_the_grid(rotates: bool, length: int) -> None:
    point = fixed_point(length, rotates=rotates, step=2.0**-10)
    generator = np.random.default_rng(length)
    updates = [generator.normal(0, 0.5 / math.sqrt(length), length).astype(np.float32) for _ in range(20)]
    total = np.zeros(length, np.int64)
    for index, update in enumerate(updates):
        total += point.encode(update, rotation_seed=ROTATION_SEED, entropy=seeded(f"{index}"))
    decoded = point.decode(residues(point, total), count=20, rotation_seed=ROTATION_SEED)
    expected = np.sum(np.float64(updates), axis=0)
    # A rounding error is below one step; twenty independent ones seldom reach five.
    assert np.abs(decoded - expected).max() < (8 if rotates else 12) * point.step
    assert np.linalg.norm(decoded - expected) < 20 * point.step * math.sqrt(length)


@given(
    length=st.integers(1, 10**6),
    clip=st.floats(1e-3, 1e3),
    steps=st.floats(1.0, 1e5),
    most=st.integers(1, 10**5),
    noise=st.integers(0, 10**6),
)
def test_no_sum_that_is_possible_overflows(length: int, clip: float, steps: float, most: int, noise: int) -> None:
    try:
        point = FixedPoint(length, l2_norm_clip=clip, step=clip / steps, most_updates=most, noise_bound=noise)
    except LocalMisuseError:
        return
    extremes = np.array([point.sum_bound, -point.sum_bound])
    assert 12 <= point.bits <= 32
    signed = residues(point, extremes).astype(np.int64)
    signed[signed >= 1 << (point.bits - 1)] -= 1 << point.bits
    assert signed.tolist() == extremes.tolist()
    assert point.bits == 12 or point.sum_bound >= 1 << (point.bits - 2)  # and no bit is wasted


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 0.0},
        {"step": 2.0},
        {"step": math.nan},
        {"l2_norm_clip": math.inf},
        {"most_updates": 0},
        {"noise_bound": -1},
        {"length": 0},
        {"most_updates": 2**24},
        {"noise_bound": 2**31},
    ],
)
def test_a_grid_that_cannot_be_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(LocalMisuseError):
        fixed_point(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", [np.zeros(39, np.float32), np.zeros(40), np.float32([np.nan] * 40), np.float32([np.inf] + [0.0] * 39)]
)
def test_what_is_no_update_is_refused(values: np.ndarray) -> None:  # type: ignore[type-arg]
    with pytest.raises(LocalMisuseError, match="values: expected 40 finite float32"):
        fixed_point().encode(values, rotation_seed=ROTATION_SEED, entropy=seeded("x"))


def test_a_source_that_always_rounds_up_is_noticed() -> None:
    point = fixed_point(64, l2_norm_clip=4.0, step=1.0)
    with pytest.raises(LocalMisuseError, match="the source of randomness is broken"):
        point.encode(np.full(64, 0.5, np.float32), rotation_seed=ROTATION_SEED, entropy=lambda count: b"\xff" * count)


def check_noise_is_no_sum(kind: type[FixedPoint]) -> None:
    point = kind(length=100, l2_norm_clip=1.0, step=2.0**-8, most_updates=50)
    garbage = np.random.default_rng(0).integers(0, 1 << point.bits, 100, dtype=np.uint32)
    with pytest.raises(ProtocolError, match="50 updates add up to at most"):
        point.decode(garbage, count=50, rotation_seed=ROTATION_SEED)


def test_uniform_noise_is_not_taken_for_a_sum() -> None:
    check_noise_is_no_sum(FixedPoint)


def test_a_decoder_that_takes_anything_is_caught() -> None:
    copy = broken_copy("fl_protocol.secagg.fixed_point", ("if largest > most or norm > longest:", "if False:"))
    with pytest.raises(pytest.fail.Exception):
        check_noise_is_no_sum(copy.FixedPoint)
