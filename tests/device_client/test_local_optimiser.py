"""What the device makes of its noisy sums, against plain numpy and on devices that drift; wrong copies are caught."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from device_client.errors import TrainingError
from device_client.ports import Float32, Labels
from device_client.training import Control, LocalProgress, LocalTraining, Records, train_locally
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import Entropy
from fl_protocol.messages import TrainingPlanMsg
from tests.device_client.ports import LogisticGraph, make_plan, make_records
from tests.virtual_fleet import SeededEntropy

INPUTS, SHARED, ALL = 6, 8, 12
START = np.linspace(-0.5, 0.5, ALL).astype(np.float32)
CONTROL: Control = (np.linspace(1, -1, SHARED).astype(np.float32), np.linspace(0, 0.7, SHARED).astype(np.float32))
Float64 = NDArray[np.float64]

PLANS = [
    pytest.param(make_plan(noise_multiplier=0.0, local_steps=7), id="sgd"),
    pytest.param(make_plan(noise_multiplier=0.0, local_steps=7, momentum=0.9), id="momentum"),
    pytest.param(make_plan(noise_multiplier=0.0, local_steps=7, proximal_mu=0.3), id="fedprox"),
    pytest.param(
        make_plan(noise_multiplier=0.0, local_steps=7, momentum=0.5, proximal_mu=0.3), id="momentum and fedprox"
    ),
    pytest.param(make_plan(noise_multiplier=0.0, local_steps=7, control_variates=True), id="scaffold"),
]


def control_of(plan: TrainingPlanMsg) -> Control | None:
    return CONTROL if plan.control_variates else None


# Optimisers, against references that know nothing of our code.


def mean_gradient(params: Float64, records: Records, plan: TrainingPlanMsg) -> Float64:
    """Softmax regression's clipped gradients, one record after the other, over the public divisor."""
    total = np.zeros(ALL)
    for x, y in zip(records.x, records.y, strict=True):
        inputs = x.reshape(-1).astype(np.float64)
        exponent = np.exp(inputs @ params.reshape(INPUTS, 2))
        gradient = np.outer(inputs, exponent / exponent.sum() - np.eye(2)[y]).reshape(-1)
        total += gradient * min(1.0, plan.l2_norm_clip / np.linalg.norm(gradient))
    return total / plan.expected_batch_size


@dataclass(frozen=True)
class Reference:
    """The papers' equations, and by its fields ways to get them wrong."""

    pulls_to: Float64 | None = None
    corrects_by: float = 1.0
    dampens: bool = False

    def change(self, records: Records, plan: TrainingPlanMsg) -> Float64:
        x = START.astype(np.float64)
        y, v, correction = x.copy(), np.zeros(ALL), np.zeros(ALL)
        if plan.control_variates:
            correction[:SHARED] = CONTROL[0].astype(np.float64) - CONTROL[1]
        for _ in range(plan.local_steps):
            g = mean_gradient(y, records, plan) + self.corrects_by * correction
            g = g + plan.proximal_mu * (y - (x if self.pulls_to is None else self.pulls_to))
            v = plan.momentum * v + (1 - plan.momentum if self.dampens else 1) * g
            y = y - plan.learning_rate * v
        return y - x


