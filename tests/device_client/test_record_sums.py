"""Noisy sums over records, and broken copies of them that the same checks must catch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from device_client.errors import TrainingError
from device_client.local_optimiser import LocalProgress
from device_client.noise import NoisyGrid
from device_client.ports import Float32, Graph, Labels
from device_client.record_sums import (
    RecordSums,
    bounded_sum,
    channels_problem,
    evaluation_parts,
    feature_parts,
)
from device_client.training import Records, evaluate, poisson_sample
from fl_protocol.adapters.tflite_graph import TfliteGraph
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import Entropy
from fl_protocol.messages import EvaluationPlanMsg, FeatureMsg, StatisticsPlanMsg
from fl_protocol.record_sums import SUM_DIVISOR, SumsPlanMsg
from tests.device_client import noise_checks
from tests.device_client.noise_checks import FALSE_ALARM_RATE
from tests.device_client.ports import LogisticGraph, make_plan, make_records
from tests.virtual_fleet import SeededEntropy, load_bundle

Float64 = NDArray[np.float64]
SumUp = Callable[..., Float64]
Z = 3.0
NO_PARAMS = np.zeros(0, np.float32)
PARAMS = np.linspace(-1, 1, 12, dtype=np.float32)
INF = np.float32(np.inf)


def moments(channel: int = 0, low: float = -3.0, high: float = 3.0) -> FeatureMsg:
    return FeatureMsg(name="a", statistic="moments", channel=channel, low=low, high=high)


def histogram(channel: int = 0, bins: int = 8, low: float = -3.0, high: float = 3.0) -> FeatureMsg:
    return FeatureMsg(name="h", statistic="histogram", channel=channel, low=low, high=high, bins=bins)


def statistics_plan(*features: FeatureMsg, noise: float = 0.0, rate: float = 1.0) -> StatisticsPlanMsg:
    return StatisticsPlanMsg(sampling_rate=rate, noise_multiplier=noise, features=features or (moments(),))


def evaluation_plan(*, noise: float = 0.0, rate: float = 1.0, loss_bound: float = 2.0) -> EvaluationPlanMsg:
    return EvaluationPlanMsg(sampling_rate=rate, noise_multiplier=noise, loss_bound=loss_bound)


def noisy_sum(graph: Graph, params: Float32, records: Records, *, plan: SumsPlanMsg, entropy: Entropy) -> Float64:
    """What `RecordSums` releases, in records."""
    sums = RecordSums(graph, params, records, plan=plan, entropy=entropy)
    while not sums.done:
        sums.advance()
    return sums.change().astype(np.float64) * SUM_DIVISOR


def broken_copy(
    *, noise_factor: float = 1.0, constant_seed: bool = False, fixed_size: bool = False, unbounded: bool = False
) -> SumUp:
    """`noisy_sum` with one thing done wrong."""

    def sum_up(graph: Graph, params: Float32, records: Records, *, plan: SumsPlanMsg, entropy: Entropy) -> Float64:
        count, rate = len(records), plan.sampling_rate
        batch = np.flatnonzero(poisson_sample(count, rate, entropy))
        if fixed_size:
            order = np.random.default_rng(int.from_bytes(entropy(8), "little")).permutation(count)
            batch = order[: round(rate * count)]
        chosen = Records(records.x[batch], records.y[batch])
        if unbounded and isinstance(plan, EvaluationPlanMsg):
            rows = [evaluate(graph, params, Records(chosen.x[[i]], chosen.y[[i]])) for i in range(len(chosen))]
            parts = np.array([(1, row.correct, row.loss_sum / plan.loss_bound) for row in rows]).reshape(-1, 3)
            total = parts.sum(axis=0)
        elif unbounded and isinstance(plan, StatisticsPlanMsg):
            u = chosen.x[..., 0].reshape(len(chosen), -1).astype(np.float64) / plan.features[0].high
            total = np.array([len(chosen), u.mean(axis=1).sum(), (u * u).mean(axis=1).sum()])
        elif isinstance(plan, EvaluationPlanMsg):
            parts = evaluation_parts(graph, params, chosen, loss_bound=plan.loss_bound)
            total = bounded_sum(parts, plan.l2_norm_clip)
        else:
            total = bounded_sum(feature_parts(chosen.x, plan.features), plan.l2_norm_clip)
        grid = NoisyGrid(plan.l2_norm_clip, noise_factor * plan.noise_multiplier, plan.length)
        return grid.release(total, SeededEntropy("constant") if constant_seed else entropy)

    return sum_up


def released_noise(sum_up: SumUp, *, seed: str) -> Float64:
    """The noise of 3,073 numbers over its accounted standard deviation; there are no records."""
    plan = statistics_plan(*[histogram(bins=256)] * 12, noise=Z)
    released = sum_up(LogisticGraph(4, 6), NO_PARAMS, make_records(count=0), plan=plan, entropy=SeededEntropy(seed))
    assert plan.l2_norm_clip == math.sqrt(13)
    result: Float64 = released / (Z * plan.l2_norm_clip)
    return result


def check_the_noise_is_as_accounted(sum_up: SumUp) -> None:
    # False-alarm rate: 2 * FALSE_ALARM_RATE. The margin (2^-9) scales the noise up; 3,000 draws do not show it.
    residual = released_noise(sum_up, seed="scale")
    assert noise_checks.p_value_of_standard_deviation(residual, 1.0) > FALSE_ALARM_RATE
    assert noise_checks.p_value_of_normal(residual, 1.0) > FALSE_ALARM_RATE


def check_the_noise_is_fresh_every_time(sum_up: SumUp) -> None:
    # False-alarm rate: FALSE_ALARM_RATE.
    first, second = released_noise(sum_up, seed="one"), released_noise(sum_up, seed="two")
    assert noise_checks.p_value_of_no_correlation(first, second) > FALSE_ALARM_RATE


def check_a_record_moves_statistics_by_at_most_the_clip(sum_up: SumUp) -> None:
    for seed in range(10):
        records = make_records(count=7, scale=10.0**seed, seed=seed)
        check_one_record_less(sum_up, NO_PARAMS, records, statistics_plan())


def check_a_record_moves_an_evaluation_by_at_most_the_clip(sum_up: SumUp) -> None:
    for seed in range(10):
        records = make_records(count=7, scale=50.0, seed=seed)
        check_one_record_less(sum_up, -PARAMS * 10.0**seed, records, evaluation_plan(loss_bound=0.01))


def check_one_record_less(sum_up: SumUp, params: Float32, records: Records, plan: SumsPlanMsg) -> None:
    found = [
        sum_up(LogisticGraph(4, 6), params, Records(records.x[:n], records.y[:n]), plan=plan, entropy=SeededEntropy(""))
        for n in (len(records), len(records) - 1)
    ]
    moved = float(np.linalg.norm(found[0] - found[1]))
    assert moved <= plan.l2_norm_clip * (1 + 1e-5), f"one record moved the sum by {moved}, not {plan.l2_norm_clip}"


def check_batches_are_poisson(sum_up: SumUp) -> None:
    # False-alarm rate: 2 * FALSE_ALARM_RATE. The first number is the batch's size, without noise.
    q, times, count = 0.3, 3000, 10
    graph, records, entropy = LogisticGraph(4, 6), make_records(count=count), SeededEntropy("batches")
    plan = statistics_plan(rate=q)
    drawn = [round(sum_up(graph, NO_PARAMS, records, plan=plan, entropy=entropy)[0]) for _ in range(times)]
    sizes = np.bincount(drawn, minlength=count + 1)
    expected = times * stats.binom.pmf(np.arange(count + 1), count, q)
    observed, cells = (np.array([*each[:7], each[7:].sum()]) for each in (sizes, expected))
    assert stats.chisquare(observed, cells).pvalue > FALSE_ALARM_RATE
    assert stats.binomtest(sum(drawn), times * count, q).pvalue > FALSE_ALARM_RATE


CHECKS = [
    check_the_noise_is_as_accounted,
    check_the_noise_is_fresh_every_time,
    check_a_record_moves_statistics_by_at_most_the_clip,
    check_a_record_moves_an_evaluation_by_at_most_the_clip,
    check_batches_are_poisson,
]


@pytest.mark.parametrize("check", CHECKS)
def test_noisy_sums_pass(check: Callable[[SumUp], None]) -> None:
    check(noisy_sum)


@pytest.mark.parametrize("check", CHECKS)
def test_the_copy_passes_while_nothing_is_broken(check: Callable[[SumUp], None]) -> None:
    check(broken_copy())


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        pytest.param(check_the_noise_is_as_accounted, broken_copy(noise_factor=0.0), id="no noise"),
        pytest.param(check_the_noise_is_as_accounted, broken_copy(noise_factor=0.9), id="a tenth less noise"),
        pytest.param(check_the_noise_is_fresh_every_time, broken_copy(constant_seed=True), id="constant seed"),
        pytest.param(check_a_record_moves_statistics_by_at_most_the_clip, broken_copy(unbounded=True), id="samples"),
        pytest.param(check_a_record_moves_an_evaluation_by_at_most_the_clip, broken_copy(unbounded=True), id="loss"),
        pytest.param(check_batches_are_poisson, broken_copy(fixed_size=True), id="batches of one size"),
    ],
)
def test_a_broken_copy_is_caught(check: Callable[[SumUp], None], broken: SumUp) -> None:
    with pytest.raises(AssertionError):
        check(broken)


def test_a_device_without_records_sends_noise_and_nothing_else() -> None:
    graph, none = LogisticGraph(4, 6), make_records(count=0)
    for plan, params in ((evaluation_plan(noise=Z), PARAMS), (statistics_plan(noise=Z), NO_PARAMS)):
        found = noisy_sum(graph, params, none, plan=plan, entropy=SeededEntropy("none"))
        assert np.abs(found).max() > 0
        assert found.shape == (plan.length,)


# Evaluations.


def test_an_evaluation_is_what_the_graph_says_of_all_records_together() -> None:
    graph, records = LogisticGraph(batch_size=8, num_inputs=6), make_records(count=45)
    found = noisy_sum(graph, PARAMS, records, plan=evaluation_plan(loss_bound=100.0), entropy=SeededEntropy("all"))
    whole = evaluate(graph, PARAMS, records)
    np.testing.assert_allclose(found, [45, whole.correct, whole.loss_sum / 100.0], rtol=1e-5)


@pytest.mark.parametrize("name", ["watch_features", "autoencoder", "ppg_heart_rate"])
def test_every_kind_of_label_and_loss_is_evaluated_record_by_record(name: str) -> None:
    """Softmax cross-entropy, mean squared error of an autoencoder, and Huber."""
    bundle = load_bundle(name)
    graph, generator = TfliteGraph.of_bundle(bundle), np.random.default_rng(3)
    x = generator.normal(size=(5, *bundle.manifest.input.shape)).astype(np.float32)
    values = bundle.manifest.label.kind == "value"
    y: Labels = generator.normal(70, 30, (5, 1)).astype(np.float32) if values else np.arange(5, dtype=np.int32)
    whole = evaluate(graph, bundle.params, Records(x, y))
    bound = 10 * whole.loss_sum
    parts = evaluation_parts(graph, bundle.params, Records(x, y), loss_bound=bound)
    np.testing.assert_allclose(parts.sum(axis=0), [5, whole.correct, 0.1], rtol=1e-4)
    alone = evaluation_parts(graph, bundle.params, Records(x[2:3], y[2:3]), loss_bound=bound)
    np.testing.assert_array_equal(alone[0], parts[2])


def test_a_record_whose_loss_is_no_number_counts_as_wrong_with_the_largest_loss_and_spoils_no_other() -> None:
    class Fragile(LogisticGraph):
        def evaluate(self, params: Float32, x: Float32, y: Labels, mask: Float32) -> tuple[float, float]:
            """As TFLite's: a mask of 0 does not hide a NaN."""
            loss, correct = super().evaluate(params, np.nan_to_num(x), y, mask)
            return (math.nan, math.nan) if np.isnan(x).any() else (loss, correct)

    graph, records = Fragile(batch_size=8, num_inputs=6), make_records(count=6)
    sound = evaluation_parts(graph, PARAMS, records, loss_bound=2.0)
    records.x[3, 0, 0] = np.nan
    spoilt = evaluation_parts(graph, PARAMS, records, loss_bound=2.0)
    np.testing.assert_array_equal(spoilt[3], [1, 0, 1])
    np.testing.assert_array_equal(np.delete(spoilt, 3, axis=0), np.delete(sound, 3, axis=0))


