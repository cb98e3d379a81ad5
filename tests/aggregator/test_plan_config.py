"""The plan in a task file: steps or epochs, and the options of the local steps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.task_file import TaskConfig, TrainingPlan, read_task
from fl_protocol.errors import ConfigError

PLAN = """
sampling_rate = 0.1
learning_rate = 0.5
l2_norm_clip = 1.0
noise_multiplier = 1.0
expected_batch_size = 10.0
"""


def plan(extra: str) -> TrainingPlan:
    found = load(extra).plan
    assert isinstance(found, TrainingPlan)
    return found


def load(extra: str, *, given: str = PLAN, task: str = "population = 5") -> TaskConfig:
    text = f"""
name = "watch"
bundle = "model.covey"
publisher_key = ""
rounds = 3
goal = 3
minimum_cohort = 2
round_duration_s = 60.0
engine = "open"
{task}
[plan]
{given}
{extra}
"""
    return read_task(text, "watch.toml")


def test_what_is_left_out_is_plain_sgd() -> None:
    message = plan("local_steps = 7").message()
    assert (message.local_steps, message.momentum, message.proximal_mu, message.control_variates) == (7, 0, 0, False)


def test_every_option_travels() -> None:
    message = plan("local_steps = 7\nmomentum = 0.9\nproximal_mu = 0.01").message()
    assert (message.momentum, message.proximal_mu) == (0.9, 0.01)
    assert plan("local_steps = 7\ncontrol_variates = true").message().control_variates


@pytest.mark.parametrize(("epochs", "steps"), [(1, 10), (0.1, 1), (0.25, 3), (1.1, 11), (0.3, 3), (0.7, 7), (1e-9, 1)])
def test_epochs_are_steps_over_the_sampling_rate_rounded_up(epochs: float, steps: int) -> None:
    config = plan(f"local_epochs = {epochs}")
    assert config.steps == config.message().local_steps == steps


@given(epochs=st.floats(0.01, 20), rate=st.floats(0.001, 1))
def test_the_expected_passes_are_never_fewer_than_asked_for_nor_a_step_more(epochs: float, rate: float) -> None:
    steps = TrainingPlan(
        sampling_rate=rate,
        local_epochs=epochs,
        learning_rate=1.0,
        l2_norm_clip=1.0,
        noise_multiplier=1.0,
        expected_batch_size=1.0,
    ).steps
    assert steps * rate >= epochs * (1 - 1e-6)
    assert steps == 1 or (steps - 1) * rate < epochs * (1 + 1e-9)
    assert steps >= math.floor(epochs / rate)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("", "expected exactly one of local_steps and local_epochs"),
        ("local_steps = 1\nlocal_epochs = 1.0", "expected exactly one of local_steps and local_epochs"),
        ("local_epochs = 0.0", "local_epochs"),
        ("local_epochs = nan", "local_epochs"),
        ("local_epochs = 99999.0", r"local_steps"),
        ("local_steps = 0", r"local_steps"),
        ("local_steps = 1\nmomentum = 1.0", "momentum"),
        ("local_steps = 1\nproximal_mu = nan", "proximal_mu"),
        ("local_steps = 1\nproximal_mu = inf", "proximal_mu must be finite"),
        ("local_steps = 1\nmomentum = 0.5\ncontrol_variates = true", "control_variates need plain steps"),
        ("local_steps = 1\nproximal_mu = 0.5\ncontrol_variates = true", "control_variates need plain steps"),
        ("local_steps = 1\ncontrol_variates = 1", "control_variates"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_by_name(extra: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(extra)


def test_control_variates_need_the_number_of_devices() -> None:
    with pytest.raises(ConfigError, match="control_variates need population"):
        load("local_steps = 1\ncontrol_variates = true", task="")
    assert load("local_steps = 1\ncontrol_variates = true", task="population = 40").population == 40


@pytest.mark.parametrize("rate", ["0.0", "1.5", "nan", "-1.0"])
def test_epochs_over_an_impossible_sampling_rate_are_refused_by_name(rate: str) -> None:
    given = PLAN.replace("sampling_rate = 0.1", f"sampling_rate = {rate}")
    with pytest.raises(ConfigError, match="sampling_rate"):
        load("local_epochs = 1.0", given=given)
