"""Local training, and broken copies of it that the same checks must catch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from scipy import stats

from device_client.errors import TrainingError
from device_client.noise import NoisyGrid
from device_client.ports import Float32, Graph, Labels
from device_client.training import (
    Records,
    clipped_gradient_sum,
    evaluate,
    keep_masks,
    poisson_sample,
    train_locally,
)
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import Entropy
from fl_protocol.messages import TrainingPlanMsg
from fl_protocol.model_manifest import DropoutMask
from tests.device_client import noise_checks
from tests.device_client.noise_checks import FALSE_ALARM_RATE
from tests.device_client.ports import LogisticGraph, UnclippedGraph, make_plan, make_records
from tests.enrolments import broken_copy as broken_module
from tests.virtual_fleet import SeededEntropy

Train = Callable[..., Float32]
Z, CLIP, RATE, DIVISOR = 3.0, 0.8, 0.5, 25.0
WIDE = 3000  # coordinates, so that one release is a sample large enough to test


def broken_copy(
    *,
    noise_factor: float = 1.0,
    constant_seed: bool = False,
    shuffled: bool = False,
    own_count: bool = False,
) -> Train:
    """`train_locally` with one thing done wrong."""

    def train(graph: Graph, params: Float32, records: Records, *, plan: TrainingPlanMsg, entropy: Entropy) -> Float32:
        grid = NoisyGrid(plan.l2_norm_clip, noise_factor * plan.noise_multiplier, len(params))
        current = params.astype(np.float64)
        order = np.random.default_rng(int.from_bytes(entropy(8), "little")).permutation(len(records))
        size = max(1, round(plan.sampling_rate * len(records)))
        for step in range(plan.local_steps):
            batch = np.flatnonzero(poisson_sample(len(records), plan.sampling_rate, entropy))
            if shuffled:
                batch = np.take(order, range(step * size, (step + 1) * size), mode="wrap")
            total = clipped_gradient_sum(
                graph, current.astype(np.float32), records, batch, clip=plan.l2_norm_clip, entropy=entropy
            )
            noise_source = SeededEntropy("constant") if constant_seed else entropy
            divisor = len(records) if own_count else plan.expected_batch_size
            current -= plan.learning_rate / divisor * grid.release(total, noise_source)
        return (current - params).astype(np.float32)

    return train


def released_noise(train: Train, *, seed: str, steps: int = 1) -> np.ndarray:
    """The noise in an update, over the noise's accounted standard deviation; records of zeros have no gradient."""
    graph = LogisticGraph(batch_size=8, num_inputs=WIDE)
    records = Records(np.zeros((10, WIDE // 2, 2), np.float32), np.zeros(10, np.int32))
    plan = make_plan(
        noise_multiplier=Z, l2_norm_clip=CLIP, learning_rate=RATE, expected_batch_size=DIVISOR, local_steps=steps
    )
    change = train(graph, np.zeros(graph.num_parameters, np.float32), records, plan=plan, entropy=SeededEntropy(seed))
    residual: np.ndarray = -change.astype(np.float64) * DIVISOR / RATE / (Z * CLIP)
    return residual


def check_the_noise_is_as_accounted(train: Train) -> None:
    # False-alarm rate: 2 * FALSE_ALARM_RATE. The margin (2^-9) scales the noise up; it is below what 6000 draws show.
    residual = released_noise(train, seed="scale")
    assert noise_checks.p_value_of_standard_deviation(residual, 1.0) > FALSE_ALARM_RATE
    assert noise_checks.p_value_of_normal(residual, 1.0) > FALSE_ALARM_RATE


def check_the_noise_is_fresh_every_time(train: Train) -> None:
    # False-alarm rate: 2 * FALSE_ALARM_RATE.
    first, second = released_noise(train, seed="one"), released_noise(train, seed="two")
    assert noise_checks.p_value_of_no_correlation(first, second) > FALSE_ALARM_RATE
    steps = released_noise(train, seed="many", steps=4)
    assert noise_checks.p_value_of_standard_deviation(steps, 2.0) > FALSE_ALARM_RATE


def check_a_record_moves_the_update_by_at_most_the_clip(
    train: Train, graph_type: type[LogisticGraph] = LogisticGraph
) -> None:
    graph = graph_type(batch_size=4, num_inputs=6)
    plan = make_plan(noise_multiplier=0.0, l2_norm_clip=CLIP, learning_rate=RATE, expected_batch_size=DIVISOR)
    params = np.zeros(graph.num_parameters, np.float32)
    for seed in range(10):
        all_records = make_records(count=9, scale=50.0, seed=seed)
        fewer = Records(all_records.x[:-1], all_records.y[:-1])
        changes = [
            train(graph, params, records, plan=plan, entropy=SeededEntropy(f"{seed}"))
            for records in (all_records, fewer)
        ]
        moved = np.linalg.norm((changes[0] - changes[1]).astype(np.float64)) * DIVISOR / RATE
        assert moved <= CLIP * (1 + 1e-4), f"one record moved the sum by {moved}, the clip is {CLIP}"


def check_batches_are_poisson(train: Train) -> None:
    # False-alarm rate: 2 * FALSE_ALARM_RATE.
    q, steps, count = 0.3, 3000, 10
    graph = LogisticGraph(batch_size=16, num_inputs=2)
    records = make_records(count=count, num_inputs=2)
    plan = make_plan(sampling_rate=q, noise_multiplier=0.0, local_steps=steps, learning_rate=1e-6)
    train(graph, np.zeros(4, np.float32), records, plan=plan, entropy=SeededEntropy("batches"))
    # An empty batch calls no graph.
    sizes = np.bincount([*graph.rows, *[0] * (steps - graph.calls)], minlength=count + 1)
    expected = steps * stats.binom.pmf(np.arange(count + 1), count, q)
    observed = np.array([*sizes[:7], sizes[7:].sum()])
    cells = np.array([*expected[:7], expected[7:].sum()])
    assert stats.chisquare(observed, cells).pvalue > FALSE_ALARM_RATE
    inclusion = sum(graph.rows)
    assert stats.binomtest(inclusion, steps * count, q).pvalue > FALSE_ALARM_RATE


def check_the_divisor_is_public(train: Train) -> None:
    graph = LogisticGraph(batch_size=4, num_inputs=6)
    plan = make_plan(noise_multiplier=0.0, l2_norm_clip=CLIP, learning_rate=RATE, expected_batch_size=DIVISOR)
    params = np.zeros(graph.num_parameters, np.float32)
    for count in (3, 40):
        records = make_records(count=count)
        change = train(graph, params, records, plan=plan, entropy=SeededEntropy("divisor"))
        total = clipped_gradient_sum(
            graph, params, records, np.arange(count), clip=CLIP, entropy=SeededEntropy("dropout")
        )
        np.testing.assert_allclose(change, -RATE / DIVISOR * total, rtol=1e-5, atol=1e-7)


CHECKS = [
    check_the_noise_is_as_accounted,
    check_the_noise_is_fresh_every_time,
    check_a_record_moves_the_update_by_at_most_the_clip,
    check_batches_are_poisson,
    check_the_divisor_is_public,
]


@pytest.mark.parametrize("check", CHECKS)
def test_local_training_passes(check: Callable[[Train], None]) -> None:
    check(train_locally)


@pytest.mark.parametrize("check", CHECKS)
def test_the_copy_passes_while_nothing_is_broken(check: Callable[[Train], None]) -> None:
    check(broken_copy())


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        pytest.param(check_the_noise_is_as_accounted, broken_copy(noise_factor=0.5), id="half the noise"),
        pytest.param(check_the_noise_is_as_accounted, broken_copy(noise_factor=0.9), id="a tenth less noise"),
        pytest.param(check_the_noise_is_as_accounted, broken_copy(noise_factor=0.0), id="no noise"),
        pytest.param(check_the_noise_is_fresh_every_time, broken_copy(constant_seed=True), id="constant seed"),
        pytest.param(check_batches_are_poisson, broken_copy(shuffled=True), id="shuffled batches"),
        pytest.param(check_the_divisor_is_public, broken_copy(own_count=True), id="divided by own count"),
    ],
)
def test_broken_training_is_caught(check: Callable[[Train], None], broken: Train) -> None:
    with pytest.raises(AssertionError):
        check(broken)


def test_a_graph_that_ignores_the_clip_is_caught() -> None:
    with pytest.raises(AssertionError, match="one record moved the sum"):
        check_a_record_moves_the_update_by_at_most_the_clip(train_locally, UnclippedGraph)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_batches_are_cut_into_pieces_of_the_graphs_size_without_a_trace(batch_size: int) -> None:
    records, params = make_records(count=7), np.ones(12, np.float32)
    whole = clipped_gradient_sum(LogisticGraph(7, 6), params, records, np.arange(7), clip=1.0, entropy=os.urandom)
    graph = LogisticGraph(batch_size, 6)
    np.testing.assert_allclose(
        clipped_gradient_sum(graph, params, records, np.arange(7), clip=1.0, entropy=os.urandom), whole, rtol=1e-5
    )
    assert sum(graph.rows) == 7
    result, reference = evaluate(graph, params, records), evaluate(LogisticGraph(7, 6), params, records)
    assert (result.correct, result.count) == (reference.correct, 7)
    assert result.loss_sum == pytest.approx(reference.loss_sum, rel=1e-5)


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (0, []),
        (1, [2]),
        (3, [2, 2]),
        (4, [2, 2]),
        (5, [8]),
        (8, [8]),
        (9, [8, 2]),
        (12, [8, 2, 2]),
        (13, [8, 8]),
        (20, [8, 8, 2, 2]),
    ],
)
def test_the_end_of_a_batch_goes_through_few_rows_without_a_trace(count: int, sizes: list[int]) -> None:
    records, params, batch = make_records(count=20), np.ones(12, np.float32), np.arange(20)[::-1][:count]
    whole = clipped_gradient_sum(LogisticGraph(20, 6), params, records, batch, clip=1.0, entropy=os.urandom)
    graph = LogisticGraph(8, 6, few=2)
    np.testing.assert_allclose(
        clipped_gradient_sum(graph, params, records, batch, clip=1.0, entropy=os.urandom), whole, rtol=1e-5, atol=1e-6
    )
    assert (graph.sizes, sum(graph.rows)) == (sizes, count)