@pytest.mark.parametrize(
    ("loss", "correct", "expected"),
    [
        (0.5, 1.0, (1, 1, 0.25)),
        (7.0, 0.0, (1, 0, 1)),
        (math.inf, 1.0, (1, 1, 1)),
        (-math.inf, math.inf, (1, 0, 1)),
        (-3.0, -1.0, (1, 0, 0)),
        (math.nan, math.nan, (1, 0, 1)),
        (1e308, 1e308, (1, 1, 1)),
    ],
)
def test_whatever_a_graph_says_a_part_lies_in_the_unit_cube(
    loss: float, correct: float, expected: tuple[float, ...]
) -> None:
    class Wild(LogisticGraph):
        def evaluate(self, params: Float32, x: Float32, y: Labels, mask: Float32) -> tuple[float, float]:
            return loss, correct

    parts = evaluation_parts(Wild(4, 6), PARAMS, make_records(count=1), loss_bound=2.0)
    np.testing.assert_array_equal(parts, [expected])


def test_a_loss_bound_next_to_zero_is_no_division_by_it() -> None:
    parts = evaluation_parts(LogisticGraph(4, 6), PARAMS, make_records(count=9), loss_bound=5e-324)
    assert ((parts >= 0) & (parts <= 1)).all()


def test_labels_may_be_numbers() -> None:
    class Remembering(LogisticGraph):
        def evaluate(self, params: Float32, x: Float32, y: Labels, mask: Float32) -> tuple[float, float]:
            seen.append(y)
            return 0.0, float(mask.sum())

    seen: list[Labels] = []
    records = Records(np.zeros((3, 3, 2), np.float32), np.arange(6, dtype=np.float32).reshape(3, 2))
    parts = evaluation_parts(Remembering(4, 6), PARAMS, records, loss_bound=1.0)
    np.testing.assert_array_equal(parts, [[1, 1, 0]] * 3)
    np.testing.assert_array_equal(np.array(seen)[:, 0], records.y)


