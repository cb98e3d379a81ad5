"""Local training step by step: interrupted, resumed, cut short; broken copies are caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from device_client.errors import TrainingError
from device_client.local_optimiser import LocalOptimiser
from device_client.ports import Float32, Graph, Labels
from device_client.training import Control, LocalProgress, LocalTraining, Records, clipped_gradient_sum, train_locally
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import Entropy
from fl_protocol.messages import TrainingPlanMsg
from tests.device_client import noise_checks
from tests.device_client.ports import LogisticGraph, make_plan, make_records
from tests.virtual_fleet import SeededEntropy

FALSE_ALARM_RATE = 1e-9
"""Of each p-value here; the entropy is seeded, so a test that passes goes on passing."""
INPUTS, SHARED, ALL = 6, 8, 12
START = np.linspace(-0.5, 0.5, ALL).astype(np.float32)
CONTROL: Control = (np.linspace(1, -1, SHARED).astype(np.float32), np.linspace(0, 0.7, SHARED).astype(np.float32))
Float64 = NDArray[np.float64]

METHODS: list[dict[str, float]] = [
    {},
    {"momentum": 0.9},
    {"proximal_mu": 0.3},
    {"momentum": 0.5, "proximal_mu": 0.3},
    {"control_variates": True},
]


def control_of(plan: TrainingPlanMsg) -> Control | None:
    return CONTROL if plan.control_variates else None


def lives(
    kind: type[LocalTraining],
    *,
    graph: Graph,
    start: Float32,
    records: Records,
    plan: TrainingPlanMsg,
    entropies: Iterator[Entropy],
    steps_a_life: int,
    control: Control | None = None,
    loses_last: bool = False,
) -> Float32:
    """The change of a training that is put aside after so many steps and gone on with in another process.

    Each life has an entropy of its own. With `loses_last` it does one step more whose progress is not stored, as in a
    power cut.
    """
    stored: bytes | None = None
    while True:
        progress = msgspec.msgpack.decode(stored, type=LocalProgress) if stored is not None else None
        training = kind(graph, start, records, plan=plan, entropy=next(entropies), control=control, progress=progress)
        for _ in range(steps_a_life):
            if not training.done:
                training.advance()
        if training.done:
            return training.change()
        stored = msgspec.msgpack.encode(training.progress())
        if loses_last:
            training.advance()


def continuing(seed: str) -> Iterator[Entropy]:
    """The same stream for every life."""
    entropy = SeededEntropy(seed)
    while True:
        yield entropy


def fresh(seed: str) -> Iterator[Entropy]:
    """A stream of its own for every life."""
    life = 0
    while True:
        life += 1
        yield SeededEntropy(f"{seed}, life {life}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps_a_life", range(1, 8))
def test_a_training_that_was_put_aside_ends_as_one_that_was_not(method: dict[str, float], steps_a_life: int) -> None:
    plan = make_plan(local_steps=7, noise_multiplier=2.0, sampling_rate=0.5, **method)
    change = lives(
        LocalTraining,
        graph=LogisticGraph(4, INPUTS),
        start=START,
        records=make_records(),
        plan=plan,
        entropies=continuing("one stream"),
        steps_a_life=steps_a_life,
        control=control_of(plan),
    )
    whole = train_locally(
        LogisticGraph(4, INPUTS),
        START,
        make_records(),
        plan=plan,
        entropy=SeededEntropy("one stream"),
        control=control_of(plan),
    )
    np.testing.assert_array_equal(change, whole)


WIDE = 6000  # coordinates, so that one change is a sample large enough to test
WIDE_SHARED = WIDE // 2
Z, CLIP, RATE, DIVISOR, STEPS = 3.0, 0.8, 0.5, 25.0, 6


def noise_of(kind: type[LocalTraining], *, seed: str, count: int = 10, loses_last: bool = False) -> Float64:
    """The noise in a resumed training's change over one step's accounted standard deviation.

    Records of zeros have no gradient; variates are zero. Each life has two steps.
    """
    change = lives(
        kind,
        graph=LogisticGraph(batch_size=8, num_inputs=WIDE // 2),
        start=np.zeros(WIDE, np.float32),
        records=Records(np.zeros((count, WIDE // 4, 2), np.float32), np.zeros(count, np.int32)),
        plan=make_plan(
            noise_multiplier=Z,
            l2_norm_clip=CLIP,
            learning_rate=RATE,
            expected_batch_size=DIVISOR,
            local_steps=STEPS,
            control_variates=True,
        ),
        entropies=fresh(seed),
        steps_a_life=2,
        control=(np.zeros(WIDE_SHARED, np.float32), np.zeros(WIDE_SHARED, np.float32)),
        loses_last=loses_last,
    )
    noise: Float64 = -change.astype(np.float64) * DIVISOR / RATE / (Z * CLIP)
    return noise


def check_a_resumed_training_has_the_noise_of_its_steps(kind: type[LocalTraining]) -> None:
    # False-alarm rate: 4 * FALSE_ALARM_RATE. The grid's margin (2^-9) is below what 3000 draws show.
    for loses_last in (False, True):
        noise = noise_of(kind, seed=f"resumed, losing: {loses_last}", loses_last=loses_last)
        for part in (noise[:WIDE_SHARED], noise[WIDE_SHARED:]):
            assert noise_checks.p_value_of_standard_deviation(part, STEPS**0.5) > FALSE_ALARM_RATE


def check_a_device_without_records_sends_the_same_noise(kind: type[LocalTraining]) -> None:
    # False-alarm rate: 2 * FALSE_ALARM_RATE.
    noise = noise_of(kind, seed="nobody", count=0)
    for part in (noise[:WIDE_SHARED], noise[WIDE_SHARED:]):
        assert noise_checks.p_value_of_standard_deviation(part, STEPS**0.5) > FALSE_ALARM_RATE


def check_what_was_charged_is_what_is_computed(kind: type[LocalTraining]) -> None:
    graph, plan = LogisticGraph(32, INPUTS), make_plan(local_steps=STEPS)
    lives(
        kind,
        graph=graph,
        start=START,
        records=make_records(),
        plan=plan,
        entropies=fresh("charged"),
        steps_a_life=2,
    )
    assert graph.calls == STEPS, f"{graph.calls} noisy sums for {STEPS} charged"


def check_the_divisor_is_public(kind: type[LocalTraining]) -> None:
    plan = make_plan(noise_multiplier=0.0, local_steps=1, learning_rate=RATE, expected_batch_size=DIVISOR)
    for count in (3, 40):
        graph, records = LogisticGraph(8, INPUTS), make_records(count=count)
        change = lives(kind, graph=graph, start=START, records=records, plan=plan, entropies=fresh(""), steps_a_life=1)
        total = clipped_gradient_sum(
            graph, START, records, np.arange(count), clip=plan.l2_norm_clip, entropy=SeededEntropy("")
        )
        np.testing.assert_allclose(change, -RATE / DIVISOR * total, rtol=1e-5, atol=1e-6)


def check_the_change_follows_from_the_noisy_sums(kind: type[LocalTraining]) -> None:
    """What an observer of the noisy sums computes from them and the plan is all that there is in the change."""
    sums: list[Float64] = []

    class Watched(kind):  # type: ignore[valid-type, misc]
        def _noisy_sum(self) -> Float64:
            released: Float64 = super()._noisy_sum()
            sums.append(released.copy())
            return released

    plan = make_plan(local_steps=STEPS, momentum=0.7, proximal_mu=0.2)
    change = lives(
        Watched,
        graph=LogisticGraph(8, INPUTS),
        start=START,
        records=make_records(),
        plan=plan,
        entropies=fresh("observer"),
        steps_a_life=4,
    )
    observer = LocalOptimiser(START, plan)
    for released in sums:
        observer.step(released)
    np.testing.assert_array_equal(change, observer.change)


class RewindingTheRandomness(LocalTraining):
    """Broken: every life begins with the same random numbers."""

    def __init__(self, *arguments: Any, entropy: Entropy, **named: Any) -> None:
        super().__init__(*arguments, entropy=SeededEntropy("rewound"), **named)


class OneStepMore(LocalTraining):
    """Broken: T + 1 noisy steps for T charged."""

    @property
    def done(self) -> bool:
        return self.step > self.steps


class ForgettingAStep(LocalTraining):
    """Broken: once, the stored count is one behind the stored parameters."""

    def progress(self) -> LocalProgress:
        right = super().progress()
        return replace(right, step=1) if right.step == 2 else right


class NoiseOnTheSharedPartOnly(LocalTraining):
    """Broken: personal layers are stepped by their bare gradient."""

    def _noisy_sum(self) -> Float64:
        noisy = super()._noisy_sum()
        noisy[len(noisy) // 2 :] = 0  # the gradient of records of zeros
        return noisy


class NoiseOnlyForSomebody(LocalTraining):
    """Broken: without records there is nothing to hide, it thinks."""

    def _noisy_sum(self) -> Float64:
        return super()._noisy_sum() if len(self._records) else np.zeros(self._grid.length)


class DividingByItsOwnCount(LocalTraining):
    """Broken: the divisor tells how many records there are."""

    def __init__(self, graph: Graph, start: Float32, records: Records, *, plan: TrainingPlanMsg, **rest: Any) -> None:
        own = replace(plan, expected_batch_size=float(max(1, len(records))))
        super().__init__(graph, start, records, plan=own, **rest)


class MomentumOfTheBareGradient(LocalTraining):
    """Broken: the velocity gets a little of the gradient without its noise."""

    def advance(self) -> None:
        super().advance()
        everyone = np.arange(len(self._records))
        bare = clipped_gradient_sum(
            self._graph, self._optimiser.params, self._records, everyone, clip=1.0, entropy=self._entropy
        )
        self._optimiser._velocity += 1e-3 * bare


CHECKS = [
    check_a_resumed_training_has_the_noise_of_its_steps,
    check_a_device_without_records_sends_the_same_noise,
    check_what_was_charged_is_what_is_computed,
    check_the_divisor_is_public,
    check_the_change_follows_from_the_noisy_sums,
]


@pytest.mark.parametrize("check", CHECKS)
def test_local_training_passes(check: Callable[[type[LocalTraining]], None]) -> None:
    check(LocalTraining)


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        (check_a_resumed_training_has_the_noise_of_its_steps, RewindingTheRandomness),
        (check_a_resumed_training_has_the_noise_of_its_steps, OneStepMore),
        (check_a_resumed_training_has_the_noise_of_its_steps, ForgettingAStep),
        (check_a_resumed_training_has_the_noise_of_its_steps, NoiseOnTheSharedPartOnly),
        (check_a_resumed_training_has_the_noise_of_its_steps, DividingByItsOwnCount),
        (check_a_device_without_records_sends_the_same_noise, NoiseOnlyForSomebody),
        (check_what_was_charged_is_what_is_computed, OneStepMore),
        (check_what_was_charged_is_what_is_computed, ForgettingAStep),
        (check_the_divisor_is_public, DividingByItsOwnCount),
        (check_the_change_follows_from_the_noisy_sums, MomentumOfTheBareGradient),
    ],
)
def test_a_broken_copy_is_caught(check: Callable[[type[LocalTraining]], None], broken: type[LocalTraining]) -> None:
    with pytest.raises(AssertionError):
        check(broken)


def test_a_step_that_was_lost_leaves_nothing_in_the_change() -> None:
    # False-alarm rate: 2 * FALSE_ALARM_RATE.
    made: list[tuple[int, Float64]] = []

    class Watched(LocalTraining):
        def _noisy_sum(self) -> Float64:
            released = super()._noisy_sum()
            made.append((self.step, released / (Z * CLIP)))
            return released

    noise = noise_of(Watched, seed="lost", loses_last=True)
    lost = [sum_ for (step, sum_), (following, _) in pairwise(made) if step == following]
    assert len(lost) == 2, [step for step, _ in made]
    for sum_ in lost:
        assert noise_checks.p_value_of_no_correlation(sum_, noise) > FALSE_ALARM_RATE
    kept = np.sum([sum_ for _, sum_ in made], axis=0) - np.sum(lost, axis=0)
    np.testing.assert_allclose(noise, kept, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(0, 9),
    sampling_rate=st.sampled_from([1e-9, 0.3, 1.0]),
    method=st.sampled_from(METHODS),
    cuts=st.lists(st.booleans(), min_size=5, max_size=5),
    batch_size=st.integers(1, 5),
)
def test_every_training_ends_after_its_steps_however_it_is_cut(
    count: int, sampling_rate: float, method: dict[str, float], cuts: list[bool], batch_size: int
) -> None:
    plan = make_plan(local_steps=5, sampling_rate=sampling_rate, **method)
    entropy = SeededEntropy("cut")

    def begin(progress: LocalProgress | None = None) -> LocalTraining:
        return LocalTraining(
            LogisticGraph(batch_size, INPUTS),
            START,
            make_records(count=count),
            plan=plan,
            entropy=entropy,
            control=control_of(plan),
            progress=progress,
        )

    training = begin()
    for done, cut in enumerate(cuts):
        assert (training.done, training.step, training.steps) == (False, done, 5)
        training.advance()
        if cut:
            training = begin(training.progress())
    assert training.done
    assert np.isfinite(training.change()).all()
    assert training.change().dtype == np.float32
    assert np.abs(training.change()).min() > 0  # noise is on every coordinate


# What is refused.


def simple(**changes: Any) -> LocalTraining:
    arguments: dict[str, Any] = {"plan": make_plan(local_steps=3), "entropy": SeededEntropy("simple"), **changes}
    return LocalTraining(LogisticGraph(8, INPUTS), START, make_records(), **arguments)


def test_progress_at_the_last_step_is_already_the_change() -> None:
    training = simple()
    while not training.done:
        training.advance()

    def no_entropy(count: int) -> bytes:
        raise AssertionError("nothing is left to draw")

    again = simple(progress=training.progress(), entropy=no_entropy)
    assert again.done
    np.testing.assert_array_equal(again.change(), training.change())


def test_neither_more_nor_fewer_steps_than_were_charged_are_to_be_had() -> None:
    training = simple(plan=make_plan(local_steps=2, control_variates=True), control=CONTROL)
    training.advance()
    with pytest.raises(LocalMisuseError, match="only 1 of 2"):
        training.change()
    with pytest.raises(LocalMisuseError, match="finished training"):
        training.next_control()
    training.advance()
    with pytest.raises(LocalMisuseError, match="no more than these were charged"):
        training.advance()
    assert training.change().shape == (ALL,)


@dataclass
class FailingGraph(LogisticGraph):
    """Fails at its third call, as a record that it cannot take would make it."""

    failures: list[Exception | float] = field(default_factory=list)

    def train(self, params: Float32, x: Float32, y: Labels, mask: Float32, **rest: Any) -> Float32:
        gradient = super().train(params, x, y, mask, **rest)
        if self.calls != 3:
            return gradient
        failure = self.failures.pop()
        if isinstance(failure, Exception):
            raise failure
        return gradient * np.float32(failure)


@pytest.mark.parametrize("failure", [float("nan"), float("inf"), TrainingError("no memory"), RuntimeError("runtime")])
def test_a_step_that_failed_is_not_tried_again_with_another_batch(failure: Exception | float) -> None:
    graph = FailingGraph(32, INPUTS, failures=[failure])
    training = LocalTraining(
        graph, START, make_records(), plan=make_plan(local_steps=3), entropy=SeededEntropy("failing")
    )
    training.advance()
    training.advance()
    with np.errstate(invalid="ignore"), pytest.raises((TrainingError, RuntimeError)):
        training.advance()
    for refused in (training.advance, training.progress, training.change, training.next_control):
        with pytest.raises(TrainingError, match="given up"):
            refused()
    assert graph.calls == 3