def check_no_record_is_left_out_or_made_up(module: Any) -> None:
    records, params = make_records(count=13), np.ones(12, np.float32)
    for count in (3, 5, 12):
        batch = np.arange(count)
        ours, whole = (
            module.clipped_gradient_sum(graph, params, records, batch, clip=1.0, entropy=os.urandom)
            for graph in (LogisticGraph(8, 6, few=2), LogisticGraph(count, 6))
        )
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        ("at += size", "at += sizes[-1]"),  # what comes after the first small piece is forgotten
        ("batch[at : at + size]", "batch[:size]"),  # the first records come again
    ],
)
def test_pieces_that_lose_or_invent_records_are_caught(wrong: tuple[str, str]) -> None:
    check_no_record_is_left_out_or_made_up(broken_module("device_client.training"))
    with pytest.raises(AssertionError):
        check_no_record_is_left_out_or_made_up(broken_module("device_client.training", wrong))


def test_a_device_without_records_sends_noise_and_nothing_else() -> None:
    graph, plan = LogisticGraph(4, 6), make_plan(noise_multiplier=Z)
    records = make_records(count=0)
    change = train_locally(graph, np.zeros(12, np.float32), records, plan=plan, entropy=SeededEntropy("none"))
    assert np.abs(change).max() > 0
    assert graph.calls == 0