# Statistics.

WINDOWS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=3, max_dims=4, max_side=5), elements=st.floats(width=32, allow_nan=True)
)
EDGES = st.floats(allow_nan=False, allow_infinity=False)


@given(x=WINDOWS, edges=st.tuples(EDGES, EDGES).filter(lambda pair: pair[0] < pair[1]), bins=st.integers(2, 256))
def test_no_window_contributes_more_than_the_clip(x: Float32, edges: tuple[float, float], bins: int) -> None:
    low, high = edges
    plan = statistics_plan(moments(low=low, high=high), histogram(low=low, high=high, bins=bins))
    parts = feature_parts(x, plan.features)
    assert parts.shape == (len(x), plan.length)
    assert np.isfinite(parts).all()
    assert (np.linalg.norm(parts, axis=1) <= plan.l2_norm_clip * (1 + 1e-12)).all()
    assert (parts[:, 0] == 1).all()


def test_moments_are_those_of_the_clamped_samples_of_the_channel() -> None:
    x = np.random.default_rng(5).normal(2.0, 4.0, (30, 20, 3)).astype(np.float32)
    parts = feature_parts(x, (moments(channel=2, low=-1.0, high=5.0),))
    u = (np.clip(x[..., 2], -1, 5) - 2) / 3
    np.testing.assert_allclose(parts, np.stack([np.ones(30), u.mean(axis=1), (u * u).mean(axis=1)], axis=1), rtol=1e-6)