def check_against(reference: Reference, plan: TrainingPlanMsg) -> None:
    records = make_records(scale=0.7)
    change = train_locally(
        LogisticGraph(8, INPUTS), START, records, plan=plan, entropy=SeededEntropy("none"), control=control_of(plan)
    )
    np.testing.assert_allclose(change, reference.change(records, plan), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_each_optimiser_does_what_its_paper_says(plan: TrainingPlanMsg) -> None:
    check_against(Reference(), plan)


@pytest.mark.parametrize(
    ("wrong", "changes"),
    [
        pytest.param(Reference(dampens=True), {"momentum": 0.9}, id="momentum that dampens the gradient"),
        pytest.param(Reference(pulls_to=np.zeros(ALL)), {"proximal_mu": 0.3}, id="pulled to zero"),
        pytest.param(Reference(corrects_by=-1.0), {"control_variates": True}, id="corrected the wrong way"),
        pytest.param(Reference(corrects_by=0.0), {"control_variates": True}, id="not corrected"),
    ],
)
def test_the_comparison_tells_wrong_equations_from_right_ones(wrong: Reference, changes: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        check_against(wrong, make_plan(noise_multiplier=0.0, local_steps=7, **changes))


def test_personal_layers_are_stepped_without_a_correction() -> None:
    plan = make_plan(noise_multiplier=0.0, control_variates=True)
    changes = [
        train_locally(
            LogisticGraph(8, INPUTS), START, make_records(), plan=plan, entropy=SeededEntropy(""), control=control
        )
        for control in [CONTROL, (np.zeros_like(CONTROL[0]), np.zeros_like(CONTROL[0]))]
    ]
    expected = np.zeros(ALL)
    expected[:SHARED] = -plan.learning_rate * (CONTROL[0] - CONTROL[1])
    np.testing.assert_allclose(changes[0] - changes[1], expected, atol=1e-6)


def test_the_next_control_variate_follows_from_what_is_sent_and_public_numbers() -> None:
    plan = make_plan(local_steps=5, control_variates=True, sampling_rate=0.5)
    training = finished(make_records(), plan, entropy=SeededEntropy("option II"))
    server, own = CONTROL
    sent = training.change()[:SHARED].astype(np.float64)
    expected = own.astype(np.float64) - server - sent / (plan.local_steps * plan.learning_rate)
    # In float64, and rounded once.
    np.testing.assert_array_equal(training.next_control(), expected.astype(np.float32))
    assert training.next_control().dtype == np.float32


def finished(records: Records, plan: TrainingPlanMsg, *, entropy: Entropy) -> LocalTraining:
    training = LocalTraining(
        LogisticGraph(8, INPUTS), START, records, plan=plan, entropy=entropy, control=control_of(plan)
    )
    while not training.done:
        training.advance()
    return training


# Client drift: two devices whose losses are quadratics of different curvature around different places.


@dataclass
class QuadraticGraph:
    """Every record is a curvature h and a centre a, and its loss is Σ h·(θ − a)² / 2."""

    batch_size: int = 1
    train_sizes: tuple[int, ...] = (1,)
    dropout: tuple[()] = ()

    def train(
        self, params: Float32, x: Float32, y: Labels, mask: Float32, *, clip: float, dropout: Float32 | None = None
    ) -> Float32:
        del y, clip, dropout
        gradient: Float32 = (mask[:, None] * x[:, 0] * (params - x[:, 1])).sum(axis=0)
        return gradient

    def evaluate(self, params: Float32, x: Float32, y: Labels, mask: Float32) -> tuple[float, float]:
        raise NotImplementedError


CURVATURES = np.array([[1.0, 8.0], [6.0, 0.5]])
CENTRES = np.array([[-1.0, 2.0], [1.0, -3.0]])
OPTIMUM = (CURVATURES * CENTRES).sum(axis=0) / CURVATURES.sum(axis=0)


def distance_to_the_optimum(kind: type[LocalTraining], *, rounds: int = 150, **changes: float) -> float:
    """After rounds of ten steps on each device and a plain average at the server."""
    plan = make_plan(
        noise_multiplier=0.0, local_steps=10, learning_rate=0.1, expected_batch_size=1.0, l2_norm_clip=1e6, **changes
    )
    x, c, own = np.zeros(2, np.float32), np.zeros(2, np.float32), np.zeros((2, 2), np.float32)
    for _ in range(rounds):
        moved, following = np.zeros((2, 2)), own.copy()
        for device in range(2):
            window = np.stack([CURVATURES[device], CENTRES[device]]).astype(np.float32)[None]
            training = kind(
                QuadraticGraph(),
                x,
                Records(window, np.zeros(1, np.int32)),
                plan=plan,
                entropy=SeededEntropy(""),
                control=(c, own[device]) if plan.control_variates else None,
            )
            while not training.done:
                training.advance()
            moved[device] = training.change()
            if plan.control_variates:
                following[device] = training.next_control()
        x = (x + moved.mean(axis=0)).astype(np.float32)
        c, own = (c + (following - own).mean(axis=0)).astype(np.float32), following
    return float(np.linalg.norm(x - OPTIMUM))


class ForgettingTheSteps(LocalTraining):
    """Broken: c_i − c + (x − y) / η, without T."""

    def next_control(self) -> Float32:
        assert self._plan.control_variates
        following: Float32 = super().next_control() - (self.steps - 1) / self.steps / self._plan.learning_rate * (
            self.change()
        )
        return following


class KeepingItsVariate(LocalTraining):
    """Broken: c_i stays what it was."""

    def next_control(self) -> Float32:
        assert self._optimiser._control is not None
        return self._optimiser._control[1]


def test_scaffold_reaches_the_optimum_from_which_averaging_drifts_and_fedprox_drifts_less() -> None:
    fedavg = distance_to_the_optimum(LocalTraining)
    fedprox = distance_to_the_optimum(LocalTraining, proximal_mu=2.0)
    scaffold = distance_to_the_optimum(LocalTraining, control_variates=True)
    assert fedavg > 0.5
    assert 0.05 < fedprox < 0.8 * fedavg
    assert scaffold < 1e-4


@pytest.mark.parametrize("broken", [ForgettingTheSteps, KeepingItsVariate])
def test_a_wrong_control_variate_stays_away_from_it(broken: type[LocalTraining]) -> None:
    assert distance_to_the_optimum(broken, control_variates=True, rounds=6) > 0.5


def simple(**changes: Any) -> LocalTraining:
    arguments: dict[str, Any] = {"plan": make_plan(local_steps=3), "entropy": SeededEntropy("simple"), **changes}
    return LocalTraining(LogisticGraph(8, INPUTS), START, make_records(), **arguments)


@pytest.mark.parametrize(
    ("control", "sentence"),
    [
        ((np.zeros(8, np.float32), np.zeros(7, np.float32)), "expected the same for both"),
        ((np.zeros(13, np.float32), np.zeros(13, np.float32)), "at most the model's 12"),
        ((np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32)), "expected the same for both"),
        ((np.full(8, np.nan, np.float32), np.zeros(8, np.float32)), "not finite"),
        ((np.zeros(8, np.float32), np.full(8, np.inf, np.float32)), "not finite"),
    ],
)
def test_control_variates_that_do_not_fit_are_refused_in_a_sentence(control: Control, sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        simple(plan=make_plan(control_variates=True), control=control)


def test_control_variates_are_given_exactly_where_the_plan_has_them() -> None:
    with pytest.raises(LocalMisuseError, match="it says False"):
        simple(control=CONTROL)
    with pytest.raises(LocalMisuseError, match="it says True"):
        simple(plan=make_plan(control_variates=True))
    with pytest.raises(LocalMisuseError, match="next_control"):
        finished(make_records(), make_plan(), entropy=SeededEntropy("")).next_control()


def test_a_server_variate_without_bounds_ends_in_an_error_and_not_in_an_update() -> None:
    huge = np.full(SHARED, np.finfo(np.float32).max, np.float32)
    training = simple(plan=make_plan(control_variates=True, learning_rate=4.0), control=(huge, -huge))
    with np.errstate(all="raise"), pytest.raises(TrainingError, match="after step 1"):
        training.advance()


def progress_with(*, step: int = 1, current: Float64 | None = None, velocity: Float64 | None = None) -> LocalProgress:
    return LocalProgress(
        step,
        (np.zeros(ALL) if current is None else current).astype("<f8").tobytes(),
        (np.zeros(0) if velocity is None else velocity).astype("<f8").tobytes(),
    )


@pytest.mark.parametrize(
    ("progress", "sentence"),
    [
        (progress_with(step=4), "step 4 of a training of 3"),
        (progress_with(step=-1), "step -1 of a training of 3"),
        (progress_with(current=np.zeros(ALL - 1)), "88 bytes of parameters, expected 96"),
        (progress_with(current=np.zeros(0)), "0 bytes of parameters, expected 96"),
        (replace(progress_with(), current=b"\0" * 97), "97 bytes of parameters, expected 96"),
        (progress_with(velocity=np.zeros(ALL)), "96 bytes of velocities, expected 0"),
        (progress_with(current=np.full(ALL, np.nan)), "parameters that are not finite"),
        (progress_with(current=np.full(ALL, -np.inf)), "parameters that are not finite"),
        (progress_with(current=np.full(ALL, 1e39)), "parameters that are not finite"),
    ],
)
def test_progress_that_does_not_fit_is_refused_in_a_sentence(progress: LocalProgress, sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        simple(progress=progress)


def test_progress_of_a_plan_with_momentum_needs_its_velocity() -> None:
    plan = make_plan(local_steps=3, momentum=0.9)
    assert simple(plan=plan, progress=progress_with(velocity=np.zeros(ALL))).step == 1
    with pytest.raises(TrainingError, match="0 bytes of velocities, expected 96"):
        simple(plan=plan, progress=progress_with())
    with pytest.raises(TrainingError, match="velocities that are not finite"):
        simple(plan=plan, progress=progress_with(velocity=np.full(ALL, np.nan)))