def test_training_lowers_the_loss() -> None:
    graph, records = LogisticGraph(16, 6), make_records(count=60)
    plan = make_plan(noise_multiplier=0.5, local_steps=20, learning_rate=2.0, expected_batch_size=60.0)
    params = np.zeros(12, np.float32)
    trained = params + train_locally(graph, params, records, plan=plan, entropy=SeededEntropy("learn"))
    assert evaluate(graph, trained, records).loss_sum < 0.8 * evaluate(graph, params, records).loss_sum


def test_divergence_is_an_error_and_not_an_update() -> None:
    plan = make_plan(noise_multiplier=1.0, learning_rate=1e38, expected_batch_size=1e-3)
    with pytest.raises(TrainingError, match="learning_rate"), np.errstate(all="ignore"):
        train_locally(
            LogisticGraph(4, 6), np.zeros(12, np.float32), make_records(), plan=plan, entropy=SeededEntropy("")
        )


def test_labels_and_windows_must_be_as_many() -> None:
    with pytest.raises(LocalMisuseError, match="as many labels"):
        Records(np.zeros((3, 2, 2), np.float32), np.zeros(2, np.int32))


def test_sampling_rates_next_to_zero_and_at_one_are_exact() -> None:
    assert poisson_sample(100, 1.0, SeededEntropy("")).all()
    assert not poisson_sample(100, 5e-324, SeededEntropy("")).any()
    assert not poisson_sample(100, 0.5, lambda count: b"\xff" * count).any()
    assert poisson_sample(100, 0.5, lambda count: b"\x00" * count).all()