def test_histograms_are_numpys_with_the_outer_bins_open() -> None:
    x = np.random.default_rng(6).normal(0.0, 3.0, (10, 50, 2)).astype(np.float32)
    parts = feature_parts(x, (histogram(channel=1, bins=7, low=-2.0, high=2.0),))
    for row, window in zip(parts, np.clip(x[..., 1].astype(np.float64), -2, 2), strict=True):
        np.testing.assert_allclose(row[1:], np.histogram(window, bins=7, range=(-2, 2))[0] / 50, atol=1e-12)
    np.testing.assert_allclose(parts[:, 1:].sum(axis=1), 1.0)


def test_samples_that_are_no_numbers_count_for_nothing_and_infinite_ones_as_the_end_of_the_range() -> None:
    x = np.array([np.nan, INF, -INF, 0.0], np.float32).reshape(1, 4, 1)
    parts = feature_parts(x, (moments(), histogram(bins=2)))
    np.testing.assert_array_equal(parts, [[1, 0.0, 0.5, 0.25, 0.5]])


def test_features_stand_one_after_the_other() -> None:
    x = np.zeros((2, 3, 2), np.float32)
    x[..., 1] = 3.0
    features = (histogram(bins=3), moments(channel=1), histogram(channel=1, bins=2))
    np.testing.assert_array_equal(feature_parts(x, features), [[1, 0, 1, 0, 1, 1, 0, 1]] * 2)


@given(
    parts=hnp.arrays(np.float64, st.tuples(st.integers(0, 6), st.just(3)), elements=st.floats(width=64)),
    clip=st.floats(0.01, 100),
)
def test_a_part_made_wrong_moves_the_sum_by_no_more_than_the_clip(parts: Float64, clip: float) -> None:
    for row in parts:
        assert np.linalg.norm(bounded_sum(row[None], clip)) <= clip * (1 + 1e-12)
    np.testing.assert_allclose(
        bounded_sum(parts, clip), sum((bounded_sum(row[None], clip) for row in parts), np.zeros(3)), atol=1e-9
    )


def test_parts_within_the_clip_are_summed_as_they_are() -> None:
    parts = np.random.default_rng(1).uniform(0, 1, (20, 3))
    np.testing.assert_allclose(bounded_sum(parts, math.sqrt(3)), parts.sum(axis=0), rtol=1e-15)


def test_a_channel_that_there_is_not_is_named_and_never_computed_with() -> None:
    plan = statistics_plan(moments(1), moments(2))
    assert "feature 2 of the plan asks for channel 2" in channels_problem(plan, (3, 2))
    assert channels_problem(plan, (3, 3)) == ""
    assert channels_problem(evaluation_plan(), (3, 2)) == channels_problem(make_plan(), ()) == ""
    with pytest.raises(TrainingError, match="channel 2"):
        RecordSums(LogisticGraph(4, 6), NO_PARAMS, make_records(), plan=plan, entropy=SeededEntropy(""))


# Step by step.


@dataclass
class Stopping(LogisticGraph):
    """A graph whose evaluation fails at its n-th call."""

    fails_at: int = 0

    def evaluate(self, params: Float32, x: Float32, y: Labels, mask: Float32) -> tuple[float, float]:
        self.calls += 1
        if self.calls == self.fails_at:
            raise TrainingError("the TFLite runtime failed")
        return super().evaluate(params, x, y, mask)


def sums_of(graph: Graph, records: Records, *, progress: LocalProgress | None = None, seed: str = "") -> RecordSums:
    plan = evaluation_plan(noise=1.0)
    return RecordSums(graph, PARAMS, records, plan=plan, entropy=SeededEntropy(seed), progress=progress)


def test_records_are_taken_a_few_at_a_time_and_nothing_is_to_be_kept_before_the_release() -> None:
    graph = Stopping(4, 6)
    sums, turns = sums_of(graph, make_records(count=100)), 0
    while not sums.done:
        assert (sums.step, sums.steps) == (0, 1)
        assert sums.progress() == LocalProgress(0, b"", b"")
        before = graph.calls
        sums.advance()
        turns += 1
        assert graph.calls - before <= 16
    assert (turns, graph.calls, sums.step) == (7, 100, 1)


def test_large_windows_are_taken_fewer_at_a_time() -> None:
    records = Records(np.zeros((12, 100_000, 1), np.float32), np.zeros(12, np.int32))
    sums = RecordSums(LogisticGraph(4, 6), NO_PARAMS, records, plan=statistics_plan(), entropy=SeededEntropy(""))
    for turn in range(6):
        assert not sums.done, turn
        sums.advance()
    assert sums.done


def test_what_was_released_goes_on_as_the_same_numbers_and_what_was_not_with_fresh_ones() -> None:
    graph, records = LogisticGraph(4, 6), make_records()
    sums = sums_of(graph, records, seed="first")
    resumed = sums_of(graph, records, progress=sums.progress(), seed="second")
    for each in (sums, resumed):
        while not each.done:
            each.advance()
    assert not np.array_equal(sums.change(), resumed.change())
    again = sums_of(graph, make_records(seed=9), progress=sums.progress(), seed="third")
    assert again.done
    np.testing.assert_array_equal(again.change(), sums.change())


@pytest.mark.parametrize(
    "progress",
    [
        LocalProgress(1, bytes(16), b""),
        LocalProgress(1, np.full(3, np.nan).tobytes(), b""),
        LocalProgress(2, bytes(24), b""),
    ],
)
def test_progress_of_something_else_is_not_gone_on_with(progress: LocalProgress) -> None:
    with pytest.raises(TrainingError, match="given up"):
        sums_of(LogisticGraph(4, 6), make_records(), progress=progress)


def test_after_a_failure_the_sum_is_spent() -> None:
    sums = sums_of(Stopping(4, 6, fails_at=20), make_records(count=40))
    sums.advance()
    with pytest.raises(TrainingError, match="runtime failed"):
        sums.advance()
    for use in (sums.advance, sums.progress, sums.change):
        with pytest.raises(TrainingError, match="given up"):
            use()


def test_one_release_is_all_there_is() -> None:
    sums = sums_of(LogisticGraph(4, 6), make_records(count=3))
    with pytest.raises(LocalMisuseError, match="not released"):
        sums.change()
    sums.advance()
    with pytest.raises(LocalMisuseError, match="no more than one"):
        sums.advance()


def test_noise_that_has_no_place_on_the_grid_gives_no_sum() -> None:
    with pytest.raises(LocalMisuseError, match="sigma"):
        noisy_sum(
            LogisticGraph(4, 6), PARAMS, make_records(), plan=evaluation_plan(noise=1e13), entropy=SeededEntropy("")
        )