@dataclass
class WatchedMasks(LogisticGraph):
    """Keeps the dropout masks that it is fed."""

    masks: list[Float32] = field(default_factory=list)

    def train(
        self, params: Float32, x: Float32, y: Labels, mask: Float32, *, clip: float, dropout: Float32 | None = None
    ) -> Float32:
        if dropout is not None:
            self.masks.append(dropout)
        return super().train(params, x, y, mask, clip=clip)


def test_a_graph_with_dropout_is_fed_fresh_masks_for_every_call() -> None:
    graph = WatchedMasks(batch_size=8, num_inputs=6, dropout=(DropoutMask("a", 0.5, 40), DropoutMask("b", 0.0, 3)))
    train_locally(
        graph, np.zeros(12, np.float32), make_records(), plan=make_plan(local_steps=2), entropy=SeededEntropy("masks")
    )
    assert [masks.shape for masks in graph.masks] == [(8, 43)] * 6  # 20 records a step, 8 a call
    assert all(masks[:, 40:].all() for masks in graph.masks)
    assert len({masks.tobytes() for masks in graph.masks}) == 6


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_a_unit_is_dropped_at_its_rate(rate: float) -> None:
    # 200,000 coins; within six standard deviations: false alarm 2e-9.
    kept = keep_masks((DropoutMask("d", rate, 200),), 1000, SeededEntropy(f"rate {rate}"))
    assert set(np.unique(kept)) <= {0.0, 1.0}
    assert abs(kept.mean() - (1 - rate)) <= 6 * (rate * (1 - rate) / kept.size) ** 0.5 + 2.0**-16


def test_labels_may_be_numbers() -> None:
    class Remembering(LogisticGraph):
        def train(self, params: Float32, x: Float32, y: Labels, mask: Float32, **rest: Any) -> Float32:
            seen.append(y)
            return np.zeros_like(params)

    seen: list[Labels] = []
    records = Records(np.zeros((5, 3, 2), np.float32), np.arange(10, dtype=np.float32).reshape(5, 2))
    train_locally(
        Remembering(4, 6), np.zeros(12, np.float32), records, plan=make_plan(), entropy=SeededEntropy("numbers")
    )
    assert [y.shape for y in seen] == [(4, 2), (4, 2)]
    np.testing.assert_array_equal(np.concatenate([seen[0], seen[1][:1]]), records.y)
